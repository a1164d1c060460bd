"""What each database needs: its driver, connect arguments, pragmas, read-only mode, timeouts."""

from __future__ import annotations

import asyncio
import logging
import re
import select
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from contextvars import Context
from dataclasses import dataclass
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy import event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError

from .bridge import run_in_bridge
from .exceptions import ConfigurationError, DatabaseUnavailable

if TYPE_CHECKING:
    from sqlalchemy import Connection, Dialect, Engine

    from .settings import DatabaseSettings

logger = logging.getLogger("sanic.root.db")

CONNECT_TIMEOUT = 10
"""Seconds that one attempt to connect may take, where the URL does not say otherwise."""

READ_ONLY = ("default_transaction_read_only",)
"""The parameters of PostgreSQL that keep a connection from writing."""

KILL_WITHIN = 5.0
"""Seconds that MariaDB has to end a statement whose client is gone."""

INTERRUPT_AFTER = 0.05
"""Seconds after which a statement of SQLite whose client is gone is interrupted."""

DDL_LOCK = 0x5A41_4E1C
"""The number of the lock under which tables are created, one server at a time."""


@dataclass(frozen=True)
class Driver:
    """An asyncio driver: its name in a URL, the module it is, the extra that installs it."""

    name: str
    extra: str

    @property
    def installed(self) -> bool:
        """Whether the driver's package can be imported."""
        return find_spec(self.name) is not None


