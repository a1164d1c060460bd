"""The engine does what the settings say: the databases themselves are asked."""

import asyncio
import contextvars
import gc
import logging
import threading
import weakref
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import sqlalchemy
from sqlalchemy import Connection, NullPool, QueuePool, event, make_url, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util import parse_version_string

from sanic_db_bp.bridge import run_in_bridge
from sanic_db_bp.connections import liveness
from sanic_db_bp.connections.pool import FairPool, status_of
from sanic_db_bp.dialects import backend_of, parse_url
from sanic_db_bp.dialects.sqlite import INTERRUPT_AFTER
from sanic_db_bp.engine import make_engine
from sanic_db_bp.exceptions import ConfigurationError, DatabaseUnavailable
from sanic_db_bp.settings import DatabaseSettings
from tests.databases import (
    DRIVERS,
    on,
    on_all,
    on_every_driver,
    on_every_driver_of_servers,
    on_postgresql,
    on_sqlite,
)
from tests.proxy import proxied
from tests.servers import Server
from tests.shop import Observer, eventually

pytestmark = on_every_driver

Engines = Callable[..., AsyncEngine]


@pytest.fixture
async def engine_of() -> AsyncIterator[Engines]:
    """Makes engines, which are disposed at the end."""
    engines: list[AsyncEngine] = []

    def make(url: str, *, read_only: bool = False, **values: Any) -> AsyncEngine:
        settings = DatabaseSettings(url=url, env_file=None, **values)
        engines.append(make_engine(settings, parse_url(url), read_only=read_only))
        return engines[-1]

    yield make
    for engine in engines:
        await engine.dispose()


async def ask(engine: AsyncEngine, *statements: str) -> list[Any]:
    async with engine.connect() as connection:
        return [await connection.scalar(text(statement)) for statement in statements]


async def create_table(engine: AsyncEngine) -> None:
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE t (id INTEGER PRIMARY KEY)"))


# Reading alone


@pytest.mark.parametrize("pgbouncer", [False, True])
async def test_the_database_refuses_to_write_on_the_read_engine(
    engine_of: Engines, database_url: str, pgbouncer: bool
) -> None:
    """Rows and tables stay as they are, whatever statement is sent; reading works."""
    writing = engine_of(database_url)
    await create_table(writing)
    reading = engine_of(database_url, read_only=True, pgbouncer=pgbouncer)
    for statement in (
        "INSERT INTO t VALUES (1)",
        "DELETE FROM t",
        "DROP TABLE t",
        "CREATE TABLE u (id INTEGER)",
    ):
        async with reading.connect() as connection:
            with pytest.raises(DBAPIError):
                await connection.execute(text(statement))
    assert await ask(reading, "SELECT count(*) FROM t") == [0]


async def test_each_read_sees_what_was_committed_before(
    engine_of: Engines, database_url: str
) -> None:
    """On the read engine every statement is a transaction of its own."""
    writing, reading = engine_of(database_url), engine_of(database_url, read_only=True)
    await create_table(writing)
    async with reading.connect() as connection:
        counts = [await connection.scalar(text("SELECT count(*) FROM t"))]
        async with writing.begin() as other:
            await other.execute(text("INSERT INTO t VALUES (1)"))
        counts.append(await connection.scalar(text("SELECT count(*) FROM t")))
    assert counts == [0, 1]


# Timeouts


@on("postgresql", every_driver=True)
@pytest.mark.parametrize("read_only", [False, True])
async def test_postgresql_knows_the_timeouts(
    engine_of: Engines, database_url: str, read_only: bool
) -> None:
    """As the server tells them: as set, and none for zero."""
    statement, idle = "SHOW statement_timeout", "SHOW idle_in_transaction_session_timeout"
    for seconds, shown in ((1.5, "1500ms"), (0, "0"), (2_000_000, "2000000s")):
        engine = engine_of(
            database_url,
            read_only=read_only,
            statement_timeout=seconds,
            idle_in_transaction_timeout=seconds,
        )
        assert await ask(engine, statement, idle) == [shown, shown]
        await engine.dispose()


