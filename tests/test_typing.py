"""What a type checker sees of the public names is what a user needs to see."""

import subprocess
import sys
from pathlib import Path

import pytest

CHECKS = sorted((Path(__file__).parent / "typing_checks").glob("*.py"))


@pytest.mark.parametrize("checks", CHECKS, ids=lambda path: path.stem)
def test_types_are_as_a_user_sees_them(checks: Path) -> None:
    """The file with the assertions passes ``mypy --strict``, and its ignored errors are errors."""
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", "--strict", str(checks)]
    root = Path(__file__).parent.parent
    result = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout + result.stderr
