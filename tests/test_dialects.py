"""What each database is asked for: its URL, driver, connect arguments, and which errors pass."""

import asyncio
import gc
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from sanic_db_bp.connections.liveness import cut
from sanic_db_bp.connections.pool import close_connections
from sanic_db_bp.dialects import BACKENDS, Backend, backend_of, is_memory, parse_url, postgresql
from sanic_db_bp.dialects.base import DDL_LOCK
from sanic_db_bp.engine import make_engine
from sanic_db_bp.exceptions import ConfigurationError, DatabaseUnavailable
from sanic_db_bp.settings import DatabaseSettings
from tests.databases import on, on_every_driver, on_every_driver_of_servers
from tests.proxy import proxied
from tests.shop import Observer, eventually

POSTGRESQL_DRIVERS = ("asyncpg", "psycopg")
pytestmark = on_every_driver


def connect_args(url: str, *, read_only: bool = False, **values: Any) -> tuple[str, dict[str, Any]]:
    parsed = parse_url(url)
    settings = DatabaseSettings(env_file=None, **values)
    left, arguments = backend_of(parsed).connect_args(parsed, settings, read_only=read_only)
    return left.render_as_string(hide_password=False), arguments


def engine_of(url: str, **values: Any) -> AsyncEngine:
    return make_engine(DatabaseSettings(env_file=None, **values), parse_url(url))


def test_every_spelling_names_its_database() -> None:
    """Five spellings, three kinds of database."""
    kinds = {spelling: backend.name for spelling, backend in BACKENDS.items()}
    assert kinds == {
        "postgres": "postgresql",
        "postgresql": "postgresql",
        "mysql": "mysql",
        "mariadb": "mysql",
        "sqlite": "sqlite",
    }


def test_an_unknown_database_is_told_with_the_known_ones() -> None:
    """The error has the list of what can be written instead."""
    with pytest.raises(ConfigurationError, match="mariadb, mysql, postgres, postgresql, sqlite"):
        parse_url("mssql://u@h/d")


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("sqlite+aiosqlite://", True),
        ("sqlite+aiosqlite:///", True),
        ("sqlite+aiosqlite:///:memory:", True),
        ("sqlite+aiosqlite:///file.db", False),
        ("postgresql+asyncpg://h", False),
    ],
)
def test_a_database_in_memory_is_recognized(url: str, expected: bool) -> None:
    """SQLite without a file, however it is written."""
    assert is_memory(make_url(url)) is expected


def test_the_timeouts_go_to_postgresql_with_the_connect() -> None:
    """They need no round trip of their own, on either driver."""
    _, arguments = connect_args("postgresql+asyncpg://h/d", read_only=True, statement_timeout=1.5)
    assert arguments["server_settings"] == {
        "statement_timeout": "1500",
        "idle_in_transaction_session_timeout": "60000",
        "default_transaction_read_only": "on",
    }
    _, arguments = connect_args("postgresql+psycopg://h/d", idle_in_transaction_timeout=2)
    assert arguments["options"] == (
        "-c statement_timeout=60000 -c idle_in_transaction_session_timeout=2000"
    )


def test_a_timeout_never_becomes_none() -> None:
    """Less than a millisecond is one, because zero would stand for no timeout."""
    _, arguments = connect_args(
        "postgresql+asyncpg://h/d", statement_timeout=1e-9, idle_in_transaction_timeout=1e-9
    )
    assert set(arguments["server_settings"].values()) == {"1"}


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
def test_nothing_is_set_where_nothing_is_wanted(driver: str) -> None:
    """Zero stands for no timeout: the server keeps its own."""
    _, arguments = connect_args(
        f"postgresql+{driver}://h/d", statement_timeout=0, idle_in_transaction_timeout=0
    )
    assert not {"server_settings", "options"} & arguments.keys()


@pytest.mark.parametrize("read_only", [False, True])
def test_pgbouncer_gets_no_startup_parameters(read_only: bool) -> None:
    """It refuses them, and prepared statements do not survive it."""
    _, arguments = connect_args("postgresql+asyncpg://h/d", pgbouncer=True, read_only=read_only)
    assert arguments == {"timeout": 10, "statement_cache_size": 0}
    _, arguments = connect_args("postgresql+psycopg://h/d", pgbouncer=True, read_only=read_only)
    assert "options" not in arguments
    assert arguments["prepare_threshold"] is None


def test_options_in_the_url_are_kept() -> None:
    """What the user asks the server for comes beside the timeouts."""
    url, arguments = connect_args(
        "postgresql+psycopg://h/d?options=-c%20search_path%3Dshop", idle_in_transaction_timeout=0
    )
    assert url == "postgresql+psycopg://h/d"
    assert arguments["options"] == "-c search_path=shop -c statement_timeout=60000"


