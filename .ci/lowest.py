"""Print pip constraints that hold each dependency at the lowest version pyproject.toml allows."""

import re
import tomllib
from itertools import chain
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
for requirement in chain(project["dependencies"], *project["optional-dependencies"].values()):
    found = re.match(r"([\w-]+)(?:\[[\w,-]+\])?>=([\w.]+)", requirement)
    if not found:
        raise SystemExit(f"no lowest version in {requirement!r}")
    print(f"{found[1]}=={found[2]}")
