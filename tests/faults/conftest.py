"""A database and a served app for each driver, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager

import pytest
import pytest_asyncio

from tests.faults.databases import DRIVERS, SERVERS, Target, database_file, database_on
from tests.faults.serving import Served, served

APPS = (
    "sqlite-native",
    "asyncpg-native",
    "psycopg-native",
    "asyncmy-native",
    "sqlite-asgi",
    "asyncpg-asgi",
)


@contextmanager
def _target(
    driver: str, request: pytest.FixtureRequest, folders: pytest.TempPathFactory
) -> Iterator[Target]:
    if driver not in SERVERS:
        yield database_file(folders.mktemp("faults"))
        return
    with database_on(request.getfixturevalue(SERVERS[driver]), driver) as target:
        yield target


@pytest.fixture(params=DRIVERS)
def target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """An empty database with a user of its own: the test runs once for each driver."""
    with _target(request.param, request, tmp_path_factory) as made:
        yield made


@pytest.fixture(scope="module", params=DRIVERS)
def shared_target(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Target]:
    """The same, for all tests of a module: they tell their rows by their names."""
    with _target(request.param, request, tmp_path_factory) as made:
        yield made


@pytest_asyncio.fixture(scope="session", loop_scope="session", params=APPS)
async def app(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Served]:
    """The app on a pool of 5 with all its faults, natively and under ASGI; one for all tests."""
    driver, way = request.param.split("-")
    with _target(driver, request, tmp_path_factory) as target:
        async with served(
            target,
            way,
            app="tests.faults.faulty_app:app",
            db_pool_size=5,
            db_pool_timeout=5,
            response_timeout=4,
            request_max_size=6_000_000,
            tracebacks=True,
        ) as server:
            yield Served(server, target)
