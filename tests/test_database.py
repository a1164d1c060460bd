"""The database of an app or a script: its sessions, its account of them, its end."""

import asyncio
import gc
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    NullPool,
    String,
    Table,
    event,
    func,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import AsyncAdaptedQueuePool

from sanic_db_bp import (
    AsyncReadSession,
    ConfigurationError,
    Database,
    DatabaseSettings,
    DatabaseUnavailable,
    ReadOnlySession,
    ReadSession,
    SessionError,
    SessionFinished,
    current_session,
    on_commit,
)
from tests.databases import (
    on_every_driver,
    on_every_driver_of_servers,
    on_postgresql,
    on_sqlite,
)
from tests.proxy import proxied
from tests.servers import Server
from tests.slow_sql import all_are_free

ROOT = Path(__file__).parents[1]


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)
    stock: Mapped[int] = mapped_column(default=0)


def settings(url: str, **values: Any) -> DatabaseSettings:
    return DatabaseSettings(url=url, env_file=None, **values)


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with the table of items."""
    database = Database(settings(database_url))
    await database.create_missing_tables(Base.metadata)
    yield database
    await database.dispose(within=1)


async def count(database: Database) -> int:
    async with database.read_session() as session:
        return (await session.execute(select(func.count(Item.id)))).scalar_one()


def add(session: Session, name: str = "lamp") -> Item:
    item = Item(name=name)
    session.add(item)
    session.flush()
    return item


# Sessions


async def test_a_session_commits_at_the_end_of_its_block(database: Database) -> None:
    """The block needs no word about the transaction."""
    async with database.session() as session:
        assert isinstance(session, AsyncSession)
        session.add(Item(name="lamp"))
    assert await count(database) == 1


async def test_a_session_rolls_back_if_its_block_raises(database: Database) -> None:
    """The error passes, nothing remains, and no connection is held."""

    async def failing() -> None:
        async with database.session() as session:
            session.add(Item(name="lamp"))
            await session.flush()
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        await failing()
    assert await count(database) == 0
    assert database.pool_status()["checked_out"] == 0


@on_every_driver
async def test_a_failed_commit_raises_and_leaves_nothing(database: Database) -> None:
    """What the database refuses at the end of the block reaches the caller."""
    with pytest.raises(IntegrityError):
        async with database.session() as session:
            session.add_all([Item(name="lamp"), Item(name="lamp")])
    assert await count(database) == 0
    assert database.pool_status()["checked_out"] == 0


async def test_a_session_refuses_to_be_used_after_its_block(database: Database) -> None:
    """It never opens again in silence."""
    async with database.session() as session:
        await session.execute(select(Item))
    with pytest.raises(SessionFinished):
        await session.execute(select(Item))


async def test_no_connection_is_held_before_the_first_statement(database: Database) -> None:
    """A block that does nothing costs nothing."""
    async with database.session() as session:
        assert database.pool_status()["checked_out"] == 0
        await session.execute(select(Item))
        assert database.pool_status()["checked_out"] == 1
    assert database.pool_status()["checked_out"] == 0


@on_every_driver
async def test_a_session_may_have_its_own_isolation_level(database: Database) -> None:
    """It holds for the block alone."""
    async with database.session(isolation_level="SERIALIZABLE") as session:
        connection = await session.connection()
        assert await connection.get_isolation_level() == "SERIALIZABLE"
    if database.url.drivername.startswith("sqlite"):
        return
    async with database.session() as session:
        connection = await session.connection()
        assert await connection.get_isolation_level() != "SERIALIZABLE"


async def test_an_isolation_level_that_the_database_does_not_have(database: Database) -> None:
    """It is refused before a connection is taken, which SQLAlchemy would not give back."""
    with pytest.raises(ConfigurationError, match=r"'SNAPSHOT'.*There are: .*SERIALIZABLE"):
        async with database.session(isolation_level="SNAPSHOT"):
            pass
    assert database.pool_status()["checked_out"] == 0


@on_every_driver
async def test_autocommit_keeps_what_was_done_before_an_error(database: Database) -> None:
    """A session asked for with AUTOCOMMIT has no transaction to roll back."""

    async def failing() -> None:
        async with database.session(isolation_level="AUTOCOMMIT") as session:
            await session.execute(text("INSERT INTO item (id, name, stock) VALUES (1, 'a', 0)"))
            raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        await failing()
    assert await count(database) == 1


async def test_sessions_of_one_database_are_independent(database: Database) -> None:
    """Blocks inside each other are transactions of their own; the innermost is current."""
    async with database.session() as outer:
        assert current_session() is outer
        async with database.session() as inner:
            assert inner is not outer
            assert current_session() is inner
        assert current_session() is outer


async def test_the_class_of_the_session_can_be_chosen(database_url: str) -> None:
    """A database that has classes of its own hands out their instances."""

    class ShopSession(Session):
        pass

    class AsyncShopSession(AsyncSession):
        sync_session_class = ShopSession

    class ShopReadSession(ReadSession):
        pass

    class AsyncShopReadSession(AsyncReadSession):
        sync_session_class = ShopReadSession

    database = Database(
        settings(database_url),
        session_class=ShopSession,
        async_session_class=AsyncShopSession,
        read_session_class=ShopReadSession,
        async_read_session_class=AsyncShopReadSession,
    )
    async with database.session() as session:
        assert isinstance(session, AsyncShopSession)
        assert isinstance(session.sync_session, ShopSession)
    async with database.read_session() as read_session:
        assert isinstance(read_session, AsyncShopReadSession)
        assert isinstance(read_session.sync_session, ShopReadSession)
    assert database.form_of(AsyncShopSession) == "async_session"
    assert database.form_of(AsyncSession) is None
    await database.dispose()


async def test_objects_are_read_anew_after_a_commit_if_wanted(database_url: str) -> None:
    """EXPIRE_ON_COMMIT is SQLAlchemy's option of that name; by default it is off."""
    for expires in (False, True):
        database = Database(settings(database_url, expire_on_commit=expires))
        await database.create_missing_tables(Base.metadata)
        async with database.session() as session:
            item = Item(name=f"lamp {expires}")
            session.add(item)
            await session.commit()
            assert ("name" in item.__dict__) is not expires
        await database.dispose()