class Backend:
    """One kind of database, as SQLAlchemy's URLs call it."""

    name: ClassVar[str]
    spellings: ClassVar[frozenset[str]]
    drivers: ClassVar[tuple[Driver, ...]]
    one_writer: ClassVar[bool] = False
    """Whether one connection writes, and everybody else waits for it."""

    def resolve(self, url: URL) -> URL:
        """Return the URL with the asyncio driver to use.

        Raises:
            ConfigurationError: the driver is missing, is unknown, or would block the event loop.
        """
        _, _, asked_for = url.drivername.partition("+")
        driver = self._chosen(asked_for) if asked_for else self._first_installed()
        return url.set(drivername=f"{self.name}+{driver.name}")

    def _first_installed(self) -> Driver:
        for driver in self.drivers:
            if driver.installed:
                return driver
        raise self._missing(self.drivers[0])

    def _chosen(self, name: str) -> Driver:
        for driver in self.drivers:
            if driver.name == name:
                if not driver.installed:
                    raise self._missing(driver)
                return driver
        usable = " or ".join(f"'{self.name}+{driver.name}'" for driver in self.drivers)
        raise ConfigurationError(
            f"the driver '{name}' is not an asyncio driver for {self.name}: it would block the "
            f"event loop. Write {usable}, or leave the driver out"
        )

    def _missing(self, driver: Driver) -> ConfigurationError:
        return ConfigurationError(
            f"the driver '{driver.name}' is not installed. Install it with: "
            f"pip install 'sanic-db-bp[{driver.extra}]'"
        )

    def connect_args(
        self, url: URL, settings: DatabaseSettings, *, read_only: bool
    ) -> tuple[URL, dict[str, Any]]:
        """Return the URL and the driver's keyword arguments that carry out the settings."""
        raise NotImplementedError

    def engine_options(self, settings: DatabaseSettings, *, read_only: bool) -> dict[str, Any]:
        """Return what ``create_async_engine`` has to be told for this database alone."""
        return {}

    def with_users(self, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        """Return the connect arguments together with those of ``CONNECT_ARGS``, which win."""
        return {**ours, **theirs}

    def prepare(self, engine: Engine, settings: DatabaseSettings, *, read_only: bool) -> None:
        """Register the listeners that set up each connection and each transaction."""

    def is_closed(self, driver_connection: Any) -> bool:
        """Whether an idle connection is known to be dead, without asking the server."""
        raise NotImplementedError

    @contextmanager
    def ddl_lock(self, connection: Connection) -> Iterator[None]:
        """Hold off every other server that creates tables, for the length of the block."""
        yield

    def is_retryable(self, error: BaseException) -> bool:
        """Whether a transaction failed only because of another, and would succeed if run again."""
        driver_error = error.orig if isinstance(error, DBAPIError) else None
        return driver_error is not None and self._lost_a_race(driver_error)

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        raise NotImplementedError

    def may_end_transaction(self, driver_error: BaseException) -> bool:
        """Whether a statement that failed so may have ended its transaction without a word."""
        return True

    def is_whole(self, connection: Connection) -> bool:
        """Whether COMMIT would keep all that was done since BEGIN; asked after such a failure."""
        raise NotImplementedError


class PostgreSQL(Backend):
    """PostgreSQL through asyncpg or psycopg 3."""

    name = "postgresql"
    spellings = frozenset({"postgres", "postgresql"})
    drivers = (Driver("asyncpg", "postgresql"), Driver("psycopg", "psycopg"))

    _TLS = frozenset(
        {
            "sslmode",
            "sslcert",
            "sslkey",
            "sslpassword",
            "sslrootcert",
            "sslcrl",
            "ssl_min_protocol_version",
            "ssl_max_protocol_version",
            "sslnegotiation",
            "passfile",
        }
    )

    _LIBPQ_ONLY = frozenset(
        {
            "channel_binding",
            "gssencmode",
            "keepalives",
            "keepalives_idle",
            "keepalives_interval",
            "keepalives_count",
            "tcp_user_timeout",
        }
    )

    def connect_args(
        self, url: URL, settings: DatabaseSettings, *, read_only: bool
    ) -> tuple[URL, dict[str, Any]]:
        parameters = self._server_parameters(settings, read_only=read_only)
        if url.drivername.endswith("+asyncpg"):
            return self._asyncpg(url, parameters, settings)
        return self._psycopg(url, parameters, settings)

    def _server_parameters(self, settings: DatabaseSettings, *, read_only: bool) -> dict[str, str]:
        if settings.pgbouncer:
            return {}
        parameters = {}
        if settings.statement_timeout:
            parameters["statement_timeout"] = _milliseconds(settings.statement_timeout)
        if settings.idle_in_transaction_timeout:
            parameters["idle_in_transaction_session_timeout"] = _milliseconds(
                settings.idle_in_transaction_timeout
            )
        if read_only:
            parameters.update(dict.fromkeys(READ_ONLY, "on"))
        return parameters

    def _asyncpg(
        self, url: URL, parameters: dict[str, str], settings: DatabaseSettings
    ) -> tuple[URL, dict[str, Any]]:
        query = {name: value for name, value in url.query.items() if name not in self._LIBPQ_ONLY}
        arguments: dict[str, Any] = {
            "timeout": float(_one(query.pop("connect_timeout", CONNECT_TIMEOUT)))
        }
        if "application_name" in query:
            parameters["application_name"] = str(_one(query.pop("application_name")))
        if "options" in query:
            asked_for = re.findall(r"-c\s*([\w.]+)=(\S+)", str(_one(query.pop("options"))))
            parameters = {**dict(asked_for), **parameters}
        tls = {name: _one(query.pop(name)) for name in sorted(self._TLS & query.keys())}
        if tls:
            # asyncpg reads libpq's own names from a DSN, with libpq's meaning.
            arguments["dsn"] = URL.create("postgresql", query=tls).render_as_string()
        if parameters:
            arguments["server_settings"] = parameters
        if settings.pgbouncer:
            arguments["statement_cache_size"] = 0
        return url.set(query=query), arguments

    def _psycopg(
        self, url: URL, parameters: dict[str, str], settings: DatabaseSettings
    ) -> tuple[URL, dict[str, Any]]:
        arguments: dict[str, Any] = {
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "connect_timeout": CONNECT_TIMEOUT,
        }
        arguments = {name: value for name, value in arguments.items() if name not in url.query}
        options = " ".join(f"-c {name}={value}" for name, value in parameters.items())
        if options:
            asked_for = _one(url.query.get("options", ""))
            arguments["options"] = f"{asked_for} {options}".strip()
            url = url.difference_update_query(["options"])
        if settings.pgbouncer:
            arguments["prepare_threshold"] = None
        return url, arguments

    def engine_options(self, settings: DatabaseSettings, *, read_only: bool) -> dict[str, Any]:
        if read_only and settings.pgbouncer:
            # Behind a transaction pooler nothing may be set for a whole connection.
            return {"execution_options": {"postgresql_readonly": True}}
        return {}

    def with_users(self, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        merged = super().with_users(ours, theirs)
        if "server_settings" in theirs:
            read_only = {k: v for k, v in ours.get("server_settings", {}).items() if k in READ_ONLY}
            merged["server_settings"] = {
                **ours.get("server_settings", {}),
                **theirs["server_settings"],
                **read_only,
            }
        if "options" in theirs:
            # The last one wins: theirs over the timeouts, but nothing over reading alone.
            left = str(ours.get("options", ""))
            read_only_options = " ".join(f"-c {name}=on" for name in READ_ONLY if name in left)
            merged["options"] = f"{left} {theirs['options']} {read_only_options}".strip()
        return merged

    def is_closed(self, driver_connection: Any) -> bool:
        if hasattr(driver_connection, "is_closed"):
            return bool(driver_connection.is_closed())
        return bool(driver_connection.closed) or _has_unread_input(driver_connection.fileno())

    @contextmanager
    def ddl_lock(self, connection: Connection) -> Iterator[None]:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": DDL_LOCK})
        yield

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        return getattr(driver_error, "sqlstate", None) in {"40001", "40P01"}

    def is_whole(self, connection: Connection) -> bool:
        # COMMIT of an aborted transaction is answered with ROLLBACK, which no driver looks at.
        try:
            connection.exec_driver_sql("SELECT 1")
        except DBAPIError:
            return False
        return True


class MySQL(Backend):
    """MariaDB and MySQL through asyncmy or aiomysql."""

    name = "mysql"
    spellings = frozenset({"mysql", "mariadb"})
    drivers = (Driver("asyncmy", "mysql"), Driver("aiomysql", "aiomysql"))

    _DEADLOCK, _LOCK_WAIT_TIMEOUT, _RECORD_HAS_CHANGED = 1213, 1205, 1020

    def connect_args(
        self, url: URL, settings: DatabaseSettings, *, read_only: bool
    ) -> tuple[URL, dict[str, Any]]:
        defaults = {"connect_timeout": CONNECT_TIMEOUT, "charset": "utf8mb4"}
        return url, {name: value for name, value in defaults.items() if name not in url.query}

    def prepare(self, engine: Engine, settings: DatabaseSettings, *, read_only: bool) -> None:
        statements = list(self._session_statements(settings, read_only=read_only))

        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: Any, _record: object) -> None:
            _execute_each(dbapi_connection, statements)

        _kill_cancelled_statements(engine)

    def _session_statements(self, settings: DatabaseSettings, *, read_only: bool) -> Iterator[str]:
        # Each server runs the comments that are written for it: /*M! MariaDB, /*!80000 MySQL 8.
        if seconds := settings.statement_timeout:
            yield (
                "SET SESSION sql_mode = @@SESSION.sql_mode "
                f"/*M!100101 , max_statement_time = {seconds:f} */"
                f"/*!80000 , max_execution_time = {_milliseconds(seconds)} */"
            )
        if seconds := settings.idle_in_transaction_timeout:
            yield (
                "SET SESSION sql_mode = @@SESSION.sql_mode "
                f"/*M!100303 , idle_transaction_timeout = {max(1, round(seconds))} */"
            )
        if read_only:
            yield "SET SESSION TRANSACTION READ ONLY"

    def is_closed(self, driver_connection: Any) -> bool:
        # Neither driver tells; their streams know once the event loop has read the end.
        if hasattr(driver_connection, "_proto"):
            return driver_connection._proto is None or bool(driver_connection._proto.eof)
        reader = driver_connection._reader
        # An idle server only speaks to say that it is going away.
        return reader is None or bool(reader.exception() or reader._eof or reader._buffer)

    @contextmanager
    def ddl_lock(self, connection: Connection) -> Iterator[None]:
        lock = {"lock": f"sanic-db-bp-{DDL_LOCK}"}
        if not connection.scalar(text("SELECT GET_LOCK(:lock, 60)"), lock):
            raise DatabaseUnavailable("db", "another server has been creating tables for 60 s")
        try:
            yield
        finally:
            connection.execute(text("SELECT RELEASE_LOCK(:lock)"), lock)

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        number = driver_error.args[0] if driver_error.args else None
        return number in {self._DEADLOCK, self._LOCK_WAIT_TIMEOUT, self._RECORD_HAS_CHANGED}

    def may_end_transaction(self, driver_error: BaseException) -> bool:
        return bool(driver_error.args) and driver_error.args[0] == self._DEADLOCK

    def is_whole(self, connection: Connection) -> bool:
        # The next statement has begun another transaction, as if nothing had been.
        return False


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
        # No isolation level: the driver's own BEGIN comes too late for savepoints and locks.
        return url, {"isolation_level": None, "timeout": 30}

    def prepare(self, engine: Engine, settings: DatabaseSettings, *, read_only: bool) -> None:
        pragmas = ["PRAGMA foreign_keys = ON"]
        pragmas += (
            ["PRAGMA query_only = ON"]
            if read_only
            else ["PRAGMA journal_mode = WAL", "PRAGMA synchronous = NORMAL"]
        )

        @event.listens_for(engine, "connect")
        def set_up(dbapi_connection: Any, _record: object) -> None:
            _execute_each(dbapi_connection, pragmas)

        @event.listens_for(engine, "invalidate")
        def let_go(dbapi_connection: Any, _record: object, _error: object) -> None:
            _end_at_once(dbapi_connection.driver_connection)

        if not read_only:

            @event.listens_for(engine, "begin")
            def begin(connection: Connection) -> None:
                # Plain BEGIN fails at the first write after a read, whatever the timeout.
                if not _in_autocommit(connection):
                    connection.exec_driver_sql("BEGIN IMMEDIATE")

    def is_closed(self, driver_connection: Any) -> bool:
        return not driver_connection._running

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        code = getattr(driver_error, "sqlite_errorcode", None)
        return code is not None and code & 0xFF in {self._BUSY, self._LOCKED}

    def is_whole(self, connection: Connection) -> bool:
        # A full disk, for one, ends the transaction.
        raw = connection.connection.driver_connection
        return bool(raw and raw.in_transaction) or _in_autocommit(connection)


BACKENDS: Mapping[str, Backend] = {
    spelling: backend
    for backend in (PostgreSQL(), MySQL(), SQLite())
    for spelling in backend.spellings
}


def parse_url(value: str | URL) -> URL:
    """Return a database URL in SQLAlchemy's form, with the asyncio driver to use.

    Args:
        value: the URL as people have it: ``postgres://``, ``postgresql://``, ``mysql://``,
            ``mariadb://`` or ``sqlite:///``, with or without a driver.

    Raises:
        ConfigurationError: it is no URL, or of a database or driver that cannot be used. The
            message never has the URL in it, because the URL may have a password.
    """
    try:
        url = make_url(value.strip() if isinstance(value, str) else value)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "not a database URL. Write it as postgresql://user:password@host:5432/name, "
            "mysql://user:password@host:3306/name or sqlite:///file.db"
        ) from None
    url = _with_credentials_in_place(url.set(drivername=url.drivername.lower()))
    if url.host and "@" in url.host:
        raise ConfigurationError(
            "the password has a character with a meaning of its own in a URL. Write @ as %40, : as "
            "%3A and / as %2F, or give the password in PASSWORD"
        )
    if url.port is not None and not 0 < url.port < 65536:
        raise ConfigurationError("the port is not a number from 1 to 65535")
    if not str(_one(url.query.get("connect_timeout", "1"))).isdecimal():
        raise ConfigurationError("connect_timeout is not a number of seconds")
    return backend_of(url).resolve(url)


