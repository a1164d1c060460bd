"""The databases of the suite: which a test runs on, and how it gets an empty one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from sqlalchemy import make_url

from tests.servers import create_database, drop_database, empty_database

DRIVERS = {
    "sqlite": {"sqlite": "sqlite+aiosqlite"},
    "postgresql": {
        "postgresql-asyncpg": "postgresql+asyncpg",
        "postgresql-psycopg": "postgresql+psycopg",
    },
    "mariadb": {"mariadb-asyncmy": "mysql+asyncmy", "mariadb-aiomysql": "mysql+aiomysql"},
}

SCHEMES = {name: scheme for drivers in DRIVERS.values() for name, scheme in drivers.items()}


EVERY_DRIVER = os.environ.get("TEST_EVERY_DRIVER") == "1"
"""Whether all tests run with each driver of their databases, in about twice the time."""

on = pytest.mark.databases
"""The databases of a test, or of a module: each if there is none; with ``every_driver=True`` also
the second driver of each."""

on_all = on(*DRIVERS)
on_sqlite = on("sqlite")
on_postgresql = on("postgresql")
on_servers = on("postgresql", "mariadb")
on_every_driver = on(*DRIVERS, every_driver=True)
on_every_driver_of_servers = on("postgresql", "mariadb", every_driver=True)


def drivers_for(test: pytest.Item) -> list[str]:
    """Give the drivers with which a test runs."""
    mark = test.get_closest_marker("databases") or on_all.mark
    many = EVERY_DRIVER or mark.kwargs.get("every_driver", False)
    return [name for each in mark.args for name in list(DRIVERS[each])[: None if many else 1]]


class EmptyDatabases:
    """Lends empty databases on a server; each is emptied after a test and lent again.

    Making and dropping one takes ten times as long.

    Args:
        server: the URL of the server.
    """

    def __init__(self, server: str) -> None:
        self._server = server
        self._free: list[str] = []

    @contextmanager
    def lend(self, driver: str) -> Iterator[str]:
        """Give the URL of an empty database, with this driver."""
        url = self._free.pop() if self._free else create_database(self._server, driver)
        yield make_url(url).set(drivername=driver).render_as_string(hide_password=False)
        empty_database(url)
        self._free.append(url)

    def drop(self) -> None:
        """Drop the databases that are not lent."""
        while self._free:
            drop_database(self._free.pop())