# Reading alone


async def test_a_read_session_reads_what_was_committed(database: Database) -> None:
    """Without a transaction around several statements."""
    async with database.session() as session:
        session.add(Item(name="lamp"))
    async with database.read_session() as read_session:
        assert isinstance(read_session, AsyncReadSession)
        assert (await read_session.scalars(select(Item.name))).all() == ["lamp"]


async def test_a_read_session_refuses_changed_objects(database: Database) -> None:
    """At the flush, also where nobody flushes: at the end of the block."""

    async def writing() -> None:
        async with database.read_session() as session:
            await session.execute(select(Item))
            session.add(Item(name="lamp"))

    with pytest.raises(ReadOnlySession):
        await writing()
    assert await count(database) == 0


@on_every_driver
async def test_the_database_refuses_to_write_in_a_read_session(database: Database) -> None:
    """Statements that the session cannot judge are refused by the database."""
    async with database.read_session() as session:
        with pytest.raises(DBAPIError):
            await session.execute(text("INSERT INTO item (id, name, stock) VALUES (1, 'a', 0)"))
    assert await count(database) == 0


async def test_read_sessions_have_a_pool_of_their_own(database: Database) -> None:
    """It is there once one was used, and it can point to a replica."""
    assert database.read_pool_status() is None
    await count(database)
    assert database.read_pool_status() == {
        "size": 10,
        "checked_out": 0,
        "idle": 1,
        "overflow": 0,
    }


