"""Processes whose lines count where coverage is measured."""

import sys
from pathlib import Path

from coverage import Coverage

CONFIGURATION = Path(__file__).parents[1] / "pyproject.toml"


def python_module(*command: str) -> list[str]:
    """Give the command that runs ``python -m MODULE ...``, measured if this process is."""
    measured = Coverage.current()
    if measured is None:
        return [sys.executable, "-m", *command]
    options = [
        "--parallel-mode",
        f"--rcfile={CONFIGURATION}",
        f"--data-file={measured.get_data().base_filename()}",
    ]
    return [sys.executable, "-m", "coverage", "run", *options, "-m", *command]