@pytest.mark.parametrize(
    ("url", "argument"),
    [
        ("postgresql+asyncpg://h/d", "timeout"),
        ("postgresql+psycopg://h/d", "connect_timeout"),
        ("mysql+asyncmy://h/d", "connect_timeout"),
    ],
)
def test_an_attempt_to_connect_is_bounded(url: str, argument: str) -> None:
    """Ten seconds, unless the URL says otherwise."""
    assert connect_args(url)[1][argument] == 10
    left, arguments = connect_args(f"{url}?connect_timeout=3")
    assert arguments.get(argument) == 3 or left.endswith("?connect_timeout=3")


@pytest.mark.parametrize("seconds", ["soon", "-1", "2.5"])
def test_a_time_to_connect_that_is_no_number_is_refused(seconds: str) -> None:
    """Before the driver sees it, whose error would not name the parameter."""
    with pytest.raises(ConfigurationError, match="connect_timeout"):
        parse_url(f"postgresql://h/d?connect_timeout={seconds}")


def test_parameters_of_libpq_alone_are_kept_from_asyncpg() -> None:
    """A hosting's URL with them works on both drivers; TLS ones keep their meaning."""
    query = "channel_binding=require&gssencmode=disable&sslmode=require"
    url, arguments = connect_args(f"postgresql+asyncpg://u@h/d?{query}")
    assert url == "postgresql+asyncpg://u@h/d"
    assert arguments["dsn"] == "postgresql://?sslmode=require"
    url, arguments = connect_args(f"postgresql+psycopg://u@h/d?{query}")
    assert url == f"postgresql+psycopg://u@h/d?{query}"


def test_what_the_url_asks_of_libpq_is_kept() -> None:
    """The package's own choice would take its place."""
    asked = {"keepalives_idle": "5", "tcp_user_timeout": "1000", "connect_timeout": "3"}
    query = "&".join(f"{name}={value}" for name, value in asked.items())
    url, arguments = connect_args(f"postgresql+psycopg://u@h/d?{query}")
    assert make_url(url).query == asked
    assert not asked.keys() & arguments.keys()
    assert arguments["keepalives_interval"] == 10


def test_the_character_set_can_be_chosen() -> None:
    """MariaDB speaks utf8mb4 if the URL names no other."""
    assert connect_args("mysql+asyncmy://h/d")[1]["charset"] == "utf8mb4"
    assert "charset" not in connect_args("mysql+asyncmy://h/d?charset=latin1")[1]


def test_a_base_class_has_no_answers() -> None:
    """A new kind of database has to say how it connects and which errors pass."""
    backend = Backend()
    error = DBAPIError("SELECT 1", {}, ValueError())
    with pytest.raises(NotImplementedError):
        backend.connect_args(make_url("x://"), DatabaseSettings(env_file=None), read_only=False)
    with pytest.raises(NotImplementedError):
        backend.is_closed(object())
    with pytest.raises(NotImplementedError):
        backend.is_retryable(error)
    assert not backend.is_whole(object())


# Parameters of the URL, on a real server


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
async def test_sslmode_means_the_same_on_both_drivers(postgresql_server: str, driver: str) -> None:
    """Against a server without TLS: disable and prefer connect, require never does."""
    url = make_url(postgresql_server).set(drivername=f"postgresql+{driver}")
    written = url.render_as_string(hide_password=False)
    for mode in ("disable", "prefer", "allow"):
        engine = engine_of(f"{written}?sslmode={mode}")
        async with engine.connect() as connection:
            assert await connection.scalar(text("SELECT 1")) == 1
        await engine.dispose()
    for mode in ("require", "verify-full"):
        engine = engine_of(f"{written}?sslmode={mode}")
        with pytest.raises(Exception, match=r"SSL|root certificate|root\.crt"):
            await engine.connect()
        await engine.dispose()


@pytest.mark.parametrize("driver", POSTGRESQL_DRIVERS)
async def test_parameters_in_the_url_reach_the_server(postgresql_server: str, driver: str) -> None:
    """The application's name and session options work on both drivers, beside the timeouts."""
    url = make_url(postgresql_server).set(
        drivername=f"postgresql+{driver}",
        query={
            "application_name": "the shop",
            "options": "-c search_path=shop",
            "connect_timeout": "5",
        },
    )
    engine = engine_of(url.render_as_string(hide_password=False), statement_timeout=7)
    async with engine.connect() as connection:
        for name, value in (
            ("application_name", "the shop"),
            ("search_path", "shop"),
            ("statement_timeout", "7s"),
        ):
            assert await connection.scalar(text(f"SHOW {name}")) == value
    await engine.dispose()


