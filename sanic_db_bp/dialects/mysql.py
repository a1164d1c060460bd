"""MariaDB and MySQL: session variables for timeouts, TLS, and the end of cancelled statements."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context
from ssl import SSLError
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.engine import URL

from ..bridge import run_in_bridge
from ..exceptions import DatabaseUnavailable
from .base import CONNECT_TIMEOUT, DDL_LOCK, Backend, Driver, execute_each, in_milliseconds
from .tls import split_tls, tls_context

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Engine

    from ..settings import DatabaseSettings

logger = logging.getLogger("sanic.root.db")

DDL_LOCK_WITHIN = 60
"""Seconds that a server waits for another one that creates tables."""

KILL_WITHIN = 5.0
"""Seconds that the server has to end a statement whose client is gone."""


class MySQL(Backend):
    """MariaDB and MySQL through asyncmy or aiomysql."""

    name = "mysql"
    spellings = frozenset({"mysql", "mariadb"})
    drivers = (Driver("asyncmy", "mysql"), Driver("aiomysql", "aiomysql"))
    connection_limit = """
        SELECT least(@@max_connections, coalesce(nullif(@@max_user_connections, 0), 1000000))
        """

    _DEADLOCK, _LOCK_WAIT_TIMEOUT, _RECORD_HAS_CHANGED = 1213, 1205, 1020
    _LOCK_TABLE_FULL = 1206

    def check(self, url: URL) -> None:
        tls_context(split_tls(url.query)[0])

    def connect_args(
        self, url: URL, settings: DatabaseSettings, *, read_only: bool
    ) -> tuple[URL, dict[str, Any]]:
        tls, query = split_tls(url.query)
        defaults = {"connect_timeout": CONNECT_TIMEOUT, "charset": "utf8mb4"}
        arguments: dict[str, Any] = {k: v for k, v in defaults.items() if k not in query}
        if context := tls_context(tls):
            arguments["ssl"] = context
        return url.set(query=query), arguments

    def prepare(self, engine: Engine, settings: DatabaseSettings, *, read_only: bool) -> None:
        statements = list(self._session_statements(settings, read_only=read_only))

        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: Any, _record: object) -> None:
            execute_each(dbapi_connection, statements)

        _insist_on_tls(engine.dialect)
        _kill_cancelled_statements(engine)

    def _session_statements(self, settings: DatabaseSettings, *, read_only: bool) -> Iterator[str]:
        # Each server runs the comments that are written for it: /*M! MariaDB, /*!80000 MySQL 8.
        limits = ""
        if seconds := settings.statement_timeout:
            limits += (
                f" /*M!100101 , max_statement_time = {seconds:f} */"
                f"/*!80000 , max_execution_time = {in_milliseconds(seconds)} */"
            )
        if seconds := settings.idle_in_transaction_timeout:
            limits += f" /*M!100303 , idle_transaction_timeout = {max(1, round(seconds))} */"
        if limits:
            # One round trip for them all.
            yield "SET SESSION sql_mode = @@SESSION.sql_mode" + limits
        if read_only:
            yield "SET SESSION TRANSACTION READ ONLY"

    def is_closed(self, driver_connection: Any) -> bool:
        # Neither driver tells; their streams know once the event loop has read the end.
        if hasattr(driver_connection, "_proto"):
            return bool(driver_connection._proto.eof)
        reader = driver_connection._reader
        # An idle server only speaks to say that it is going away.
        return reader is None or bool(reader.exception() or reader._eof or reader._buffer)

    @contextmanager
    def ddl_lock(self, connection: Connection) -> Iterator[None]:
        lock = {"lock": f"sanic-db-bp-{DDL_LOCK}"}
        within = {"within": DDL_LOCK_WITHIN}
        if not connection.scalar(text("SELECT GET_LOCK(:lock, :within)"), lock | within):
            raise DatabaseUnavailable(
                "db", f"another server has been creating tables for {DDL_LOCK_WITHIN} s"
            )
        try:
            yield
        finally:
            connection.execute(text("SELECT RELEASE_LOCK(:lock)"), lock)

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        number = driver_error.args[0] if driver_error.args else None
        return number in {self._DEADLOCK, self._LOCK_WAIT_TIMEOUT, self._RECORD_HAS_CHANGED}

    def may_end_transaction(self, connection: Connection, driver_error: BaseException) -> bool:
        # The next statement begins another transaction, as if nothing had been.
        number = driver_error.args[0] if driver_error.args else None
        return number in {self._DEADLOCK, self._RECORD_HAS_CHANGED, self._LOCK_TABLE_FULL}


def _insist_on_tls(dialect: Any) -> None:
    """Fail where the drivers would go on in the clear because the server offers no TLS."""
    connect = dialect.connect

    def connect_in_secret(*args: Any, **arguments: Any) -> Any:
        try:
            connection = connect(*args, **arguments)
        except Exception as error:
            if isinstance(error.__cause__, SSLError):
                # aiomysql only says that it could not connect.
                raise error.__cause__ from None
            raise
        if arguments.get("ssl") and not connection.driver_connection._secure:
            dialect.do_terminate(connection)
            raise ConnectionError("the server offers no TLS, and sslmode asks for it")
        return connection

    dialect.connect = connect_in_secret


def _kill_cancelled_statements(engine: Engine) -> None:
    """The server goes on with a statement whose client is gone, and with its locks."""
    ways: list[tuple[Any, Any]] = []
    # Our own pool waits for them when it is disposed; a user's may be of another class.
    tasks: set[asyncio.Task[None]] = getattr(engine.pool, "under_way", set())

    @event.listens_for(engine, "do_connect")
    def remember(_dialect: object, _record: object, args: Any, arguments: Any) -> None:
        ways[:] = [(args, arguments)]

    @event.listens_for(engine, "invalidate")
    def kill(dbapi_connection: Any, _record: object, error: object) -> None:
        if isinstance(error, asyncio.CancelledError):
            number = dbapi_connection.driver_connection.thread_id()
            loop = asyncio.get_running_loop()
            # The context of the request would keep the request, with its body, in memory.
            task = loop.create_task(_kill(engine.dialect, ways[0], number), context=Context())
            tasks.add(task)
            task.add_done_callback(tasks.discard, context=Context())


async def _kill(dialect: Dialect, way: tuple[Any, Any], number: int) -> None:
    def kill() -> None:
        # Not of the pool, which may be full of those who wait for the statement's locks.
        connection: Any = dialect.connect(*way[0], **way[1])
        try:
            connection.cursor().execute(f"KILL {number}")
        finally:
            dialect.do_terminate(connection)

    try:
        await asyncio.wait_for(run_in_bridge(kill), KILL_WITHIN)
    except Exception as error:
        logger.info("KILL %d: %s", number, str(error) or type(error).__name__)