@on("mariadb", every_driver=True)
@pytest.mark.parametrize("read_only", [False, True])
async def test_mariadb_knows_the_timeouts(
    engine_of: Engines, database_url: str, read_only: bool
) -> None:
    """As the server tells them; its idle timeout counts whole seconds."""
    statement, idle = "SELECT @@max_statement_time", "SELECT @@idle_transaction_timeout"
    for seconds, shown in ((1.5, [1.5, 2]), (0.4, [0.4, 1]), (0, [0, 0])):
        engine = engine_of(
            database_url,
            read_only=read_only,
            statement_timeout=seconds,
            idle_in_transaction_timeout=seconds,
        )
        told = await ask(engine, statement, idle)
        assert [float(told[0]), told[1]] == shown
        await engine.dispose()


@on_every_driver_of_servers
@pytest.mark.parametrize("read_only", [False, True])
async def test_the_server_ends_a_long_statement(
    engine_of: Engines, database_url: str, read_only: bool
) -> None:
    """STATEMENT_TIMEOUT is in force, and the connection is good afterwards."""
    sleep = "SELECT pg_sleep(9)" if "postgresql" in database_url else "SELECT SLEEP(9)"
    engine = engine_of(database_url, read_only=read_only, pool_size=1, statement_timeout=0.1)
    async with asyncio.timeout(5), engine.connect() as connection:
        with pytest.raises(DBAPIError, match=r"statement timeout|max_statement_time"):
            await connection.execute(text(sleep))
    assert await ask(engine, "SELECT 1") == [1]


@on_every_driver_of_servers
async def test_the_server_ends_an_idle_transaction(engine_of: Engines, database_url: str) -> None:
    """IDLE_IN_TRANSACTION_TIMEOUT is in force; the connection is replaced at its next use."""
    engine = engine_of(database_url, pool_size=1, idle_in_transaction_timeout=0.3)
    await create_table(engine)
    async with asyncio.timeout(5):
        async with engine.connect() as connection:
            await connection.execute(text("INSERT INTO t VALUES (1)"))
            raw = await connection.get_raw_connection()
            while not backend_of(engine.url).is_closed(raw.driver_connection):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
            with pytest.raises(DBAPIError):
                await connection.execute(text("SELECT 1"))
    assert await ask(engine, "SELECT count(*) FROM t") == [0]


@pytest.mark.parametrize(
    "driver", ["postgresql+asyncpg", "postgresql+psycopg", "mysql+asyncmy", "mysql+aiomysql"]
)
async def test_a_server_that_never_answers_is_given_up(engine_of: Engines, driver: str) -> None:
    """The attempt to connect is bounded, also where the socket opens and nothing comes."""
    async with silent_server() as port, asyncio.timeout(4):
        engine = engine_of(f"{driver}://u@127.0.0.1:{port}/d?connect_timeout=1")
        with pytest.raises(DatabaseUnavailable, match=r"connecting failed: \w+: \w"):
            await engine.connect()


