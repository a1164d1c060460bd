"""The databases of the fault suite, each with a user of its own whose password nobody may see."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import make_url

from tests.servers import create_database, drop_database
from tests.shop import Observer

SECRET = "pa55-that-n0body-sees"

DRIVERS = {
    "sqlite": "sqlite+aiosqlite",
    "asyncpg": "postgresql+asyncpg",
    "psycopg": "postgresql+psycopg",
    "asyncmy": "mysql+asyncmy",
}
SERVERS = {
    "asyncpg": "postgresql_server",
    "psycopg": "postgresql_server",
    "asyncmy": "mariadb_server",
}


@dataclass(frozen=True)
class Target:
    """A database as the app sees it, and as the tests see it.

    Args:
        url: for the app, with a user of its own and the password ``SECRET``.
        observer: another client, with a user of its own.
    """

    url: str
    observer: Observer

    @property
    def is_file(self) -> bool:
        """Whether it is SQLite."""
        return self.observer.kind == "sqlite"


@contextmanager
def database_on(server: str, driver: str) -> Iterator[Target]:
    """Create a database and its user on a server, and drop both at the end.

    Args:
        server: the server's URL.
        driver: the app's driver, one of ``DRIVERS``.
    """
    owned = create_database(server, DRIVERS[driver])
    observer = Observer(owned)
    user = make_url(owned).database
    for statement in _CREATE_USER[observer.kind]:
        observer.run(statement.format(user, SECRET))
    try:
        url = make_url(owned).set(username=user, password=SECRET)
        yield Target(url.render_as_string(hide_password=False), observer)
    finally:
        drop_database(owned)
        elsewhere = make_url(server).set(drivername=DRIVERS[driver])
        Observer(elsewhere.render_as_string(hide_password=False)).run(f"DROP USER {user}")


_CREATE_USER = {
    "postgresql": (
        "CREATE USER {0} PASSWORD '{1}'",
        "ALTER DATABASE {0} OWNER TO {0}",
    ),
    "mysql": (
        "CREATE USER {0} IDENTIFIED BY '{1}'",
        "GRANT ALL ON {0}.* TO {0}",
    ),
}


def database_file(folder: Path) -> Target:
    """Return a SQLite database in a folder."""
    url = f"{DRIVERS['sqlite']}:///{folder / 'faults.db'}"
    return Target(url, Observer(url))
