"""Gives the engines of every ``Database`` the connection of the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import Connection, MetaData, event
from sqlalchemy.engine import URL
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import NullPool, Pool, QueuePool

from ...blueprint import DatabaseBlueprint
from ...database import Database
from ...exceptions import ConfigurationError
from ...registry import default_database
from .lent import LentConnection
from .link import Link
from .scratch import Provision
from .thread import LoopThread

build_engine = Database._make_engine


class Lender:
    """The connections of a test run, one for each database that its apps use.

    Args:
        provision: gives the database of the tests in place of a configured one.
        schema: called with a connection to each database that is new.
    """

    def __init__(
        self, provision: Provision, schema: Callable[[Connection], object] | None = None
    ) -> None:
        self._provision = provision
        self._schema = schema
        self._thread = LoopThread()
        self._links: dict[str, Link] = {}
        self._testing = False
        event.listen(Session, "after_begin", _note_unit_of_work)

    def close(self) -> None:
        """Close the connections and drop the databases that were made."""
        event.remove(Session, "after_begin", _note_unit_of_work)
        with ExitStack() as stack:
            stack.callback(self._thread.close)
            for link in self._links.values():
                stack.callback(self._thread.run_blocking, link.at_once(link.close))

    @contextmanager
    def lending(self) -> Iterator[None]:
        """Give every engine that is built meanwhile the connection of the test."""

        def lend(database: Database, url: URL, *, read_only: bool) -> AsyncEngine:
            return self._lend(database, url, read_only=read_only)

        async def create_missing_tables(database: Database, metadata: MetaData) -> None:
            self.create_tables(database, metadata)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Database, "_make_engine", lend)
            patch.setattr(Database, "create_missing_tables", create_missing_tables)
            yield

    @contextmanager
    def test(self) -> Iterator[None]:
        """Undo at the end all that is done meanwhile.

        Raises:
            pytest.fail.Exception: the transaction could not stand for what the app did.
        """
        _forget_stopped_servers()
        self._testing = True
        for link in self._links.values():
            link.testing = True
        try:
            yield
        finally:
            self._testing = False
            for link in self._links.values():
                self._thread.run_blocking(link.at_once(link.end_test))
        problems = [problem for link in self._links.values() for problem in link.problems]
        for link in self._links.values():
            link.problems.clear()
        if problems:
            pytest.fail("\n".join(problems), pytrace=False)

    def session(self, database: Database) -> Session:
        """Return a session for the test itself: blocking, and each statement takes effect at once.

        So it never holds up a request, however long it stays open.
        """
        engine = build_engine(database, database.url, read_only=False)
        link = self._link(database)
        connect = partial(self._connect, link, autocommit=True)
        self._attach(engine, link, NullPool(connect, dialect=engine.dialect))
        session_class: Any = database.classes["session"]
        session: Session = session_class(engine.sync_engine)
        return session

    def session_of(self, app: Sanic[Any, Any]) -> Session:
        """Return a session on the first database of an app, with its tables."""
        database = default_database(app)
        if database is None:
            raise ConfigurationError(f"The app '{app.name}' has no database.", entry="no-database")
        blueprint = app.blueprints[database.name]
        metadata = blueprint.metadata if isinstance(blueprint, DatabaseBlueprint) else None
        if metadata is not None and database.settings.create_tables:
            self.create_tables(database, metadata)
        return self.session(database)

    def create_tables(self, database: Database, metadata: MetaData) -> None:
        """Create the missing tables, for all tests."""
        link = self._link(database)
        self._thread.run_blocking(link.at_once(partial(link.create_tables, metadata)))

    def _link(self, database: Database) -> Link:
        key = database.url.render_as_string(hide_password=False)
        if key not in self._links:
            link = Link(database.settings, database.url, self._provision, self._schema)
            link.testing = self._testing
            self._links[key] = link
        return self._links[key]

    def _lend(self, database: Database, url: URL, *, read_only: bool) -> AsyncEngine:
        engine = build_engine(database, url, read_only=read_only)
        link = self._link(database)
        connect = partial(self._connect, link, autocommit=read_only, read_only=read_only)
        self._attach(engine, link, _pool_like(engine.sync_engine.pool, connect))
        return engine

    def _connect(self, link: Link, **options: bool) -> Any:
        return LentConnection(link, self._thread, **options)

    def _attach(self, engine: AsyncEngine, link: Link, pool: Pool) -> None:
        dialect: Any = engine.dialect
        self._thread.run_blocking(link.at_once(partial(link.initialize, dialect)))
        # The drivers set the level of the connection, and some with a COMMIT.
        dialect.set_isolation_level = _set_isolation_level
        dialect.get_isolation_level = partial(_isolation_level, dialect.default_isolation_level)
        # Not the pool that was there: its listeners set up a connection that is new.
        engine.sync_engine.pool = pool


def _forget_stopped_servers() -> None:
    # ReusableClient leaves its server to be started again, beside that of the next test, which
    # would then never stop.
    for app in Sanic._app_registry.values():
        app.state.server_info.clear()


def _pool_like(pool: Pool, connect: Callable[[], Any]) -> Pool:
    """A pool of the same size: who waits for a connection in production waits in the test."""
    if not isinstance(pool, QueuePool):
        return NullPool(connect, dialect=pool._dialect)
    overflow: int = pool._max_overflow
    return type(pool)(
        connect,
        pool_size=pool.size(),
        max_overflow=overflow,
        timeout=pool.timeout(),
        logging_name=pool._orig_logging_name,
        dialect=pool._dialect,
    )


def _set_isolation_level(connection: LentConnection, level: str) -> None:
    connection.autocommit = level == "AUTOCOMMIT"


def _isolation_level(default: str | None, connection: LentConnection) -> str | None:
    return "AUTOCOMMIT" if connection.autocommit else default


def _note_unit_of_work(
    session: Session, _transaction: SessionTransaction, connection: Connection
) -> None:
    lent = connection.connection.dbapi_connection
    use = session.__dict__.get("unit_of_work_use")
    if isinstance(lent, LentConnection) and use is not None:
        lent.unit = use.unit