def _with_credentials_in_place(url: URL) -> URL:
    """Move user and password out of the query, where they would be shown."""
    query = dict(url.query)
    user, password = query.pop("user", None), query.pop("password", query.pop("passwd", None))
    if any("pass" in name.lower() for name in query.keys() - {"passfile"}):
        raise ConfigurationError("a secret does not belong into the query. Give it in CONNECT_ARGS")
    return url.set(
        username=_one(user) if user else url.username,
        password=_one(password) if password else url.password,
        query=query,
    )


def backend_of(url: URL) -> Backend:
    """Return the kind of database that a URL names.

    Raises:
        ConfigurationError: this package does not know it.
    """
    name = url.drivername.partition("+")[0]
    try:
        return BACKENDS[name]
    except KeyError:
        raise ConfigurationError(
            f"'{name}' is not a database that this package knows. "
            f"It knows {', '.join(sorted(BACKENDS))}"
        ) from None


def is_memory(url: URL) -> bool:
    """Whether a URL asks for a SQLite database that lives in memory."""
    return url.drivername.startswith("sqlite") and url.database in (None, "", ":memory:")


def _one(value: Any) -> Any:
    return value[-1] if isinstance(value, tuple) else value


def _milliseconds(seconds: float) -> str:
    return str(max(1, round(seconds * 1000)))


def _execute_each(dbapi_connection: Any, statements: list[str]) -> None:
    cursor = dbapi_connection.cursor()
    for statement in statements:
        cursor.execute(statement)
    cursor.close()


def _in_autocommit(connection: Connection) -> bool:
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"


def _kill_cancelled_statements(engine: Engine) -> None:
    """The server goes on with a statement whose client is gone, and with its locks."""
    ways: list[tuple[Any, Any]] = []
    tasks: set[asyncio.Task[None]] = set()

    @event.listens_for(engine, "do_connect")
    def remember(_dialect: object, _record: object, args: Any, arguments: Any) -> None:
        ways[:] = [(args, arguments)]

    @event.listens_for(engine, "invalidate")
    def kill(dbapi_connection: Any, _record: object, error: object) -> None:
        if isinstance(error, asyncio.CancelledError):
            number = dbapi_connection.driver_connection.thread_id()
            task = asyncio.get_running_loop().create_task(_kill(engine.dialect, ways[0], number))
            tasks.add(task)
            task.add_done_callback(tasks.discard)


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
        logger.info("KILL %d: %s", number, error)


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


def _has_unread_input(descriptor: int) -> bool:
    # As above.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
