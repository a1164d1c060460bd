"""A database and a served app for each driver, shared by the tests of a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.faults.databases import DRIVERS, SERVERS, Target, database_file, database_on


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