@on("postgresql", every_driver=True)
async def test_a_statement_ends_when_its_client_is_gone(database_url: str) -> None:
    """The server itself notices, as nobody asks it to cancel for a process that was killed."""
    engine = engine_of(database_url)
    observer = Observer(database_url)
    async with engine.connect() as connection:
        raw = await connection.get_raw_connection()
        query = asyncio.create_task(connection.execute(text("SELECT pg_sleep(60)")))
        await eventually(lambda: observer.slow_queries() == 1, within=5)
        cut(raw.driver_connection)
        await eventually(lambda: observer.slow_queries() == 0, within=5)
        with pytest.raises(DBAPIError):
            await query
    await engine.dispose()


@on("postgresql", every_driver=True)
async def test_a_server_that_cannot_look_for_its_clients(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that refuses the parameter, as PostgreSQL 13 does, is asked once, and then no more."""
    name = "client_connection_check_interval"
    engine = engine_of(database_url)
    async with AsyncExitStack() as stack:
        for value in ("-1", "1000"):
            monkeypatch.setattr(postgresql, "LOOK_FOR_CLIENT", (name, value))
            connection = await stack.enter_async_context(engine.connect())
            assert await connection.scalar(text(f"SHOW {name}")) == "0"
    await engine.dispose()


@on("postgresql", every_driver=True)
async def test_a_failed_connect_does_not_stop_the_look_for_clients(database_url: str) -> None:
    """A database that is away has refused nothing: once it is back, it looks for its clients."""
    async with proxied(database_url) as proxy:
        await proxy.down()
        engine = engine_of(proxy.url)
        with pytest.raises(DatabaseUnavailable):
            await engine.connect()
        await proxy.up()
        async with engine.connect() as connection:
            asked = text("SHOW client_connection_check_interval")
            assert await connection.scalar(asked) == "1s"
        await engine.dispose()


async def cancel_a_query(
    connection: AsyncConnection, observer: Observer, meanwhile: Callable[[], None] | None = None
) -> None:
    """Cancel a statement of MariaDB while it runs on the server."""
    query = asyncio.create_task(connection.execute(text("SELECT SLEEP(5)")))
    await eventually(lambda: observer.slow_queries() == 1, within=5)
    if meanwhile is not None:
        meanwhile()
    query.cancel()
    with pytest.raises(asyncio.CancelledError):
        await query


@on("mariadb", every_driver=True)
async def test_a_server_that_is_not_heard_of_is_not_asked_to_kill_for_ever(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It is given up after a while, which is told, and nothing of it is left."""
    monkeypatch.setattr("sanic_db_bp.dialects.mysql.KILL_WITHIN", 0.2)
    caplog.set_level("INFO", "sanic.root.db")
    observer = Observer(database_url)
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url)
        connection = await engine.connect()
        await cancel_a_query(connection, observer, meanwhile=proxy.freeze)
        await eventually(lambda: any(each.startswith("KILL") for each in caplog.messages), within=3)
        await eventually(lambda: not tasks_of("_kill"), within=3)
        await connection.close()
        await engine.dispose()


@on("mariadb", every_driver=True)
async def test_a_disposal_waits_until_cancelled_statements_are_killed(database_url: str) -> None:
    """The end of the event loop would leave the statement running, and the kill's socket open."""
    observer = Observer(database_url)
    engine = engine_of(database_url)
    connection = await engine.connect()
    await cancel_a_query(connection, observer)
    await connection.close()
    await close_connections(engine)
    assert not tasks_of("_kill")
    await eventually(lambda: observer.slow_queries() == 0)


