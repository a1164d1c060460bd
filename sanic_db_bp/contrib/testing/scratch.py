"""A fresh database for each process of a test run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from sqlalchemy import Connection
from sqlalchemy.engine import URL
from sqlalchemy.pool import NullPool

from ...engine import make_engine
from ...settings import DatabaseSettings

Provision = Callable[[URL], AbstractContextManager[URL]]
"""Gives the URL of the database that the tests use in place of the configured one."""

MAINTENANCE = {"postgresql": "postgres", "mysql": ""}
"""The database to connect to while another one is created or dropped."""

LONGEST_NAME = 63


@contextmanager
def scratch_database(url: URL, *, suffix: str, folder: Path) -> Iterator[URL]:
    """Create an empty database beside the configured one; it is dropped at the end.

    Args:
        url: the configured database, which need not exist and is not touched.
        suffix: what its name has more, such as ``pytest_gw0``. One that was left over by an
            earlier run is dropped first.
        folder: where the file is, if it is SQLite.

    Runs in the bridge.
    """
    if url.get_backend_name() == "sqlite":
        yield url.set(database=str(folder / f"{suffix}.db"))
        return
    base = (url.database or "test")[: LONGEST_NAME - len(suffix) - 1]
    scratch = url.set(database=f"{base}_{suffix}")
    with _server(url) as server:
        _drop(server, scratch)
        server.exec_driver_sql(f"CREATE DATABASE {_name(server, scratch)}")
    yield scratch
    with _server(url) as server:
        _drop(server, scratch)


@contextmanager
def _server(url: URL) -> Iterator[Connection]:
    maintenance = url.set(database=MAINTENANCE[url.get_backend_name()])
    options = {"poolclass": NullPool, "isolation_level": "AUTOCOMMIT"}
    engine = make_engine(DatabaseSettings(engine_options=options), maintenance, name="tests")
    with engine.sync_engine.connect() as connection:
        yield connection


def _drop(server: Connection, url: URL) -> None:
    # Whoever is still connected to it is left over, too.
    force = " WITH (FORCE)" if url.get_backend_name() == "postgresql" else ""
    server.exec_driver_sql(f"DROP DATABASE IF EXISTS {_name(server, url)}{force}")


def _name(server: Connection, url: URL) -> str:
    return server.dialect.identifier_preparer.quote_identifier(str(url.database))
