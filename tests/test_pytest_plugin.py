"""The pytest plugin: suites of its users run in processes of their own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import inspect, make_url, text

from tests.measured import python_module
from tests.shop import Observer

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

Outcomes = dict[str, int]
Run = Callable[..., tuple[Outcomes, pytest.LineMatcher]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs a suite of ``plugin_project`` in a process of its own."""
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    # Each process would rewrite the assertions of all modules anew.
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    (tmp_path / "pytest.ini").write_text(INI)

    def run_suite(
        name: str, *arguments: str, timeout: float | None = None
    ) -> tuple[Outcomes, pytest.LineMatcher]:
        source = (PROJECT / f"suite_{name}.py").read_text()
        (tmp_path / f"test_{name}.py").write_text(source)
        # Not pytester: it forgets the modules that a test has imported, and to import a dialect of
        # SQLAlchemy once more is a warning.
        command = python_module("pytest", "-p", "pytest_sanic_db_bp", *arguments)
        ended = subprocess.run(
            command, cwd=tmp_path, capture_output=True, text=True, timeout=timeout
        )
        lines = ended.stdout.splitlines()
        return pytest.RunResult.parse_summary_nouns(lines), pytest.LineMatcher(lines)

    return run_suite


def test_tests_that_commit_leave_nothing_behind(
    run: Run, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With every client of sanic-testing, on every database and driver."""
    monkeypatch.setenv("SANIC_DB_URL", database_url)
    outcomes, _ = run("rollback")
    assert not outcomes.keys() & {"failed", "errors"}, outcomes
    assert outcomes["passed"] >= 14
    assert tables_of(database_url) == []


def test_failures_say_what_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as too many statements, a leak, a wait without an end, or an ended transaction."""
    monkeypatch.setenv("SANIC_DB_URL", "sqlite:///shop.db")
    outcomes, output = run("failures")
    assert (outcomes["passed"], outcomes["failed"], outcomes["errors"]) == (6, 2, 7)
    output.fnmatch_lines_random(
        [
            "3 statements, and there may be 2:",
            "  1. INSERT INTO item (name) VALUES (?)",
            "  3. SELECT item.name FROM item ORDER BY item.name    <- 2 times",
            "connections that were not given back: 1",
            "- by GET /leak, at",
            "*shop.py*in leak",
            "*POOL_TIMEOUT*in use by the transaction that began here:",
            "*test_failures.py*in test_held_up_by_its_own_transaction",
            "something has ended the test's transaction*",
            "*troubleshooting.md#one-connection-for-a-test)",
            "*troubleshooting.md#test-transaction-ended)",
            "a transaction was undone with the one around it, inside of which it began",
            "tables cannot be created once the test has begun to use the database: *",
            "*The app 'without-database' has no database.*",
            "*ConnectionRefusedError*",
        ]
    )


def test_a_database_for_each_process(
    run: Run, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is made beside the configured one, and gone at the end."""
    monkeypatch.setenv("SANIC_DB_URL", database_url)
    assert run("workers", "--numprocesses=2")[0]["passed"] == 4
    assert tables_of(database_url) == []
    if not database_url.startswith("sqlite"):
        assert not any("_pytest_gw" in name for name in databases_beside(database_url))


def test_one_server_for_all_tests(
    run: Run, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is committed outside of tests stays, and what tests commit does not."""
    monkeypatch.setenv("SANIC_DB_URL", database_url)
    assert run("server")[0]["passed"] == 3
    assert sorted(Observer(database_url).names()) == ["Always-there", "There-too"]


def test_a_server_that_is_gone_is_not_started_again(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That of a reusable client, when the next test has a client of another kind."""
    monkeypatch.setenv("SANIC_DB_URL", "sqlite:///shop.db")
    assert run("clients", timeout=60)[0]["passed"] == 2


def test_nothing_is_imported_at_the_start_of_pytest() -> None:
    """Coverage is measured from the first line of the package, and other suites lose no time."""
    script = (
        "import pytest_sanic_db_bp, sys;"
        "sys.exit(bool({'sanic', 'sqlalchemy', 'sanic_db_bp'} & sys.modules.keys()))"
    )
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)


def tables_of(database_url: str) -> list[str]:
    """The tables of a database."""
    with Observer(database_url).transaction() as connection:
        return inspect(connection).get_table_names()


def databases_beside(database_url: str) -> list[str]:
    """The databases of a server."""
    kind = make_url(database_url).get_backend_name()
    query = {"postgresql": "SELECT datname FROM pg_database", "mysql": "SHOW DATABASES"}[kind]
    with Observer(database_url).transaction() as connection:
        return list(connection.scalars(text(query)))