@on("mariadb", every_driver=True)
async def test_a_disposal_does_not_wait_for_a_kill_that_is_not_heard(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is not done in time is given up, and nothing of it is left."""
    monkeypatch.setattr("sanic_db_bp.connections.pool.CLOSE_WITHIN", 0.2)
    observer = Observer(database_url)
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url)
        connection = await engine.connect()
        await cancel_a_query(connection, observer, meanwhile=proxy.freeze)
        assert tasks_of("_kill")
        await close_connections(engine)
        assert not tasks_of("_kill")
        await connection.close()


def tasks_of(function: str) -> list[asyncio.Task[Any]]:
    """Give the tasks of a coroutine function that are kept, those that are done too."""
    gc.collect()
    tasks = [each for each in gc.get_objects() if isinstance(each, asyncio.Task)]
    return [each for each in tasks if getattr(each.get_coro(), "__name__", "") == function]


# Which connections are dead


async def test_a_connection_closed_behind_the_pools_back_is_known_to_be(database_url: str) -> None:
    """Every driver tells in its own way, and says the same of one that is open."""
    engine = engine_of(database_url)
    is_closed = backend_of(engine.url).is_closed
    async with engine.connect() as connection:
        own: Any = (await connection.get_raw_connection()).driver_connection
        assert not is_closed(own)
        ended = own.close()
        if ended is not None:
            await ended
        await eventually(lambda: is_closed(own))
        await connection.invalidate()
    await engine.dispose()


@pytest.mark.parametrize("database_url", ["postgresql-psycopg", "mariadb-aiomysql"], indirect=True)
async def test_an_idle_server_that_speaks_is_going_away(database_url: str) -> None:
    """Its connection counts as closed before it is."""
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url)
        async with engine.connect() as connection:
            own: Any = (await connection.get_raw_connection()).driver_connection
            proxy.say(b"goodbye")
            await eventually(lambda: backend_of(engine.url).is_closed(own))
            await connection.invalidate()
        await engine.dispose()


# Which errors are worth another try


@on_every_driver_of_servers
async def test_a_deadlock_is_worth_another_try(database_url: str) -> None:
    """Of two transactions that wait for each other one fails, with an error to be retried."""
    engine = engine_of(database_url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER)"))
        await connection.execute(text("INSERT INTO t VALUES (1, 0), (2, 0)"))
    async with engine.connect() as first, engine.connect() as second:
        await update(first, 1)
        await update(second, 2)
        outcomes = await asyncio.gather(update(first, 2), update(second, 1), return_exceptions=True)
        errors = [error for error in outcomes if isinstance(error, BaseException)]
        assert len(errors) == 1
        assert backend_of(engine.url).is_retryable(errors[0])
        await first.rollback()
        await second.rollback()
    await engine.dispose()


async def make_row(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY, n INTEGER)"))
        await connection.execute(text("INSERT INTO t VALUES (1, 0)"))


async def update(connection: AsyncConnection, row: int) -> None:
    await connection.execute(text("UPDATE t SET n = n + 1 WHERE id = :id"), {"id": row})


@on("postgresql", every_driver=True)
async def test_a_serialization_failure_is_worth_another_try(database_url: str) -> None:
    """PostgreSQL refuses the second of two transactions that changed the same row."""
    engine = engine_of(database_url, isolation_level="SERIALIZABLE")
    await make_row(engine)
    async with engine.connect() as first, engine.connect() as second:
        await second.execute(text("SELECT * FROM t"))
        await update(first, 1)
        await first.commit()
        with pytest.raises(DBAPIError) as caught:
            await update(second, 1)
        assert backend_of(engine.url).is_retryable(caught.value)
    await engine.dispose()


@on("mariadb", every_driver=True)
async def test_a_lost_race_of_mariadb_is_worth_another_try(database_url: str) -> None:
    """With the snapshots that are the default since 11.6, and for a lock that comes too late."""
    begin = "SET innodb_lock_wait_timeout = 0, innodb_snapshot_isolation = ON"
    engine = engine_of(database_url, connect_args={"init_command": begin})
    await make_row(engine)
    async with engine.connect() as first, engine.connect() as second:
        await second.execute(text("SELECT * FROM t"))
        await update(first, 1)
        with pytest.raises(DBAPIError, match="Lock wait timeout") as waited:
            await update(second, 1)
        await first.commit()
        with pytest.raises(DBAPIError, match="Record has changed") as changed:
            await update(second, 1)
        for caught in (waited, changed):
            assert backend_of(engine.url).is_retryable(caught.value)
        await second.rollback()
    await engine.dispose()


async def test_a_busy_sqlite_file_is_worth_another_try(tmp_path: Path) -> None:
    """Another process writes: the lock is free again later."""
    url = f"sqlite:///{tmp_path / 'busy.db'}"
    holder, waiter = engine_of(url), engine_of(url, connect_args={"timeout": 0.05})
    async with holder.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER)"))
        with pytest.raises(DBAPIError) as caught:
            async with waiter.begin():
                pass
    assert backend_of(waiter.url).is_retryable(caught.value)
    await holder.dispose()
    await waiter.dispose()


async def test_a_busy_shared_cache_is_worth_another_try(tmp_path: Path) -> None:
    """SQLite has another error for those who share one, and does not wait for each other."""
    url = f"sqlite:///file:{tmp_path / 'shared.db'}?cache=shared&uri=true"
    holder, waiter = engine_of(url), engine_of(url)
    async with holder.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER)"))
        with pytest.raises(DBAPIError, match="locked") as caught:
            async with waiter.begin():
                pass
    assert backend_of(waiter.url).is_retryable(caught.value)
    await holder.dispose()
    await waiter.dispose()


async def test_a_snapshot_of_sqlite_that_is_too_old_is_worth_another_try(tmp_path: Path) -> None:
    """Where the app itself has begun by a read, and another process wrote before it."""
    url = f"sqlite:///{tmp_path / 'snapshot.db'}"
    engine, writer = engine_of(url), engine_of(url)
    async with writer.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER)"))
    async with engine.connect() as connection:
        await connection.execution_options(isolation_level="AUTOCOMMIT")
        await connection.execute(text("BEGIN"))
        await connection.execute(text("SELECT * FROM t"))
        async with writer.begin() as other:
            await other.execute(text("INSERT INTO t VALUES (1)"))
        with pytest.raises(DBAPIError, match="locked") as caught:
            await connection.execute(text("INSERT INTO t VALUES (2)"))
        assert backend_of(engine.url).is_retryable(caught.value)
        await connection.execute(text("ROLLBACK"))
    await engine.dispose()
    await writer.dispose()


async def test_other_errors_are_not_worth_another_try(database_url: str) -> None:
    """A duplicate key, a wrong statement and an error of Python's stay what they are."""
    engine = engine_of(database_url)
    backend = backend_of(engine.url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))
        await connection.execute(text("INSERT INTO t VALUES (1)"))
    for statement in ("INSERT INTO t VALUES (1)", "SELECT * FROM nowhere"):
        async with engine.connect() as connection:
            with pytest.raises(DBAPIError) as caught:
                await connection.execute(text(statement))
            assert not backend.is_retryable(caught.value)
    assert not backend.is_retryable(KeyError("x"))
    assert not backend.is_retryable(DBAPIError("SELECT 1", {}, ValueError()))
    await engine.dispose()


