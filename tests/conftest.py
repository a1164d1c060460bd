"""The fixtures that give each test a real, empty database."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import pytest
from sanic import Sanic

from tests.servers import (
    MariaDBServer,
    PostgreSQLServer,
    Server,
    ServerUnavailable,
    create_database,
    drop_database,
    server_url,
)

T = TypeVar("T")

SECOND_DRIVERS = ("postgresql-psycopg", "mariadb-aiomysql")
ABOUT_DRIVERS = (
    "test_database",
    "test_dialects",
    "test_engine",
    "test_pool",
    "test_pytest_plugin",
    "test_servers",
    "test_sql_comments",
)

DATABASES = {
    "sqlite": ("sqlite+aiosqlite", None),
    "postgresql-asyncpg": ("postgresql+asyncpg", "postgresql_server"),
    "postgresql-psycopg": ("postgresql+psycopg", "postgresql_server"),
    "mariadb-asyncmy": ("mysql+asyncmy", "mariadb_server"),
    "mariadb-aiomysql": ("mysql+aiomysql", "mariadb_server"),
}


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the second driver of a database where the driver is not what is tested.

    ``TEST_EVERY_DRIVER=1`` runs everything on every driver, in about twice the time.
    """
    if os.environ.get("TEST_EVERY_DRIVER") == "1":
        return
    left_out = [
        item
        for item in items
        if item.path.stem not in ABOUT_DRIVERS
        and any(f"[{driver}" in item.name or f"-{driver}" in item.name for driver in SECOND_DRIVERS)
    ]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


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


@pytest.fixture(params=[PostgreSQLServer, MariaDBServer])
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A server that the test may stop, kill and start again."""
    yield from or_skip(request.param())


@pytest.fixture(params=DATABASES)
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database, with its asyncio driver: the test runs once for each."""
    driver, server = DATABASES[request.param]
    if server is None:
        yield f"{driver}:///{tmp_path / 'test.db'}"
        return
    url = create_database(request.getfixturevalue(server), driver)
    yield url
    drop_database(url)


@pytest.fixture(autouse=True)
def sanic_stays_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """sanic-testing's ASGI client puts its own ``__call__`` on the class, for good."""
    monkeypatch.setattr(Sanic, "__call__", Sanic.__call__)