async def test_read_sessions_read_from_the_replica(tmp_path: Path) -> None:
    """READ_URL is where they connect to."""
    replica = Database(settings(f"sqlite:///{tmp_path / 'replica.db'}"))
    await replica.create_missing_tables(Base.metadata)
    await replica.run_sync(add)
    main = f"sqlite:///{tmp_path / 'main.db'}"
    database = Database(settings(main, read_url=f"sqlite:///{tmp_path / 'replica.db'}"))
    assert await count(database) == 1
    await database.dispose()
    await replica.dispose()


# Plain sessions


async def test_run_sync_calls_a_function_with_a_plain_session(database: Database) -> None:
    """It is committed when the function returns, and its value is passed on."""

    def work(session: Session, name: str, *, times: int) -> list[int]:
        assert type(session).__name__ == "Session"
        assert current_session(Session) is session
        assert current_session() is session
        return [add(session, f"{name} {number}").id for number in range(times)]

    assert await database.run_sync(work, "lamp", times=2) == [1, 2]
    assert await count(database) == 2


async def test_run_sync_refuses_a_coroutine_function(database: Database) -> None:
    """It would return before it has done anything, and nobody would await it."""

    async def work(session: Session) -> None:
        raise AssertionError("never called")

    for function in (work, partial(work)):
        wrong: Any = function
        with pytest.raises(SessionError, match="is a coroutine function"):
            await database.run_sync(wrong)


async def test_run_sync_rolls_back_if_the_function_raises(database: Database) -> None:
    """The error passes, nothing remains."""

    def failing(session: Session) -> None:
        add(session)
        raise KeyError("stop")

    with pytest.raises(KeyError, match="stop"):
        await database.run_sync(failing)
    assert await count(database) == 0


# How it is


@on_every_driver
async def test_ping_tells_how_long_the_answer_took(database: Database) -> None:
    """In seconds, without a connection kept."""
    assert 0 < await database.ping() < 5
    assert database.pool_status()["checked_out"] == 0


async def test_ping_names_the_setting_when_the_pool_is_exhausted(database_url: str) -> None:
    """An exhausted pool is no silent database."""
    database = Database(settings(database_url, pool_size=1, pool_timeout=0.1))
    async with database.session() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(DatabaseUnavailable, match="POOL_TIMEOUT"):
            await database.ping()
    await database.dispose()


async def test_ping_tells_that_the_server_is_away(own_server: Server) -> None:
    """With the database's name, also over a connection that was open before."""
    database = Database(settings(own_server.new_database()))
    await database.ping()
    await asyncio.to_thread(own_server.kill)
    with pytest.raises(DatabaseUnavailable, match="'db'"):
        await database.ping()
    await database.dispose()


@on_every_driver
async def test_ping_tells_of_a_statement_that_fails(database_url: str) -> None:
    """An error in the answer is unavailability too."""
    database = Database(settings(database_url))

    def fail(*_: object) -> None:
        raise OSError("connection lost")

    event.listen(database.engine.sync_engine, "before_cursor_execute", fail)
    with pytest.raises(DatabaseUnavailable, match="OSError: connection lost"):
        await database.ping()
    await database.dispose(within=0)


async def test_the_status_of_the_pool_is_told(database_url: str) -> None:
    """Its size, what is in use and what is idle."""
    database = Database(settings(database_url, pool_size=2, max_overflow=1))
    size = 1 if database_url.startswith("sqlite") else 2
    idle = {"size": size, "checked_out": 0, "idle": 0, "overflow": 0}
    assert database.pool_status() == idle
    async with database.session() as session:
        await session.execute(text("SELECT 1"))
        assert database.pool_status() == {**idle, "checked_out": 1}
    assert database.pool_status() == {**idle, "idle": 1}
    await database.dispose()


@on_every_driver_of_servers
async def test_a_foreign_pool_has_no_status(database_url: str) -> None:
    """Zeros for a pool that does not count."""
    options = {"poolclass": NullPool}
    database = Database(settings(database_url, engine_options=options))
    await database.ping()
    assert set(database.pool_status().values()) == {0}
    await database.dispose()


async def test_its_text_has_no_password() -> None:
    """The name and the URL tell a reader which database it is."""
    database = Database(settings("postgresql://shop@db/shop", password="s3cret"), name="shop")
    assert repr(database) == "<Database shop: postgresql+asyncpg://shop:***@db/shop>"