# The lock under which tables are created


async def test_one_server_at_a_time_creates_tables(database_url: str) -> None:
    """The second waits until the first is through."""
    engine, other = engine_of(database_url), engine_of(database_url)
    order: list[str] = []
    inside = asyncio.Event()

    def first(connection: Connection) -> None:
        with backend_of(engine.url).ddl_lock(connection):
            order.append("first in")
            inside.set()
            connection.execute(text("CREATE TABLE one (id INTEGER)"))
            order.append("first out")

    def second(connection: Connection) -> None:
        with backend_of(engine.url).ddl_lock(connection):
            order.append("second in")

    async def run_second() -> None:
        await inside.wait()
        async with other.begin() as connection:
            await connection.run_sync(second)

    waiting = asyncio.create_task(run_second())
    async with engine.begin() as connection:
        await connection.run_sync(first)
    await waiting
    assert order == ["first in", "first out", "second in"]
    await engine.dispose()
    await other.dispose()


@on("mariadb")
async def test_a_server_that_hangs_with_the_lock_stops_no_other_for_ever(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL lets go of the lock with the connection; on MariaDB the wait itself is bounded."""
    monkeypatch.setattr("sanic_db_bp.dialects.mysql.DDL_LOCK_WITHIN", 0)
    engine = engine_of(database_url)

    def take(connection: Connection) -> None:
        with backend_of(engine.url).ddl_lock(connection):
            pass

    async with engine.connect() as connection, engine.connect() as other:
        lock = {"lock": f"sanic-db-bp-{DDL_LOCK}"}
        await connection.execute(text("SELECT GET_LOCK(:lock, 5)"), lock)
        with pytest.raises(DatabaseUnavailable, match="creating tables"):
            await other.run_sync(take)
    await engine.dispose()


async def test_the_lock_is_given_up_after_an_error(database_url: str) -> None:
    """A server that fails to create the tables does not stop the others."""
    engine = engine_of(database_url)

    def failing(connection: Connection) -> None:
        with backend_of(engine.url).ddl_lock(connection):
            raise KeyError("no tables")

    def taking(connection: Connection) -> bool:
        with backend_of(engine.url).ddl_lock(connection):
            return True

    async with engine.connect() as connection, connection.begin() as transaction:
        with pytest.raises(KeyError):
            await connection.run_sync(failing)
        await transaction.rollback()
    async with asyncio.timeout(1.5), engine.begin() as connection:
        assert await connection.run_sync(taking)
    await engine.dispose()
