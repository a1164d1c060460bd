"""The fixtures that give each test a real, empty database."""

import gc
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import pytest
from sanic import Sanic
from sanic.config import Config
from sanic.router import Router
from sanic.touchup.service import TouchUp
from sanic_ext.extensions.openapi.builders import OperationStore, SpecificationBuilder

from tests.databases import SCHEMES, EmptyDatabases, drivers_for
from tests.forkserver import fork_server
from tests.servers import MariaDBServer, PostgreSQLServer, Server, ServerUnavailable, server_url

T = TypeVar("T")


def or_skip(server: AbstractContextManager[T]) -> Iterator[T]:
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
    yield from or_skip(server_url(PostgreSQLServer))


@pytest.fixture(scope="session")
def mariadb_server() -> Iterator[str]:
    """The URL of a MariaDB server, one for the whole session."""
    yield from or_skip(server_url(MariaDBServer))


@pytest.fixture(scope="session")
def _own_postgresql_server() -> Iterator[Server]:
    yield from or_skip(PostgreSQLServer())


@pytest.fixture(scope="session")
def _own_mariadb_server() -> Iterator[Server]:
    yield from or_skip(MariaDBServer())


@pytest.fixture(params=["postgresql", "mariadb"])
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that the test may stop, kill and start again."""
    server: Server = request.getfixturevalue(f"_own_{request.param}_server")
    yield server
    server.start()


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


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run a test on each of its databases."""
    chosen = {mark.args[0] for mark in metafunc.definition.iter_markers("parametrize")}
    if "database_url" in metafunc.fixturenames and not any("database_url" in c for c in chosen):
        metafunc.parametrize("database_url", drivers_for(metafunc.definition), indirect=True)


@pytest.fixture
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, with its asyncio driver."""
    database = request.param.partition("-")[0]
    if database == "sqlite":
        yield f"{SCHEMES[request.param]}:///{tmp_path / 'test.db'}"
        return
    databases: EmptyDatabases = request.getfixturevalue(f"{database}_databases")
    with databases.lend(SCHEMES[request.param]) as url:
        yield url


@pytest.fixture(autouse=True)
def sanic_stays_itself(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What a test leaves on the classes ends with it: its apps and sanic-testing's ``__call__``."""
    # Sanic's own filter, of which each config makes one, comes before those of pytest.
    monkeypatch.setattr(Config, "_configure_warnings", lambda _: None)
    # An app may have no routes, and be served again.
    monkeypatch.setattr(Sanic, "test_mode", True)
    monkeypatch.setattr(Sanic, "_app_registry", {})
    monkeypatch.setattr(Sanic, "__call__", Sanic.__call__)
    # Where sanic-ext keeps the handlers of all apps, and so the apps.
    monkeypatch.setattr(OperationStore, "_singleton", None)
    monkeypatch.setattr(SpecificationBuilder, "_singleton", None)
    # A start leaves the signals out of Sanic's own code that its app does not handle.
    for target, method in TouchUp._registry:
        monkeypatch.setattr(target, method, getattr(target, method))
    yield
    Router.get.cache_clear()
    Router.find_route_by_view_name.cache_clear()


@pytest.fixture(scope="session", autouse=True)
def _fork_server_ends() -> Iterator[None]:
    yield
    if fork_server.cache_info().currsize:
        fork_server().stop()


def pytest_collection_finish() -> None:
    """Let no garbage collection look through the modules, which takes longer than most tests."""
    gc.collect()
    gc.freeze()
