"""The pytest plugin of sanic-db-bp: tests that may commit, and leave nothing behind.

It stands outside of the package, and imports it when one of its fixtures is first used: pytest
loads it at its start, before coverage is measured, and in suites that do not need it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from sqlalchemy import Connection
    from sqlalchemy.orm import Session

    from sanic_db_bp.contrib.testing import Lender, Provision, QueryLog


@pytest.fixture(scope="session")
def sanic_db_provision(tmp_path_factory: pytest.TempPathFactory) -> Provision:
    """Which database the tests use: by default a new one beside each that is configured.

    Override it to return a function that takes the configured URL and returns a context manager
    that gives the URL to use.
    """
    from sanic_db_bp.contrib.testing import scratch_database

    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    return partial(
        scratch_database, suffix=f"pytest_{worker}", folder=tmp_path_factory.mktemp("sanic_db")
    )


@pytest.fixture(scope="session")
def sanic_db_schema() -> Callable[[Connection], object] | None:
    """How a new database gets its tables, if not by the setting ``CREATE_TABLES``.

    Override it to return a function that takes a plain SQLAlchemy connection.
    """
    return None


@pytest.fixture(scope="session")
def _sanic_db_lender(
    sanic_db_provision: Provision, sanic_db_schema: Callable[[Connection], object] | None
) -> Iterator[Lender]:
    from sanic_db_bp.contrib.testing import Lender

    lender = Lender(sanic_db_provision, sanic_db_schema)
    yield lender
    lender.close()


@pytest.fixture(scope="session")
def sanic_db_for_session(_sanic_db_lender: Lender) -> Iterator[None]:
    """Give every app that starts from now on the database of the tests.

    For a server that is started once for several tests; each test still asks for ``sanic_db``.
    What is committed outside of a test is there for all of them.
    """
    with _sanic_db_lender.lending():
        yield


@pytest.fixture
def sanic_db(_sanic_db_lender: Lender) -> Iterator[None]:
    """Undo at the end of the test what it has done to the databases, commits included."""
    with _sanic_db_lender.lending(), _sanic_db_lender.test():
        yield


@pytest.fixture
def sanic_db_session(sanic_db: None, _sanic_db_lender: Lender, app: Any) -> Iterator[Session]:
    """A plain session of the test itself, on the first database of the fixture ``app``.

    It blocks, in asynchronous tests too, and each of its statements takes effect at once.
    """
    session = _sanic_db_lender.session_of(app)
    yield session
    session.close()


@pytest.fixture
def assert_max_queries() -> Callable[[int], AbstractContextManager[QueryLog]]:
    """``with assert_max_queries(3):`` fails if the block runs more statements, and shows them."""
    from sanic_db_bp.contrib.testing import max_queries

    return max_queries


@pytest.fixture
def assert_no_leaked_connections() -> Iterator[None]:
    """Fail the test if it has not given back a connection."""
    from sanic_db_bp.contrib.testing import no_leaked_connections

    with no_leaked_connections():
        yield
