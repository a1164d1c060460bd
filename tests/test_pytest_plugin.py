"""The pytest plugin: suites of its users run in processes of their own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest_plugins = ["pytester"]

PROJECT = Path(__file__).parent / "plugin_project"
ROOT = PROJECT.parents[1]
INI = """
[pytest]
asyncio_mode = auto
asyncio_default_fixture_loop_scope = function
filterwarnings =
    error
    ignore:websockets.legacy is deprecated:DeprecationWarning
    ignore:.*Your listener 'SanicTestClient._run_request':DeprecationWarning
"""

Run = Callable[..., pytest.RunResult]


@pytest.fixture
def run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a suite of ``plugin_project`` in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    pytester.makeini(INI)
    (pytester.path / "shop.py").write_text((PROJECT / "shop.py").read_text())

    def run_suite(name: str, *arguments: str) -> pytest.RunResult:
        source = (PROJECT / f"suite_{name}.py").read_text()
        (pytester.path / f"test_{name}.py").write_text(source)
        return pytester.runpytest_subprocess(
            "-p", "pytest_sanic_db_bp", "--durations=6", *arguments
        )

    return run_suite


def test_tests_that_commit_leave_nothing_behind(
    run: Run, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every client of sanic-testing, on every database and driver."""
    monkeypatch.setenv("SANIC_DB_URL", database_url)
    result = run("rollback")
    outcomes = result.parseoutcomes()
    assert not outcomes.keys() & {"failed", "errors"}, outcomes
    assert outcomes["passed"] >= 14