async def test_without_a_url_the_given_file_is_used(tmp_path: Path) -> None:
    """A blueprint gives the file that is named after the app."""
    database = Database(
        DatabaseSettings(env_file=None, url=None), default_url=f"sqlite:///{tmp_path / 'shop.db'}"
    )
    await database.ping()
    assert (tmp_path / "shop.db").exists()
    await database.dispose()


# MAX_CONNECTIONS


@pytest.mark.parametrize(
    ("maximum", "workers", "pool_size", "max_overflow", "sizes"),
    [
        (80, 4, 20, 0, (10, 10)),
        (80, 1, 5, 100, (40, 40)),
        (9, 1, 10, 0, (5, 4)),
        (9, 4, 10, 5, (1, 1)),
        (2, 1, 10, 5, (1, 1)),
        (None, 4, 10, 5, (15, 15)),
    ],
)
def test_connections_are_divided_among_workers_and_pools(
    maximum: int | None, workers: int, pool_size: int, max_overflow: int, sizes: tuple[int, int]
) -> None:
    """All pools of all workers together never open more than MAX_CONNECTIONS."""
    values = settings(
        "postgresql://u@h/d",
        max_connections=maximum,
        pool_size=pool_size,
        max_overflow=max_overflow,
    )
    database = Database(values, workers=workers)
    pools: list[Any] = [database.engine.pool, database.read_engine.pool]
    assert tuple(pool.size() + pool._max_overflow for pool in pools) == sizes
    # SQLAlchemy takes a negative overflow for one without end.
    assert min(pool._max_overflow for pool in pools) >= 0
    assert maximum is None or sum(sizes) * workers <= maximum


@pytest.mark.parametrize(("maximum", "workers"), [(1, 1), (15, 8)])
def test_too_few_connections_for_the_workers_are_refused(maximum: int, workers: int) -> None:
    """Rather than exceeded in silence."""
    database = Database(settings("postgresql://u@h/d", max_connections=maximum), workers=workers)
    with pytest.raises(ConfigurationError, match="MAX_CONNECTIONS"):
        _ = database.engine


# The start