@on_every_driver_of_servers
async def test_a_connect_timeout_in_the_url_may_be_longer_than_ours(
    engine_of: Engines, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The package's own is for a URL that has none."""
    monkeypatch.setattr("sanic_db_bp.engine.CONNECT_TIMEOUT", 0.1)
    async with proxied(database_url) as proxy:
        proxy.back = 0.1
        url = make_url(proxy.url).update_query_dict({"connect_timeout": "5"})
        engine = engine_of(url.render_as_string(hide_password=False))
        assert await ask(engine, "SELECT 1") == [1]
        await engine.dispose()


@asynccontextmanager
async def silent_server() -> AsyncIterator[int]:
    """A server that listens and never says a word."""
    clients: list[asyncio.StreamWriter] = []
    server = await asyncio.start_server(lambda _, client: clients.append(client), "127.0.0.1", 0)
    yield server.sockets[0].getsockname()[1]
    server.close()
    for client in clients:
        client.transport.abort()
    await asyncio.gather(*[client.wait_closed() for client in clients], return_exceptions=True)


# Transactions


@pytest.mark.parametrize(
    ("database_url", "level", "question", "told"),
    [
        ("sqlite", "READ UNCOMMITTED", "PRAGMA read_uncommitted", 1),
        ("sqlite", "SERIALIZABLE", "PRAGMA read_uncommitted", 0),
        *(
            (each, "SERIALIZABLE", "SHOW transaction_isolation", "serializable")
            for each in DRIVERS["postgresql"]
        ),
        *(
            (each, "READ COMMITTED", "SELECT @@tx_isolation", "READ-COMMITTED")
            for each in DRIVERS["mariadb"]
        ),
    ],
    indirect=["database_url"],
)
async def test_the_isolation_level_is_in_force(
    engine_of: Engines, database_url: str, level: str, question: str, told: object
) -> None:
    """Every transaction of the engine has the level of the settings."""
    engine = engine_of(database_url, isolation_level=level)
    assert await ask(engine, question) == [told]


async def test_savepoints_work(engine_of: Engines, database_url: str) -> None:
    """What was done since the savepoint is gone, the rest is kept."""
    engine = engine_of(database_url)
    await create_table(engine)
    async with engine.begin() as connection:
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        async with connection.begin_nested() as savepoint:
            await connection.execute(text("INSERT INTO t VALUES (2)"))
            await savepoint.rollback()
        async with connection.begin_nested():
            await connection.execute(text("INSERT INTO t VALUES (3)"))
    assert await ask(engine, "SELECT count(*) FROM t", "SELECT sum(id) FROM t") == [2, 4]


async def test_a_rollback_takes_everything_back(engine_of: Engines, database_url: str) -> None:
    """Also a row that was written after a read."""
    engine = engine_of(database_url)
    await create_table(engine)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT * FROM t"))
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        await connection.rollback()
    assert await ask(engine, "SELECT count(*) FROM t") == [0]


@on("sqlite", "postgresql", every_driver=True)
async def test_a_failed_commit_leaves_no_transaction(engine_of: Engines, database_url: str) -> None:
    """Nothing of it remains, and the connection begins the next one clean."""
    engine = engine_of(database_url, pool_size=1)
    await create_table(engine)
    async with engine.begin() as connection:
        await connection.execute(
            text("CREATE TABLE u (t INTEGER REFERENCES t (id) DEFERRABLE INITIALLY DEFERRED)")
        )
    async with engine.connect() as connection:
        await connection.execute(text("INSERT INTO u VALUES (7)"))
        with pytest.raises(IntegrityError):
            await connection.commit()
    assert await ask(engine, "SELECT count(*) FROM u") == [0]


@on_sqlite
async def test_sqlite_is_set_up_for_concurrent_readers(
    engine_of: Engines, database_url: str
) -> None:
    """WAL, foreign keys and a busy timeout, and one connection that writes."""
    pragmas = ("journal_mode", "foreign_keys", "synchronous", "busy_timeout", "query_only")
    questions = [f"PRAGMA {pragma}" for pragma in pragmas]
    writing = engine_of(database_url, pool_size=5)
    assert await ask(writing, *questions) == ["wal", 1, 1, 30_000, 0]
    assert pool_size(writing) == 1
    reading = engine_of(database_url, pool_size=5, read_only=True)
    assert await ask(reading, *questions) == ["wal", 1, 2, 30_000, 1]
    assert pool_size(reading) == 5


def pool_size(engine: AsyncEngine) -> int:
    assert isinstance(engine.pool, FairPool)
    return engine.pool.size()


@on_sqlite
async def test_sqlite_takes_the_lock_at_the_begin(engine_of: Engines, database_url: str) -> None:
    """Another process cannot write between a transaction's read and its write."""
    engine = engine_of(database_url)
    other = engine_of(database_url, connect_args={"timeout": 0})
    await create_table(engine)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT * FROM t"))
        with pytest.raises(DBAPIError, match="database is locked"):
            async with other.begin():
                pass


@on_sqlite
async def test_a_begin_that_came_too_late_may_be_tried_again(
    engine_of: Engines, database_url: str
) -> None:
    """On the same connection: what follows is a transaction, and the failed one left nothing."""
    engine = engine_of(database_url)
    other = engine_of(database_url, connect_args={"timeout": 0})
    await create_table(engine)
    async with other.connect() as late:
        await late.execute(text("SELECT 1"))
        await late.commit()
        async with engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            with pytest.raises(DBAPIError, match="database is locked"):
                await late.execute(text("SELECT 1"))
        for number, end in ((1, late.commit), (2, late.rollback)):
            await late.execute(text("INSERT INTO t VALUES (:n)"), {"n": number})
            await end()
    assert await ask(other, "SELECT sum(id) FROM t") == [1]


@on_sqlite
def test_a_file_can_be_thrown_away_where_no_loop_runs(database_url: str) -> None:
    """What the garbage collector ends after the event loop keeps no lock."""
    engine = make_engine(DatabaseSettings(env_file=None), parse_url(database_url))

    async def begin() -> Connection:
        connection = await engine.connect()
        await connection.execute(text("SELECT 1"))
        assert connection.sync_connection is not None
        return connection.sync_connection

    connection = asyncio.run(begin())
    connection.invalidate()
    connection.close()
    observer = Observer(database_url)
    asyncio.run(eventually(lambda: observer.open_transactions() == 0))


@on_sqlite
async def test_a_file_closed_behind_the_pools_back_can_be_thrown_away(
    engine_of: Engines, database_url: str
) -> None:
    """Nothing is left to be interrupted, and the next connection is a new one."""
    engine = engine_of(database_url)
    async with engine.connect() as connection:
        raw: Any = await connection.get_raw_connection()
        await raw.driver_connection.close()
        await connection.invalidate()
    assert await ask(engine, "SELECT 1") == [1]


@on_sqlite
async def test_sqlite_takes_no_lock_in_autocommit(engine_of: Engines, database_url: str) -> None:
    """VACUUM and the like run outside of a transaction."""
    engine = engine_of(database_url).execution_options(isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text("VACUUM"))


@on("mariadb", every_driver=True)
async def test_mariadb_speaks_utf8mb4(engine_of: Engines, database_url: str) -> None:
    """Every character can be sent and read."""
    assert await ask(engine_of(database_url), "SELECT @@character_set_client") == ["utf8mb4"]


# Connections


@pytest.mark.parametrize("end", ["stop", "kill"])
async def test_connections_closed_by_a_restart_are_replaced(
    engine_of: Engines, own_server: Server, end: str
) -> None:
    """After the server was away every idle connection of either pool works again, at first try."""
    engines = []
    for driver in own_server.drivers:
        url = own_server.new_database(driver)
        engines += [engine_of(url, pool_size=3), engine_of(url, pool_size=3, read_only=True)]
    for _ in range(2):
        answers = await asyncio.gather(*[ask(e, "SELECT 1") for e in engines for _ in range(3)])
        assert answers == [[1]] * 12
        if end == "kill":
            await asyncio.to_thread(own_server.kill)
        else:
            await asyncio.to_thread(own_server.stop)
        await asyncio.to_thread(own_server.start)


async def test_a_server_that_is_away_is_told_without_credentials(
    engine_of: Engines, own_server: Server
) -> None:
    """The error names the database and what happened, never the password."""
    engines = []
    for driver in own_server.drivers:
        url = own_server.new_database(driver).replace("@", ":s3cret@", 1)
        engines.append(engine_of(url))
    own_server.stop()
    for engine in engines:
        with pytest.raises(DatabaseUnavailable, match="'db'") as caught:
            await engine.connect()
        assert "s3cret" not in str(caught.value) + repr(caught.value) + repr(caught.value.__cause__)


async def test_a_recycled_connection_is_replaced(engine_of: Engines, database_url: str) -> None:
    """POOL_RECYCLE closes a connection that is too old and opens another."""
    engine = engine_of(database_url, pool_recycle=0, pool_size=1)
    seen = set()
    for _ in range(2):
        async with engine.connect() as connection:
            raw = await connection.get_raw_connection()
            seen.add(raw.driver_connection)
    assert len(seen) == 2


async def test_pre_ping_can_be_asked_for(
    engine_of: Engines, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """POOL_PRE_PING works on every driver."""
    engine = engine_of(database_url, pool_pre_ping=True, pool_size=1)
    asked: list[object] = []
    ping = engine.dialect.do_ping

    def counted(dbapi_connection: Any) -> bool:
        asked.append(dbapi_connection)
        return ping(dbapi_connection)

    monkeypatch.setattr(engine.dialect, "do_ping", counted)
    assert await ask(engine, "SELECT 1") == [1]
    assert asked == []
    assert await ask(engine, "SELECT 2") == [2]
    assert len(asked) == 1


class Upload:
    """Something big that belongs to a request."""


current: contextvars.ContextVar[Upload] = contextvars.ContextVar("current")


async def in_request(engine: AsyncEngine) -> weakref.ref[Upload]:
    upload = Upload()
    current.set(upload)
    assert await ask(engine, "SELECT 1") == [1]
    return weakref.ref(upload)


@pytest.mark.parametrize("read_only", [False, True])
async def test_a_connection_keeps_no_request_alive(
    engine_of: Engines, database_url: str, read_only: bool
) -> None:
    """What a context variable held while a connection was opened is free when its task ends."""
    engine = engine_of(database_url, read_only=read_only)
    upload = await asyncio.create_task(in_request(engine))
    await asyncio.sleep(0)
    gc.collect()
    assert upload() is None


async def test_a_connection_opened_again_keeps_no_request_alive(
    engine_of: Engines, database_url: str
) -> None:
    """The same holds for one that takes the place of a closed one."""
    engine = engine_of(database_url, pool_recycle=3600, pool_size=1)

    @event.listens_for(engine.sync_engine, "checkin", once=True)
    def age(_dbapi_connection: object, record: Any) -> None:
        record.starttime -= 7200

    assert await ask(engine, "SELECT 1") == [1]
    upload = await asyncio.create_task(in_request(engine))
    await asyncio.sleep(0)
    gc.collect()
    assert upload() is None


@on_every_driver_of_servers
async def test_a_statement_keeps_no_request_alive(
    engine_of: Engines, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The timer that looks for statements which take long outlives them."""
    engine = engine_of(database_url)
    monkeypatch.setattr(liveness, "LOOK_EVERY", 0.01)
    assert await ask(engine, "SELECT 1") == [1]
    await asyncio.sleep(0.1)
    monkeypatch.setattr(liveness, "LOOK_EVERY", 60)
    upload = await asyncio.create_task(in_request(engine))
    await asyncio.sleep(0)
    gc.collect()
    assert upload() is None


def begin_request(
    engine: AsyncEngine, statement: str
) -> tuple[asyncio.Task[list[Any]], weakref.ref[Upload]]:
    upload = Upload()
    context = contextvars.copy_context()
    context.run(current.set, upload)
    asking = ask(engine, statement)
    return asyncio.get_running_loop().create_task(asking, context=context), weakref.ref(upload)


@on_every_driver_of_servers
@pytest.mark.parametrize("cancelled", [True, False])
async def test_a_connection_that_is_opened_for_nobody_keeps_no_request_alive(
    engine_of: Engines, database_url: str, monkeypatch: pytest.MonkeyPatch, cancelled: bool
) -> None:
    """It is for the next one, as the one that wanted it has left or waited for too long."""
    monkeypatch.setattr("sanic_db_bp.connections.pool.SHORTEST_OPENING", 0.1)
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url, pool_timeout=5 if cancelled else 0.1)
        proxy.freeze()
        request, upload = begin_request(engine, "SELECT 1")
        await eventually(lambda: status_of(engine)["checked_out"] == 1)
        if cancelled:
            request.cancel()
        await asyncio.wait({request})
        assert cancelled or isinstance(request.exception(), DatabaseUnavailable)
        del request
        gc.collect()
        assert upload() is None
        proxy.thaw()
        await eventually(lambda: status_of(engine)["idle"] == 1, within=5)
        await engine.dispose()


@on("mariadb", every_driver=True)
async def test_a_statement_that_is_killed_keeps_no_request_alive(
    engine_of: Engines, database_url: str
) -> None:
    """The server may be slow to hear of it."""
    observer = Observer(database_url)
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url)
        request, upload = begin_request(engine, "SELECT SLEEP(5)")
        await eventually(lambda: observer.slow_queries() == 1, within=5)
        proxy.freeze()
        request.cancel()
        await asyncio.wait({request})
        del request
        gc.collect()
        assert upload() is None
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()}, within=3)


# What is passed through


@on_all
async def test_engine_options_reach_sqlalchemy(engine_of: Engines, database_url: str) -> None:
    """ENGINE_OPTIONS win over what the package would choose, the pool's class too."""
    engine = engine_of(database_url, engine_options={"poolclass": NullPool})
    assert isinstance(engine.pool, NullPool)
    assert await ask(engine, "SELECT 1") == [1]


@on_all
async def test_unknown_engine_options_stop_the_start(engine_of: Engines, database_url: str) -> None:
    """The error names the variable and the option, not its value."""
    with pytest.raises(ConfigurationError, match="ENGINE_OPTIONS") as caught:
        engine_of(database_url, engine_options={"pool_sise": "s3cret"})
    assert "pool_sise" in str(caught.value)
    assert "s3cret" not in str(caught.value)


@on_all
@pytest.mark.parametrize(
    "options", [{"poolclass": QueuePool}, {"pool_reset_on_return": "never"}], ids=str
)
async def test_engine_options_that_cannot_be_carried_out_stop_the_start(
    engine_of: Engines, database_url: str, options: dict[str, Any]
) -> None:
    """SQLAlchemy knows the option, and refuses the value."""
    with pytest.raises(ConfigurationError, match="ENGINE_OPTIONS: SQLAlchemy refuses them: "):
        engine_of(database_url, engine_options=options)


@pytest.mark.parametrize("database_url", ["postgresql-psycopg"], indirect=True)
async def test_connect_args_reach_the_driver(engine_of: Engines, database_url: str) -> None:
    """CONNECT_ARGS are the driver's own arguments."""
    engine = engine_of(database_url, connect_args={"application_name": "shop"})
    assert await ask(engine, "SHOW application_name") == ["shop"]


@pytest.mark.parametrize(
    ("database_url", "arguments"),
    [
        ("postgresql-asyncpg", {"server_settings": {"jit": "off"}}),
        ("postgresql-psycopg", {"options": "-c jit=off"}),
    ],
    indirect=["database_url"],
)
async def test_connect_args_keep_the_timeouts(
    engine_of: Engines, database_url: str, arguments: dict[str, Any]
) -> None:
    """Server settings of the user's own stand beside those of the package."""
    engine = engine_of(database_url, connect_args=arguments)
    assert await ask(engine, "SHOW jit", "SHOW statement_timeout") == ["off", "1min"]
    reading = engine_of(database_url, read_only=True, connect_args=arguments)
    assert await ask(reading, "SHOW jit", "SHOW default_transaction_read_only") == ["off", "on"]


@pytest.mark.parametrize(
    ("database_url", "form"),
    [
        ("postgresql-asyncpg", lambda wanted: {"server_settings": wanted}),
        (
            "postgresql-psycopg",
            lambda wanted: {"options": " ".join(f"-c {k}={v}" for k, v in wanted.items())},
        ),
    ],
    ids=["asyncpg", "psycopg"],
    indirect=["database_url"],
)
async def test_connect_args_win_over_all_but_reading_alone(
    engine_of: Engines, database_url: str, form: Callable[[dict[str, str]], dict[str, Any]]
) -> None:
    """A read session does not write because somebody tuned the connections."""
    wanted = {
        "client_connection_check_interval": "5000",
        "statement_timeout": "3000",
        "default_transaction_read_only": "off",
    }
    reading = engine_of(database_url, read_only=True, connect_args=form(wanted))
    assert await ask(reading, *(f"SHOW {name}" for name in wanted)) == ["5s", "3s", "on"]


@on("postgresql", every_driver=True)
async def test_options_in_the_url_win_over_no_setting(
    engine_of: Engines, database_url: str
) -> None:
    """Nor do they make a read session write."""
    options = "-c statement_timeout=1 -c default_transaction_read_only=off"
    url = make_url(database_url).update_query_dict({"options": options})
    reading = engine_of(url.render_as_string(hide_password=False), read_only=True)
    questions = "SHOW statement_timeout", "SHOW default_transaction_read_only"
    assert await ask(reading, *questions) == ["1min", "on"]


@on_all
async def test_echo_logs_every_statement(
    engine_of: Engines, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """ECHO turns SQLAlchemy's own log on."""
    await ask(engine_of(database_url, echo=True), "SELECT 41 + 1")
    assert any("SELECT 41 + 1" in record.getMessage() for record in caplog.records)


# Slow statements


@on_all
async def test_slow_statements_are_logged_without_parameters(
    engine_of: Engines, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A statement over SLOW_QUERY_MS is a warning with its text and its time."""
    engine = engine_of(database_url, slow_query_ms=0.000001)
    with caplog.at_level(logging.WARNING, "sanic.root.db"):
        async with engine.connect() as connection:
            await connection.scalar(text("SELECT :secret"), {"secret": "s3cret"})
    slow = [record for record in caplog.records if record.message.startswith("slow statement")]
    assert any("SELECT" in record.message for record in slow)
    assert all(record.levelno == logging.WARNING for record in slow)
    assert "s3cret" not in caplog.text


@on_all
async def test_a_slow_statement_is_logged_with_what_it_found(
    engine_of: Engines, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The record has the figures as fields, for logs that machines read."""
    engine = engine_of(database_url, slow_query_ms=0.000001)
    async with engine.connect() as connection:
        await connection.execute(text("SELECT 1 UNION SELECT 2"))
    record: Any = caplog.records[-1]
    known = engine.dialect.name != "sqlite"
    assert record.rows == (2 if known else None)
    assert (f"{record.duration_ms:.0f} ms, 2 rows" in record.message) is known
    assert (record.database, record.route, record.request_id) == ("db", None, None)


@on_all
@pytest.mark.parametrize("parameters", [{"name": "tea"}, {"name": "x" * 100_000}])
async def test_parameters_are_logged_if_asked_for_and_shortened(
    engine_of: Engines,
    database_url: str,
    caplog: pytest.LogCaptureFixture,
    parameters: dict[str, str],
) -> None:
    """SLOW_QUERY_PARAMETERS shows what a statement was slow with, in a line of bounded length."""
    engine = engine_of(database_url, slow_query_ms=0.000001, slow_query_parameters=True)
    async with engine.connect() as connection:
        await connection.scalar(text("SELECT :name"), parameters)
    assert parameters["name"][:3] in caplog.messages[-1]
    assert len(caplog.messages[-1]) < 500


@on_all
async def test_quick_statements_are_not_logged(
    engine_of: Engines, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Below the limit, and without one, there is no line."""
    for limit in (60_000, None):
        await ask(engine_of(database_url, slow_query_ms=limit), "SELECT 1")
    assert "slow statement" not in caplog.text


@on_postgresql
async def test_a_slow_statement_that_fails_is_logged_too(
    engine_of: Engines, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Those that run into the timeout are the slowest of all."""
    engine = engine_of(database_url, slow_query_ms=50, statement_timeout=0.1)
    async with engine.connect() as connection:
        with pytest.raises(DBAPIError):
            await connection.execute(text("SELECT pg_sleep(9)"))
    assert "pg_sleep" in caplog.text


# The end of a transaction, without a bridge


@pytest.mark.parametrize("end", ["do_commit", "do_rollback"])
async def test_transactions_can_be_ended_outside_of_a_greenlet(
    engine_of: Engines, database_url: str, end: str
) -> None:
    """SQLAlchemy's own clean-up may end a transaction where nothing can be awaited."""
    engine = engine_of(database_url)
    ended: list[str] = []
    plain = SimpleNamespace(
        commit=lambda: ended.append(end), rollback=lambda: ended.append(end), info={}
    )
    getattr(engine.dialect, end)(plain)
    assert ended == [end]


@on_sqlite
async def test_a_file_that_is_thrown_away_is_closed_although_it_is_cancelled(
    engine_of: Engines, database_url: str
) -> None:
    """The driver's thread ends once: a second end would be waited for in vain."""
    engine = engine_of(database_url)
    connection = await engine.connect()
    file: Any = (await connection.get_raw_connection()).driver_connection
    go_on = threading.Event()
    await file.create_function("wait", 0, go_on.wait)
    busy = asyncio.create_task(file.execute("SELECT wait()"))
    await asyncio.sleep(0)
    assert connection.sync_connection is not None
    closing = asyncio.create_task(run_in_bridge(connection.sync_connection.invalidate))
    await asyncio.sleep(0)
    closing.cancel()
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await closing
    await busy
    await connection.close()
    await eventually(lambda: asyncio.all_tasks() == {asyncio.current_task()})


@on_sqlite
@pytest.mark.parametrize("closed", [False, True])
async def test_a_file_that_is_thrown_away_is_not_interrupted_past_its_end(
    engine_of: Engines, database_url: str, caplog: pytest.LogCaptureFixture, closed: bool
) -> None:
    """It is closed by then, or was before, and to interrupt it would be an error in the log."""
    connection = await engine_of(database_url).connect()
    raw: Any = await connection.get_raw_connection()
    if closed:
        await raw.driver_connection.close()
    await connection.invalidate()
    await connection.close()
    await asyncio.sleep(2 * INTERRUPT_AFTER)
    assert caplog.messages == []


async def test_an_error_can_be_told_without_its_parameters(
    engine_of: Engines, database_url: str
) -> None:
    """By SQLAlchemy's own option, which passes through the settings."""
    engine = engine_of(database_url, engine_options={"hide_parameters": True})
    with pytest.raises(DBAPIError) as caught:
        async with engine.connect() as connection:
            await connection.execute(text("SELECT * FROM nowhere WHERE x = :x"), {"x": "secret"})
    assert "secret" not in str(caught.value)


# After a COMMIT


async def test_what_comes_after_a_commit_is_rolled_back(
    engine_of: Engines, database_url: str
) -> None:
    """A connection that has committed begins anew, whatever its pool then leaves out."""
    engine = engine_of(database_url, pool_size=1, max_overflow=0)
    await create_table(engine)
    async with engine.connect() as connection:
        await connection.execute(text("INSERT INTO t VALUES (1)"))
        await connection.commit()
        await connection.execute(text("INSERT INTO t VALUES (2)"))
        await connection.rollback()
        await connection.execute(text("INSERT INTO t VALUES (3)"))
        await connection.commit()
        await connection.execute(text("INSERT INTO t VALUES (4)"))
    async with engine.begin() as connection:
        found = await connection.scalars(text("SELECT id FROM t ORDER BY id"))
        assert list(found) == [1, 3]


async def test_a_connection_of_the_driver_is_rolled_back_by_the_pool(
    engine_of: Engines, database_url: str
) -> None:
    """Also if the connection has committed when it was last in use."""
    engine = engine_of(database_url, pool_size=1, max_overflow=0)
    await create_table(engine)

    def write() -> None:
        own = engine.sync_engine.raw_connection()
        try:
            if engine.dialect.name == "sqlite":
                own.cursor().execute("BEGIN")
            own.cursor().execute("INSERT INTO t VALUES (1)")
        finally:
            own.close()

    await run_in_bridge(write)
    assert await ask(engine, "SELECT COUNT(*) FROM t") == [0]


@on("mariadb")
async def test_a_commit_costs_no_rollback(engine_of: Engines, database_url: str) -> None:
    """The pool asks for one where a transaction has not been committed, and nowhere else."""
    engine = engine_of(database_url, pool_size=1, max_overflow=0)

    async def rollbacks() -> int:
        async with engine.connect() as connection:
            found = await connection.execute(text("SHOW SESSION STATUS LIKE 'Com_rollback'"))
            return int(found.one()[1])

    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1"))
    before = await rollbacks()
    async with engine.begin() as connection:
        await connection.execute(text("SELECT 1"))
    # The question itself ends with one.
    assert await rollbacks() == before + 1


@on("mariadb")
async def test_reading_costs_no_rollback(engine_of: Engines, database_url: str) -> None:
    """Each statement is a transaction of its own, and is over."""
    engine = engine_of(database_url, pool_size=1, read_only=True)
    rollbacks = set()
    for _ in range(2):
        async with engine.connect() as connection:
            found = await connection.execute(text("SHOW SESSION STATUS LIKE 'Com_rollback'"))
            rollbacks.add(found.one()[1])
    assert len(rollbacks) == 1


# Events


def listener() -> tuple[list[str], Callable[..., None]]:
    heard: list[str] = []

    def listen(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        heard.append(statement)

    return heard, listen


async def test_who_listens_later_hears_of_the_next_statement(
    engine_of: Engines, database_url: str
) -> None:
    """Also after connections of the engine were in use."""
    engine = engine_of(database_url)
    await ask(engine, "SELECT 1")
    heard, listen = listener()
    event.listen(engine.sync_engine, "before_cursor_execute", listen)
    await ask(engine, "SELECT 2")
    assert heard == ["SELECT 2"]


@pytest.mark.skipif(
    parse_version_string(sqlalchemy.__version__) < (2, 1, 7),
    reason="SQLAlchemy 2.1.6 and older tell the listeners of all connections of no statement "
    "unless the engine has listeners too, whatever the class of its connections",
)
async def test_who_listens_to_all_connections_hears_of_the_next_statement(
    engine_of: Engines, database_url: str
) -> None:
    """Of each engine, whether or not it has listeners of its own."""
    engine = engine_of(database_url)
    await ask(engine, "SELECT 1")
    heard, listen = listener()
    event.listen(Connection, "before_cursor_execute", listen)
    try:
        await ask(engine, "SELECT 2")
    finally:
        event.remove(Connection, "before_cursor_execute", listen)
    assert heard == ["SELECT 2"]
