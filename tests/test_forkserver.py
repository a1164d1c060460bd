"""A forked process is to its module what a new interpreter is."""

import signal
import subprocess
from pathlib import Path

import pytest

from tests.forkserver import ForkedProcess

PROGRAM = """
import os, sys, threading
print(__name__, sys.argv[1:], os.getcwd(), dict(os.environ), sys.stdin.read(), os.getpgid(0))
print("told", file=sys.stderr)
print(threading.active_count(), "shop" in sys.modules, __import__("shop").NAME)
sys.exit(3)
"""


def test_it_runs_the_module_with_its_surroundings(tmp_path: Path) -> None:
    """Arguments, folder, environment and output are its own, as are the modules of its folder."""
    (tmp_path / "program.py").write_text(PROGRAM)
    (tmp_path / "shop.py").write_text("NAME = 'the shop'")
    process = ForkedProcess(["program", "--yes"], cwd=tmp_path, env={"SANIC_X": "1"})
    status, output = process.end(30)
    assert status == 3
    assert output.splitlines() == [
        f"__main__ ['--yes'] {tmp_path} {{'SANIC_X': '1'}}  {process.pid}",
        "told",
        "1 False the shop",
    ]


def test_its_end_is_told(tmp_path: Path) -> None:
    """As a number if it exits, as the signal that has ended it, or not at all while it runs."""
    (tmp_path / "program.py").write_text("import time\nprint('begun', flush=True)\ntime.sleep(60)")
    process = ForkedProcess(["program"], cwd=tmp_path, env={})
    assert process.stdout is not None
    with process.stdout:
        assert process.stdout.readline() == "begun\n"
        assert process.poll() is None
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.01)
        process.terminate()
        assert process.wait(30) == process.poll() == -signal.SIGTERM
        process.kill()


def test_an_error_is_shown(tmp_path: Path) -> None:
    """With its traceback, and the exit status of Python."""
    (tmp_path / "program.py").write_text("raise LookupError('gone')")
    status, output = ForkedProcess(["program"], cwd=tmp_path, env={}).end(30)
    assert status == 1
    assert output.endswith("LookupError: gone\n")