async def test_the_start_waits_for_a_database_that_is_coming_up(
    own_server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    """One line tells that it waits; a connection is open afterwards."""
    url = own_server.new_database()
    own_server.stop()
    database = Database(settings(url, startup_timeout=15))
    waiting = asyncio.create_task(database.wait_until_up())
    async with asyncio.timeout(10):
        while "waiting for it to come up" not in caplog.text:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.to_thread(own_server.start)
    await waiting
    assert database.pool_status()["idle"] == 1
    assert caplog.text.count("waiting for it to come up") == 1
    await database.dispose()


@pytest.mark.parametrize("driver", ["postgresql+psycopg", "mysql+aiomysql", "postgresql+asyncpg"])
async def test_the_start_gives_up_on_a_database_that_is_away(
    driver: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After STARTUP_TIMEOUT and few attempts, with the reason and without the password."""
    database = Database(settings(f"{driver}://u:s3cret@127.0.0.1:1/d", startup_timeout=0.3))
    attempts = 0
    ping = database.ping

    async def counted() -> float:
        nonlocal attempts
        attempts += 1
        return await ping()

    monkeypatch.setattr(database, "ping", counted)
    started = asyncio.get_running_loop().time()
    with pytest.raises(DatabaseUnavailable, match="connecting failed") as caught:
        await database.wait_until_up()
    assert 0.3 <= asyncio.get_running_loop().time() - started < 2
    assert "s3cret" not in str(caught.value)
    assert caplog.text.count("waiting for it to come up") == 1
    assert 2 <= attempts <= 3
    await database.dispose()


async def test_the_start_tries_once_if_it_may_not_wait() -> None:
    """STARTUP_TIMEOUT=0 stands for one attempt."""
    database = Database(settings("postgresql://u@127.0.0.1:1/d", startup_timeout=0))
    with pytest.raises(DatabaseUnavailable, match="connecting failed"):
        await database.wait_until_up()
    await database.dispose()


@pytest.mark.parametrize(
    ("path", "cause"),
    [
        (
            "none/shop.db",
            "'{}/none/shop.db' cannot be opened: there is no folder '{}/none'. Create",
        ),
        ("", "'{}' cannot be opened: it is a folder. Add the name of a file"),
        ("loop.db", "'{}/loop.db' cannot be opened: it, or its folder, may not be used by this"),
        # A URI of SQLite's own may mean more than a file.
        ("file:none.db?mode=ro&uri=true", "OperationalError: unable to open database file"),
    ],
)
async def test_a_file_that_cannot_be_opened_is_named(
    tmp_path: Path, path: str, cause: str, caplog: pytest.LogCaptureFixture
) -> None:
    """SQLite itself does not say which, and why; the line in the log comes at once."""
    (tmp_path / "loop.db").symlink_to("loop.db")
    url = f"sqlite:///{path}" if path.startswith("file:") else f"sqlite:///{tmp_path}/{path}"
    database = Database(settings(url, startup_timeout=0.1))
    with pytest.raises(DatabaseUnavailable) as caught:
        await database.wait_until_up()
    assert cause.format(tmp_path, tmp_path) in str(caught.value)
    (line,) = caplog.messages
    assert cause.format(tmp_path, tmp_path) in line
    await database.dispose()
    # aiosqlite's thread still tells the loop that it ends.
    await asyncio.sleep(0.1)


@pytest.mark.parametrize("driver", ["postgresql+asyncpg", "mysql+asyncmy", "mysql+aiomysql"])
async def test_the_start_gives_up_on_a_database_that_never_answers(driver: str) -> None:
    """A socket that opens and stays silent does not hold the start beyond its time."""
    clients: list[asyncio.StreamWriter] = []
    silent = await asyncio.start_server(lambda _, client: clients.append(client), "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    database = Database(settings(f"{driver}://u@127.0.0.1:{port}/d", startup_timeout=0.2))
    async with asyncio.timeout(3):
        with pytest.raises(DatabaseUnavailable):
            await database.wait_until_up()
    await database.dispose()
    silent.close()
    for client in clients:
        client.transport.abort()
    await asyncio.gather(*[each.wait_closed() for each in clients], return_exceptions=True)


async def test_pending_migrations_are_asked_for_on_a_given_connection(
    database: Database,
) -> None:
    """Whoever has one already does not wait for another, of which there may be none."""
    asked: list[object] = []

    def find_pending(connection: Connection) -> list[str]:
        asked.append(connection)
        assert database.pool_status()["checked_out"] == 1
        return ["second"]

    database.find_pending = find_pending
    async with database.engine.connect() as connection:
        assert await database.pending_migrations(connection) == ["second"]
        assert asked == [connection.sync_connection]
    assert await database.pending_migrations() == ["second"]


@on_every_driver
async def test_missing_tables_are_created(database: Database) -> None:
    """Those that are there are kept, with their rows."""
    await database.run_sync(add)
    more = MetaData()
    Table("item", more, Column("id", Integer, primary_key=True))
    Table("other", more, Column("id", Integer, primary_key=True))
    for _ in range(2):
        await database.create_missing_tables(more)
    async with database.read_session() as session:
        assert (await session.execute(text("SELECT id FROM other"))).all() == []
    assert await count(database) == 1


CREATE_TABLES = """
    import asyncio, sys
    from sqlalchemy import Column, Integer, MetaData, Table
    from sanic_db_bp import Database, DatabaseSettings

    metadata = MetaData()
    for number in range(5):
        Table(f"t{number}", metadata, Column("id", Integer, primary_key=True))

    async def main():
        database = Database(DatabaseSettings(url=sys.argv[1], env_file=None))
        sys.stdin.readline()
        await database.create_missing_tables(metadata)
        await database.dispose()

    asyncio.run(main())
"""


async def test_two_processes_create_the_tables_at_once(database_url: str) -> None:
    """One creates them, the others find them; none fails."""
    processes = [start(CREATE_TABLES, database_url) for _ in range(2)]
    outcomes = await asyncio.gather(
        *[asyncio.to_thread(process.communicate, "go\n", 60) for process in processes]
    )
    assert [
        (process.returncode, out) for process, out in zip(processes, outcomes, strict=True)
    ] == [(0, ("", ""))] * 2


def start(script: str, *arguments: str) -> "subprocess.Popen[str]":
    """Run a script in a process of its own, in which a warning is an error that shows."""
    return subprocess.Popen(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


# The end

SCRIPT = """
    import asyncio, gc, sys
    from sqlalchemy import text
    from sanic_db_bp import Database, DatabaseSettings

    async def with_sessions(database):
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
        async with database.read_session() as session:
            await session.execute(text("SELECT 1"))

    async def with_ping(database):
        await database.ping()

    async def with_engine(database):
        async with database.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    for way in (with_sessions, with_ping, with_engine):
        database = Database(DatabaseSettings(url=sys.argv[1], env_file=None))
        for number in range(2):
            asyncio.run(way(database))
        print(way.__name__)

    async def with_one_that_nobody_holds():
        await Database(DatabaseSettings(url=sys.argv[1], env_file=None)).ping()
        gc.collect()

    asyncio.run(with_one_that_nobody_holds())
    gc.collect()
    print("done")
"""

TOLD = "with_sessions\nwith_ping\nwith_engine\ndone\n"


@on_every_driver
async def test_a_script_needs_no_disposal(database_url: str) -> None:
    """At the end of asyncio.run all connections are closed, and a second run opens new ones."""
    process = start(SCRIPT, database_url)
    told = await asyncio.to_thread(process.communicate, None, 60)
    assert told == (TOLD, "")


async def test_a_script_in_memory_leaves_no_file(tmp_path: Path) -> None:
    """The private file behind SQLite's memory is removed with the process."""
    process = start(
        f"import tempfile; tempfile.tempdir = {str(tmp_path)!r}\n" + textwrap.dedent(SCRIPT),
        "sqlite://",
    )
    told = await asyncio.to_thread(process.communicate, None, 60)
    assert told == (TOLD, "")
    assert os.listdir(tmp_path) == []


async def test_disposal_waits_for_sessions_under_way(database: Database) -> None:
    """What a session began before the end is committed."""
    used, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with database.session() as session:
            session.add(Item(name="lamp"))
            await session.flush()
            used.set()
            await go_on.wait()

    working = asyncio.create_task(work())
    await used.wait()
    disposing = asyncio.create_task(database.dispose())
    await asyncio.sleep(0)
    assert not disposing.done()
    go_on.set()
    await asyncio.gather(working, disposing)
    assert await count(database) == 1


async def test_disposal_waits_for_sessions_that_wait_for_a_connection(database_url: str) -> None:
    """They came before the end as well."""
    database = Database(settings(database_url, pool_size=1, pool_timeout=5))
    used, go_on = asyncio.Event(), asyncio.Event()

    async def holding() -> int:
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            used.set()
            await go_on.wait()
            return 1

    async def waiting() -> Any:
        async with database.session() as session:
            return await session.scalar(text("SELECT 2"))

    tasks = [asyncio.create_task(holding())]
    await used.wait()
    tasks.append(asyncio.create_task(waiting()))
    await asyncio.sleep(0.01)
    disposing = asyncio.create_task(database.dispose())
    await asyncio.sleep(0)
    go_on.set()
    assert await asyncio.gather(*tasks) == [1, 2]
    await disposing


@on_every_driver
async def test_disposal_cuts_off_what_takes_too_long(database: Database) -> None:
    """After the given time the connection is closed; the session refuses, nothing remains."""
    used, go_on = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        async with database.session() as session:
            session.add(Item(name="lamp"))
            await session.flush()
            used.set()
            await go_on.wait()
            await session.execute(select(Item))

    working = asyncio.create_task(work())
    await used.wait()
    async with asyncio.timeout(2):
        await database.dispose(within=0.05)
    go_on.set()
    with pytest.raises(SessionFinished):
        await working
    assert await count(database) == 0


async def test_a_block_that_was_cut_off_does_not_end_well(database: Database) -> None:
    """Nothing was stored: that is an error, and what waits for the COMMIT is not called."""
    called: list[str] = []

    async def work() -> None:
        async with database.session() as session:
            session.add(Item(name="lamp"))
            await session.flush()
            on_commit(lambda: called.append("on_commit"))
            await database.dispose(within=0)

    with pytest.raises(SessionFinished):
        await work()
    assert called == []
    assert await count(database) == 0


@pytest.mark.parametrize("own_server", ["postgresql"], indirect=True)
async def test_disposal_is_bounded_if_the_server_is_frozen(own_server: Server) -> None:
    """A connection that cannot be closed in order is cut."""
    database = Database(settings(own_server.new_database()))
    async with database.session() as session:
        process: int = (await session.execute(text("SELECT pg_backend_pid()"))).scalar_one()
    os.kill(process, signal.SIGSTOP)
    try:
        async with asyncio.timeout(3):
            await database.dispose(within=0.1)
    finally:
        os.kill(process, signal.SIGCONT)


@on_postgresql
async def test_a_disposal_that_fails_is_logged(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A pool of another class waits for each goodbye; the end comes all the same."""
    monkeypatch.setattr("sanic_db_bp.connections.pool.CLOSE_WITHIN", 0.05)
    async with proxied(database_url) as proxy:
        pool = {"poolclass": AsyncAdaptedQueuePool}
        database = Database(settings(proxy.url, engine_options=pool))
        await database.ping()
        proxy.freeze()
        async with asyncio.timeout(1):
            await database.dispose()
    assert "closing the connections of postgresql+asyncpg://" in caplog.text


@on_every_driver
async def test_a_database_can_be_used_again_after_its_disposal(database: Database) -> None:
    """With new connections, and nothing of the disposal comes later."""
    for number in range(3):
        async with database.session() as session:
            session.add(Item(name=f"lamp {number}"))
            await session.flush()
            await asyncio.sleep(0.01)
            assert (await session.scalars(select(func.count(Item.id)))).one() == number + 1
        await database.dispose()


async def test_disposal_of_an_unused_database_does_nothing(database_url: str) -> None:
    """Twice in a row, too."""
    database = Database(settings(database_url))
    await database.dispose()
    await database.dispose()


async def test_settings_are_looked_up_when_they_are_needed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A database made at import time reads the environment at its first use."""
    database = Database()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SANIC_DB_URL", "sqlite:///shop.db")
    assert database.url.database == "shop.db"


# SQLite


async def test_a_database_in_memory_that_is_forgotten_leaves_no_file() -> None:
    """Nobody disposed it, and nobody can any more."""
    database = Database(settings("sqlite://"))
    folder = Path(database.engine.url.database or "").parent
    assert folder.is_dir()
    del database
    gc.collect()
    assert not folder.exists()


async def test_tables_that_are_there_are_not_created_again(database: Database) -> None:
    """Neither are the app's own listeners called, which may fill new tables."""
    created: list[object] = []
    metadata = MetaData()
    Table("shelf", metadata, Column("id", Integer, primary_key=True))
    event.listen(metadata, "after_create", lambda *_, **__: created.append("tables"))
    for _ in range(2):
        await database.create_missing_tables(metadata)
    assert created == ["tables"]


@pytest.mark.parametrize("url", ["sqlite://", "sqlite:///:memory:"])
async def test_a_database_in_memory_is_shared_by_all_sessions(url: str) -> None:
    """Readers and writers at once see the same data, until the end; then it is gone."""
    database, other = Database(settings(url)), Database(settings(url))
    await database.create_missing_tables(Base.metadata)
    await database.run_sync(add)
    async with database.session() as session, database.read_session() as read_session:
        session.add(Item(name="table"))
        await session.flush()
        assert (await read_session.scalars(select(func.count(Item.id)))).one() == 1
    assert await count(database) == 2
    with pytest.raises(DBAPIError, match="no such table"):
        await count(other)
    folder = Path(database.engine.url.database or "").parent
    await database.dispose()
    assert not folder.exists()
    with pytest.raises(DBAPIError, match="no such table"):
        await count(database)
    await database.dispose()
    await other.dispose()


@on_every_driver
async def test_fifty_writers_lose_no_update(database: Database) -> None:
    """Read, modify, write at once: every one counts, and none fails with a locked database."""
    await database.run_sync(add)
    lock = {} if database.url.drivername.startswith("sqlite") else {"with_for_update": True}

    async def write() -> None:
        async with database.session() as session:
            item = await session.get_one(Item, 1, **lock)  # type: ignore[arg-type]
            item.stock += 1

    await asyncio.gather(*[write() for _ in range(50)])
    async with database.read_session() as session:
        assert (await session.get_one(Item, 1)).stock == 50


WRITERS = """
    import asyncio, sys
    from sqlalchemy import text
    from sanic_db_bp import Database, DatabaseSettings

    async def main():
        database = Database(DatabaseSettings(url=sys.argv[1], env_file=None))

        async def write():
            async with database.session() as session:
                stock = await session.scalar(text("SELECT stock FROM item"))
                await session.execute(text("UPDATE item SET stock = :s"), {"s": stock + 1})

        await asyncio.gather(*[write() for _ in range(25)])

    asyncio.run(main())
"""


@on_sqlite
async def test_writers_in_two_processes_lose_no_update(
    database: Database, database_url: str
) -> None:
    """The workers of one server share the file."""
    await database.run_sync(add)
    processes = [start(WRITERS, database_url) for _ in range(2)]
    outcomes = [await asyncio.to_thread(process.communicate, None, 30) for process in processes]
    assert outcomes == [("", "")] * 2
    async with database.read_session() as session:
        assert (await session.get_one(Item, 1)).stock == 50


# Cancellation


@on_every_driver
async def test_what_was_committed_is_known_whenever_the_task_is_cancelled(
    database: Database,
) -> None:
    """Over many cancellations: as many rows are durable as on_commit was called for."""
    known: list[int] = []

    async def work(number: int) -> None:
        async with database.session() as session:
            session.add(Item(name=f"item {number}"))
            on_commit(lambda: known.append(number))
            await session.flush()

    for number in range(60):
        task = asyncio.create_task(work(number))
        for _ in range(2 * number):
            await asyncio.sleep(0)
        # Some are over by now, some are cancelled before, in and after their COMMIT.
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    async with database.read_session() as session:
        names = (await session.scalars(select(Item.name).order_by(Item.id))).all()
    assert sorted(names) == sorted(f"item {number}" for number in known)
    assert await all_are_free(database)


@on_every_driver
async def test_a_cancelled_block_leaves_no_transaction_behind(database: Database) -> None:
    """A task that is cancelled in Python code rolls back, and the connection is free again."""
    used = asyncio.Event()

    async def work() -> None:
        async with database.session() as session:
            session.add(Item(name="lamp"))
            await session.flush()
            used.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await used.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert database.pool_status()["checked_out"] == 0
    await database.run_sync(add)
    assert await count(database) == 1


@on_every_driver
async def test_a_timeout_in_a_block_keeps_the_database_usable(database: Database) -> None:
    """asyncio.timeout around a statement fires, and the next session is clean."""
    sleep = {
        "postgresql": "SELECT pg_sleep(9)",
        "mysql": "SELECT SLEEP(9)",
        "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) "
        "SELECT count(*) FROM (SELECT i FROM n LIMIT 3000000)",
    }[database.backend.name]
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05), database.session() as session:
            await session.execute(text(sleep))
    async with asyncio.timeout(5):
        await database.run_sync(add)
    assert await count(database) == 1
