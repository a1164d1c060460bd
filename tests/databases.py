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


def drivers_of(*databases: str, every_driver: bool = False) -> list[str]:
    """Give the drivers to test databases with: the first of each, or all of them.

    ``TEST_EVERY_DRIVER=1`` asks for all of them everywhere, which takes about twice the time.
    """
    every_driver = every_driver or os.environ.get("TEST_EVERY_DRIVER") == "1"
    return [name for each in databases for name in list(DRIVERS[each])[: None if every_driver else 1]]


def on(*databases: str, every_driver: bool = False) -> pytest.MarkDecorator:
    """Run a test on these databases alone."""
    drivers = drivers_of(*databases, every_driver=every_driver)
    return pytest.mark.parametrize("database_url", drivers, indirect=True)


on_sqlite = on("sqlite")
on_postgresql = on("postgresql")
on_mariadb = on("mariadb")
on_servers = on("postgresql", "mariadb")
on_every_driver = on(*DRIVERS, every_driver=True)
on_every_driver_of_postgresql = on("postgresql", every_driver=True)
on_every_driver_of_mariadb = on("mariadb", every_driver=True)
on_every_driver_of_servers = on("postgresql", "mariadb", every_driver=True)


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
