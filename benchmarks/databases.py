"""The databases of a run, with their rows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.servers import PostgreSQLServer, create_database, drop_database, server_url

from .models import create_rows
from .proxy import proxied
from .workloads import Where

ONE_WAY = 0.0005
"""Seconds from the app to the database that is far away; a round trip takes twice as long."""


class Databases:
    """Opens each database when it is first asked for, and all until the `with` block ends."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._urls: dict[Where, str] = {}

    def url(self, where: Where) -> str:
        """Give the URL of a database, with its asyncio driver."""
        if where not in self._urls:
            self._urls[where] = self._open(where)
        return self._urls[where]

    def _open(self, where: Where) -> str:
        if where == "far":
            line = proxied(self.url("postgresql"), delay=ONE_WAY)
            return self._stack.enter_context(line).url
        opened = postgresql() if where == "postgresql" else sqlite()
        return self._stack.enter_context(opened)


@contextmanager
def databases() -> Iterator[Databases]:
    """Give the databases of a run."""
    with ExitStack() as stack:
        yield Databases(stack)


@contextmanager
def postgresql() -> Iterator[str]:
    """Give a database on the server of TEST_POSTGRESQL_URL, or on one of our own."""
    with server_url(PostgreSQLServer) as server:
        url = create_database(server, "postgresql+asyncpg")
        try:
            asyncio.run(create_rows(url))
            yield url
        finally:
            drop_database(url)


@contextmanager
def sqlite() -> Iterator[str]:
    """Give a SQLite file."""
    with TemporaryDirectory() as folder:
        url = f"sqlite+aiosqlite:///{Path(folder) / 'benchmark.db'}"
        asyncio.run(create_rows(url))
        yield url
