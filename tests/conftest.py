"""The fixtures that give each test a real, empty database."""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import pytest
from sanic import Sanic

from tests.databases import DRIVERS, SCHEMES, EmptyDatabases, drivers_of
from tests.servers import MariaDBServer, PostgreSQLServer, Server, ServerUnavailable, server_url

T = TypeVar("T")


def _or_skip(server: AbstractContextManager[T]) -> Iterator[T]:
    try:
        with server as running:
            yield running
    except ServerUnavailable as error:
        if os.environ.get("REQUIRE_DB") == "1":
            raise pytest.fail.Exception(str(error), pytrace=False) from None
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def postgresql_server() -> Iterator[str]:
    """The URL of a PostgreSQL server, one for the whole session."""
    yield from _or_skip(server_url(PostgreSQLServer))


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[str]:
    """The URL of a MariaDB server, one for the whole session."""
    yield from _or_skip(server_url(MariaDBServer))


@pytest.fixture(params=[PostgreSQLServer, MariaDBServer])
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that the test may stop, kill and start again."""
    yield from _or_skip(request.param())


@pytest.fixture(scope="session")
def postgresql_databases(postgresql_server: str) -> Iterator[EmptyDatabases]:
    """The databases on that server."""
    databases = EmptyDatabases(postgresql_server)
    yield databases
    databases.drop()


@pytest.fixture(scope="session")
def mariadb_databases(mariadb_server: str) -> Iterator[EmptyDatabases]:
    """The databases on that server."""
    databases = EmptyDatabases(mariadb_server)
    yield databases
    databases.drop()


@pytest.fixture(params=drivers_of(*DRIVERS))
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, with its asyncio driver: the test runs once for each."""
    database = request.param.partition("-")[0]
    if database == "sqlite":
        yield f"{SCHEMES[request.param]}:///{tmp_path / 'test.db'}"
        return
    databases: EmptyDatabases = request.getfixturevalue(f"{database}_databases")
    with databases.lend(SCHEMES[request.param]) as url:
        yield url


@pytest.fixture(autouse=True)
def sanic_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """sanic-testing's ASGI client puts its own ``__call__`` on the class, for good."""
    monkeypatch.setattr(Sanic, "__call__", Sanic.__call__)


@pytest.fixture(autouse=True)
def _no_app_is_kept() -> Iterator[None]:
    """Sanic keeps every app, with all that its handlers hold, which slows the collector down."""
    before = set(Sanic._app_registry)
    yield
    for name in Sanic._app_registry.keys() - before:
        del Sanic._app_registry[name]


def pytest_collection_finish() -> None:
    """Let no garbage collection look through the modules, which takes longer than most tests."""
    gc.collect()
    gc.freeze()
