"""SQLite: one writer at a time, readers beside it, and statements that can be interrupted."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import suppress
from contextvars import Context
from typing import TYPE_CHECKING, Any

from sqlalchemy import event
from sqlalchemy.engine import URL

from ..bridge import uncancelled
from .base import Backend, Driver, execute_each

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from ..settings import DatabaseSettings

CLOSE_WITHIN = 5.0
"""Seconds that a connection which is thrown away may take after its task was cancelled."""

INTERRUPT_AFTER = 0.05
"""Seconds after which a statement whose client is gone is interrupted."""


class SQLite(Backend):
    """SQLite through aiosqlite: one writer at a time, readers beside it."""

    name = "sqlite"
    spellings = frozenset({"sqlite"})
    drivers = (Driver("aiosqlite", "sqlite"),)
    one_writer = True

    _BUSY, _LOCKED = 5, 6

    def connect_args(
        self, url: URL, settings: DatabaseSettings, *, read_only: bool
    ) -> tuple[URL, dict[str, Any]]:
        return url, {"timeout": 30}

    def prepare(self, engine: Engine, settings: DatabaseSettings, *, read_only: bool) -> None:
        pragmas = ["PRAGMA foreign_keys = ON"]
        pragmas += (
            ["PRAGMA query_only = ON"]
            if read_only
            else ["PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL"]
        )

        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: Any, _record: object) -> None:
            execute_each(dbapi_connection, pragmas)

        dialect: Any = engine.dialect
        _name_the_file(dialect, str(engine.url.database))
        # A close that is cut off is begun again, behind the end of its thread: it would never end.
        dialect.do_terminate = uncancelled(dialect.do_terminate, within=CLOSE_WITHIN)

        @event.listens_for(engine, "invalidate")
        def let_go(dbapi_connection: Any, _record: object, _error: object) -> None:
            _end_at_once(dbapi_connection.driver_connection)

        def begin(dbapi_connection: Any) -> None:
            # Plain BEGIN fails at the first write after a read, whatever the timeout.
            if not dialect.detect_autocommit_setting(dbapi_connection):
                execute_each(dbapi_connection, ["BEGIN IMMEDIATE"])

        if not read_only:
            # Not an event: a connection on which its listener has failed never begins one again.
            dialect.do_begin = begin

    def is_closed(self, driver_connection: Any) -> bool:
        return not driver_connection._running

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        code = getattr(driver_error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in {self._BUSY, self._LOCKED}

    def may_end_transaction(self, connection: Connection, driver_error: BaseException) -> bool:
        if not isinstance(driver_error, sqlite3.Error):
            return False
        raw: Any = connection.connection
        if raw.driver_connection.in_transaction:
            return False
        # A full disk, for one, ends the transaction: each statement that follows would be stored
        # by itself.
        execute_each(raw, ["BEGIN"])
        return True


def _name_the_file(dialect: Any, file: str) -> None:
    """Have a failure to open the file say which one it is, and what is wrong with it."""
    connect = dialect.connect

    def connect_or_tell(*args: Any, **arguments: Any) -> Any:
        try:
            return connect(*args, **arguments)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_CANTOPEN or file.startswith("file:"):
                raise
            path = os.path.abspath(file)
            folder = os.path.dirname(path)
            cause = "it, or its folder, may not be used by this user. Give it the rights"
            if not os.path.isdir(folder):
                cause = f"there is no folder '{folder}'. Create it"
            elif os.path.isdir(path):
                cause = "it is a folder. Add the name of a file"
            raise sqlite3.OperationalError(
                f"'{path}' cannot be opened: {cause}, or let the URL name another file"
            ) from error

    dialect.connect = connect_or_tell


def _end_at_once(connection: Any) -> None:
    """End the statement and the transaction of an aiosqlite connection that is thrown away.

    A statement that was cut off would go on in its thread, and keep its locks past the close.
    """
    raw = connection._connection
    if raw is None:
        return
    begun = asyncio.Event()

    def roll_back() -> None:
        begun.set()
        raw.rollback()

    def interrupt() -> None:
        # Not at once: a statement that has a row already would make the ROLLBACK fail, too.
        if not begun.is_set():
            raw.interrupt()

    connection._tx.put_nowait((None, roll_back))
    with suppress(RuntimeError):
        # In an empty context: the request that the caller serves must not be kept meanwhile.
        asyncio.get_running_loop().call_later(INTERRUPT_AFTER, interrupt, context=Context())
