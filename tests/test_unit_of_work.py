"""A unit of work is one transaction: opened lazily, finished exactly once."""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import time
import weakref
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any

import pytest
from sqlalchemy import event, func, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError, ResourceClosedError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp import (
    ConcurrentSessionUse,
    Database,
    DatabaseSettings,
    SessionFinished,
    current_session,
    on_commit,
)
from sanic_db_bp.bridge import await_only, bridged, run_in_bridge, uninterrupted
from sanic_db_bp.unit_of_work import UnitOfWork
from tests.databases import on, on_postgresql, on_sqlite
from tests.slow_sql import all_are_free, make_slow_commit, sleep_for, teach_to_sleep


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    number: Mapped[int] = mapped_column(unique=True)


COUNT = select(func.count()).select_from(Item)
ONE = text("SELECT 1")


async def opened(url: str) -> Database:
    database = Database(
        DatabaseSettings(url=url, env_file=None, pool_size=2, pool_timeout=2), name="shop"
    )
    teach_to_sleep(database.engine, database.read_engine)
    await database.create_missing_tables(Base.metadata)
    return database


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with an empty table; at the end no connection of it is in use."""
    database = await opened(database_url)
    yield database
    free = await all_are_free(database)
    await database.dispose(within=1)
    assert free


@pytest.fixture
def statements(database: Database) -> list[str]:
    """What is sent to the database about transactions, in order."""
    sent: list[str] = []
    for name in ("begin", "commit", "rollback"):
        event.listen(database.engine.sync_engine, name, lambda _, name=name: sent.append(name))
    return sent


async def count(database: Database) -> int:
    async with database.session() as session:
        return (await session.scalars(COUNT)).one()


async def use(unit: UnitOfWork, number: int = 1) -> None:
    unit.async_session.add(Item(number=number))
    await unit.async_session.flush()


def in_use(database: Database) -> int:
    return database.pool_status()["checked_out"]


async def test_nothing_is_opened_before_the_first_statement(
    database: Database, statements: list[str]
) -> None:
    """Sessions alone cost no connection, and neither does the end of a unused one."""
    async with database.block() as unit:
        unit.session.add(Item(number=1))
        unit.session.expunge_all()
        assert unit.async_read_session is not None
        assert in_use(database) == 0
    async with database.block():
        pass
    assert statements == []


async def test_nothing_is_held_after_a_commit(database: Database) -> None:
    """The connection is back in the pool between an explicit commit and the next statement."""
    async with database.block() as unit:
        await use(unit)
        assert in_use(database) == 1
        await unit.async_session.commit()
        assert in_use(database) == 0
        assert await unit.async_session.scalar(COUNT) == 1
        assert in_use(database) == 1
    assert in_use(database) == 0


async def test_a_good_end_commits_once(database: Database, statements: list[str]) -> None:
    """One BEGIN, one COMMIT, nothing else."""
    async with database.block() as unit:
        await use(unit)
    assert statements == ["begin", "commit"]
    assert unit.commits == 1
    assert await count(database) == 1


async def test_a_bad_end_rolls_back_once(database: Database, statements: list[str]) -> None:
    """One BEGIN, one ROLLBACK, and the error goes on."""

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            raise LookupError

    with pytest.raises(LookupError):
        await work()
    assert statements == ["begin", "rollback"]
    assert await count(database) == 0


async def test_an_ended_unit_of_work_ends_only_once(
    database: Database, statements: list[str]
) -> None:
    """Ending it again, in whatever way, does nothing."""
    unit = database.unit_of_work()
    await use(unit)
    unit.on_commit(lambda: statements.append("callback"))
    assert unit.in_transaction
    await run_in_bridge(unit.commit)
    await run_in_bridge(unit.rollback)
    await run_in_bridge(unit.commit)
    unit.discard()
    assert statements == ["begin", "commit", "callback"]
    assert unit.finished
    assert not unit.in_transaction


@pytest.mark.parametrize("first", ["commit", "rollback"])
async def test_an_end_without_a_transaction_is_the_only_one(database: Database, first: str) -> None:
    """What waits for a COMMIT is called once at a good end, and never after a bad one."""
    called: list[str] = []
    unit = database.unit_of_work()
    unit.on_commit(lambda: called.append("callback"))
    await run_in_bridge(getattr(unit, first))
    await run_in_bridge(unit.commit)
    assert called == (["callback"] if first == "commit" else [])


async def test_a_failing_commit_rolls_everything_back(database: Database) -> None:
    """The error of the flush is raised, nothing is stored and nothing is held."""
    units: list[UnitOfWork] = []

    async def work() -> None:
        async with database.block() as unit:
            units.append(unit)
            await use(unit, 1)
            unit.session.add(Item(number=1))

    with pytest.raises(DBAPIError):
        await work()
    assert units[0].finished
    assert units[0].commits == 0
    assert in_use(database) == 0
    assert await count(database) == 0


@on("postgresql", every_driver=True)
async def test_a_deferred_constraint_fails_the_commit(database: Database) -> None:
    """An error of COMMIT itself is raised; callbacks do not run."""
    async with database.session() as session:
        await session.execute(text("ALTER TABLE item ADD UNIQUE (number) DEFERRABLE"))
        await session.execute(text("ALTER TABLE item DROP CONSTRAINT item_number_key"))
    called: list[int] = []

    async def work() -> None:
        async with database.session() as session:
            await session.execute(text("SET CONSTRAINTS ALL DEFERRED"))
            session.add_all([Item(number=1), Item(number=1)])
            on_commit(lambda: called.append(1))
            await session.flush()

    with pytest.raises(DBAPIError):
        await work()
    assert called == []
    assert in_use(database) == 0
    assert await count(database) == 0


@on("postgresql", every_driver=True)
@pytest.mark.parametrize("error", [LookupError, asyncio.CancelledError])
async def test_a_lost_connection_does_not_hide_the_error(
    database: Database, error: type[BaseException]
) -> None:
    """ROLLBACK fails as well then; the caller gets what it raised itself."""

    async def work() -> None:
        async with database.block() as unit:
            await kill_connection(database, unit)
            raise error("mine")

    with pytest.raises(error, match="mine"):
        await work()
    assert in_use(database) == 0
    assert await count(database) == 0


async def kill_connection(database: Database, unit: UnitOfWork) -> None:
    backend = await unit.async_session.scalar(text("SELECT pg_backend_pid()"))
    async with database.session() as session:
        # It answers when the backend is gone.
        await session.execute(text(f"SELECT pg_terminate_backend({backend}, 5000)"))


@on("postgresql", every_driver=True)
async def test_a_lost_connection_fails_the_commit(database: Database) -> None:
    """Without a COMMIT there is no success."""

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            await kill_connection(database, unit)

    with pytest.raises(DBAPIError):
        await work()
    assert in_use(database) == 0
    assert await count(database) == 0


async def test_callbacks_run_after_the_commit(database: Database) -> None:
    """In their order, plain and asynchronous, when the row is there for everybody."""
    called: list[object] = []

    async def look() -> None:
        called.append(await count(database))

    async with database.session() as session:
        session.add(Item(number=1))
        on_commit(lambda: called.append("first"))
        on_commit(look)
        on_commit(lambda: called.append("last"))
        await session.flush()
        assert called == []
    assert called == ["first", 1, "last"]


async def test_callbacks_never_run_after_a_rollback(database: Database) -> None:
    """Not after an error, not after an explicit rollback, not after close and reset."""
    called: list[str] = []

    async def work() -> None:
        async with database.session() as session:
            await session.execute(ONE)
            on_commit(lambda: called.append("error"))
            raise LookupError

    with pytest.raises(LookupError):
        await work()
    for end in ("rollback", "close", "reset", "invalidate"):
        async with database.session() as session:
            await session.execute(ONE)
            on_commit(lambda end=end: called.append(end))
            await getattr(session, end)()
            await session.execute(ONE)
    assert called == []


@pytest.mark.parametrize("end", ["rollback", "close", "reset"])
async def test_a_rollback_before_the_first_statement_forgets_callbacks(
    database: Database, end: str
) -> None:
    """Also where there is no transaction yet, and nothing to tell the database."""
    called: list[str] = []
    async with database.session() as session:
        on_commit(lambda: called.append("before"))
        await getattr(session, end)()
        on_commit(lambda: called.append("after"))
        await session.execute(ONE)
    assert called == ["after"]


@on_sqlite
async def test_callbacks_run_after_an_explicit_commit(database: Database) -> None:
    """Each runs once, after the commit that follows it."""
    called: list[str] = []
    async with database.session() as session:
        await session.execute(ONE)
        on_commit(lambda: called.append("first"))
        await session.commit()
        assert called == ["first"]
        await session.execute(ONE)
        on_commit(lambda: called.append("second"))
        await session.commit()
        assert called == ["first", "second"]
        on_commit(lambda: called.append("third"))
    assert called == ["first", "second", "third"]


@on_sqlite
async def test_callbacks_run_after_a_begin_block(database: Database) -> None:
    """The end of a block commits as well, in either form of the session."""
    called: list[str] = []

    def plain(session: Session) -> None:
        with session.begin():
            session.execute(ONE)
            on_commit(lambda: called.append("plain"))
        assert called == ["asyncio", "plain"]

    async with database.session() as session:
        async with session.begin():
            on_commit(lambda: called.append("asyncio"))
            await session.execute(ONE)
        assert called == ["asyncio"]
        await session.run_sync(plain)


@on_sqlite
async def test_callbacks_run_after_the_transactions_own_commit(database: Database) -> None:
    """The object that begin() returns commits as well."""
    called: list[str] = []

    def plain(session: Session) -> None:
        transaction = session.begin()
        session.execute(ONE)
        on_commit(lambda: called.append("committed"))
        transaction.commit()
        assert called == ["committed"]

    await database.run_sync(plain)


@on_sqlite
async def test_callbacks_without_a_transaction_run_at_the_good_end(database: Database) -> None:
    """Work that touched nothing succeeded too; work that failed did not."""
    called: list[str] = []
    async with database.session():
        on_commit(lambda: called.append("good"))

    async def work() -> None:
        async with database.session():
            on_commit(lambda: called.append("bad"))
            raise LookupError

    with pytest.raises(LookupError):
        await work()
    assert called == ["good"]


async def test_callbacks_of_a_savepoint_share_its_fate(database: Database) -> None:
    """Released, they wait for the COMMIT; rolled back, they are forgotten, the outer ones not."""
    called: list[str] = []
    async with database.session() as session:
        await session.execute(ONE)
        on_commit(lambda: called.append("outer"))
        async with session.begin_nested():
            on_commit(lambda: called.append("released"))
            await session.execute(ONE)
        assert called == []
        with suppress(LookupError):
            async with session.begin_nested():
                on_commit(lambda: called.append("rolled back"))
                async with session.begin_nested():
                    on_commit(lambda: called.append("released into a rollback"))
                    await session.execute(ONE)
                raise LookupError
        async with session.begin_nested() as savepoint:
            on_commit(lambda: called.append("rolled back by hand"))
            await savepoint.rollback()
        on_commit(lambda: called.append("last"))
        assert called == []
    assert called == ["outer", "released", "last"]


async def test_a_failed_flush_in_a_savepoint_keeps_the_callbacks_around_it(
    database: Database,
) -> None:
    """What was registered in the savepoint is forgotten, the rest waits for the COMMIT."""
    called: list[str] = []
    async with database.session() as session:
        session.add(Item(id=1, number=1))
        await session.flush()
        session.expunge_all()
        on_commit(lambda: called.append("outer"))
        with suppress(IntegrityError):
            async with session.begin_nested():
                on_commit(lambda: called.append("inner"))
                session.add(Item(id=1, number=2))
                await session.flush()
    assert called == ["outer"]
    assert await count(database) == 1


async def test_a_commit_within_a_savepoint_calls_all(database: Database) -> None:
    """session.commit() releases every savepoint and commits."""
    called: list[str] = []
    async with database.session() as session:
        await session.begin_nested()
        on_commit(lambda: called.append("inner"))
        await session.begin_nested()
        on_commit(lambda: called.append("innermost"))
        await session.execute(ONE)
        await session.commit()
        assert called == ["inner", "innermost"]


@on_sqlite
async def test_a_failing_callback_is_logged(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """The transaction is durable: nobody is told otherwise, and the next callback runs."""
    called: list[str] = []

    def fails() -> None:
        raise LookupError("no mail")

    async def fails_later() -> None:
        await asyncio.sleep(0)
        raise LookupError("no queue")

    with caplog.at_level(logging.ERROR, "sanic.root.db"):
        async with database.session() as session:
            session.add(Item(number=1))
            on_commit(fails)
            on_commit(fails_later)
            on_commit(lambda: called.append("next"))
    assert called == ["next"]
    assert await count(database) == 1
    assert [record.levelname for record in caplog.records] == ["ERROR", "ERROR"]
    assert "no mail" in caplog.text
    assert "no queue" in caplog.text
    assert "the transaction is committed" in caplog.text


async def test_a_callback_may_use_the_session_after_an_explicit_commit(
    database: Database,
) -> None:
    """The unit of work goes on, and so does its session, in both forms."""
    called: list[object] = []

    def plain() -> None:
        called.append(current_session(Session).scalar(COUNT))

    async def asynchronous() -> None:
        called.append(await current_session(AsyncSession).scalar(COUNT))

    async with database.session() as session:
        session.add(Item(number=1))
        on_commit(plain)
        on_commit(asynchronous)
        await session.commit()
        assert called == [1, 1]


async def test_a_callback_may_open_a_session_of_its_own(database: Database) -> None:
    """The connection is back in the pool by then, also where there is but one."""
    called: list[int] = []

    async def look() -> None:
        called.append(await count(database))

    async with database.session() as session:
        session.add(Item(number=1))
        on_commit(look)
    assert called == [1]


async def test_a_callback_at_the_end_is_refused_the_session(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """What it would do more in the unit of work, nobody would commit: that is an error."""

    async def write() -> None:
        current_session(AsyncSession).add(Item(number=2))
        await current_session(AsyncSession).flush()

    async with database.session() as session:
        session.add(Item(number=1))
        on_commit(write)
    [line] = caplog.records
    assert line.exc_info is not None
    assert isinstance(line.exc_info[1], SessionFinished)
    assert in_use(database) == 0
    assert await count(database) == 1


@on_sqlite
async def test_a_callback_may_register_another(database: Database) -> None:
    """After an explicit commit it waits for the next one."""
    called: list[str] = []
    async with database.session() as session:
        await session.execute(ONE)
        on_commit(lambda: on_commit(lambda: called.append("second")))
        await session.commit()
        assert called == []
        await session.execute(ONE)
    assert called == ["second"]


@pytest.mark.parametrize("used", [True, False])
async def test_a_callback_outlasts_a_cancellation(database: Database, used: bool) -> None:
    """What was promised for the commit is done, and the cancellation goes on."""
    called: list[str] = []
    started = asyncio.Event()

    async def callback() -> None:
        started.set()
        await asyncio.sleep(0.05)
        called.append("done")

    async def work() -> None:
        async with database.session() as session:
            if used:
                await session.execute(ONE)
            on_commit(callback)

    task = asyncio.ensure_future(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert called == ["done"]


@on_sqlite
async def test_a_callback_outlasts_a_cancellation_for_a_while(
    database: Database, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """One that does not come to an end is cancelled too; its transaction is committed."""
    monkeypatch.setattr("sanic_db_bp.unit_of_work.CALLBACK_WITHIN", 0.05)
    started = asyncio.Event()

    async def callback() -> None:
        started.set()
        await asyncio.Event().wait()

    async def work() -> None:
        async with database.session() as session:
            session.add(Item(number=1))
            on_commit(callback)

    task = asyncio.ensure_future(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await count(database) == 1
    assert "on_commit" not in caplog.text


@on_sqlite
async def test_registering_after_the_end_is_refused(database: Database) -> None:
    """A callback that nothing would ever call is an error."""
    async with database.block() as unit:
        await unit.async_session.execute(ONE)
    with pytest.raises(SessionFinished, match="'shop'"):
        unit.on_commit(lambda: None)


async def test_a_session_in_use_at_the_end_fails_the_unit_of_work(database: Database) -> None:
    """The task that still uses it is waited for; then everything is rolled back, nothing cut."""
    tasks: list[asyncio.Task[Any]] = []
    sessions: list[AsyncSession] = []

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            sessions.append(unit.async_session)
            tasks.append(asyncio.ensure_future(sessions[0].execute(sleep_for(database, 0.1))))
            await asyncio.sleep(0.02)

    with pytest.raises(ConcurrentSessionUse):
        await work()
    assert await all_are_free(database)
    assert database.pool_status()["idle"] == 1, "the connection was cut"
    await tasks[0]
    with pytest.raises(SessionFinished):
        await sessions[0].execute(ONE)
    assert await count(database) == 0


async def test_a_task_that_still_closes_the_session_fails_the_unit_of_work(
    database: Database,
) -> None:
    """It would be chance what is stored: nothing is."""
    tasks: list[asyncio.Task[Any]] = []

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            tasks.append(asyncio.ensure_future(unit.async_session.close()))
            await asyncio.sleep(0)

    with pytest.raises(ConcurrentSessionUse):
        await work()
    await asyncio.wait(tasks)
    assert await all_are_free(database)
    assert await count(database) == 0


async def test_an_error_is_not_hidden_by_a_session_in_use(database: Database) -> None:
    """A failing sibling of a statement is what the caller hears of."""
    tasks: list[asyncio.Task[Any]] = []

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            tasks.append(
                asyncio.ensure_future(unit.async_session.execute(sleep_for(database, 0.1)))
            )
            await asyncio.sleep(0.02)
            raise LookupError

    with pytest.raises(LookupError):
        await work()
    await tasks[0]
    assert await all_are_free(database)
    assert await count(database) == 0


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Waits a moment, not seconds, for a task that still uses the session."""
    monkeypatch.setattr("sanic_db_bp.sessions.use.STILL_IN_USE", 0.1)


@pytest.mark.usefixtures("impatient")
async def test_a_session_in_use_for_too_long_is_cut_off(database: Database) -> None:
    """The task is cancelled, the connection cut, and its place in the pool is free."""
    started = time.monotonic()

    tasks: list[asyncio.Task[Any]] = []

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            tasks.append(
                asyncio.ensure_future(unit.async_session.execute(sleep_for(database, 0.6)))
            )
            await asyncio.sleep(0.02)

    with pytest.raises(ConcurrentSessionUse):
        await work()
    assert await all_are_free(database)
    assert await count(database) == 0
    assert time.monotonic() - started < 1.5
    await asyncio.wait(tasks)
    assert tasks[0].cancelled()


@pytest.mark.usefixtures("impatient")
async def test_a_cancellation_while_waiting_for_a_task_cuts_the_connection(
    database: Database,
) -> None:
    """The end of the unit of work is not put off any longer."""

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            tasks.append(asyncio.ensure_future(unit.async_session.execute(slow)))
            await asyncio.sleep(0.02)
            ending.set()

    slow = sleep_for(database, 0.6)
    tasks: list[asyncio.Task[Any]] = []
    ending = asyncio.Event()
    task = asyncio.ensure_future(work())
    await ending.wait()
    await asyncio.sleep(0.02)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await all_are_free(database)
    assert await count(database) == 0
    await asyncio.wait(tasks)
    assert tasks[0].cancelled(), "its statement was not asked to end"


async def test_a_rollback_that_fails_cuts_the_connection(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    """Whatever it fails at, such as a listener: nothing is held, and the first error counts."""

    def fail(_: object) -> None:
        raise LookupError("not now")

    async def work() -> None:
        async with database.block() as unit:
            event.listen(database.engine.sync_engine, "rollback", fail)
            await use(unit)
            raise asyncio.QueueFull

    with pytest.raises(asyncio.QueueFull):
        await work()
    event.remove(database.engine.sync_engine, "rollback", fail)
    assert in_use(database) == 0
    assert await count(database) == 0
    assert caplog.messages == ["shop: ROLLBACK failed, the connection was cut: not now"]


async def test_a_connection_that_was_cut_stays_closed(database: Database) -> None:
    """Who has kept it does not get another one out of the pool with it."""
    unit = database.unit_of_work()
    connection = await unit.async_session.connection()
    await run_in_bridge(unit.discard)
    await connection.rollback()
    with pytest.raises(ResourceClosedError):
        await connection.execute(ONE)
    assert in_use(database) == 0


async def test_discard_cuts_the_connections(database: Database) -> None:
    """Without a word to the database: nothing is stored, both places in the pools are free."""
    unit = database.unit_of_work()
    await use(unit)
    await unit.async_read_session.execute(ONE)
    session = unit.async_session
    await run_in_bridge(unit.discard)
    assert in_use(database) == 0
    read_pool = database.read_pool_status()
    assert read_pool is not None
    assert read_pool["checked_out"] == 0
    with pytest.raises(SessionFinished):
        await session.execute(ONE)
    assert await count(database) == 0
    await run_in_bridge(unit.rollback)


async def test_a_discarded_unit_of_work_is_over(database: Database) -> None:
    """A session that is asked for later refuses, and a disposal does not wait for it."""
    unit = database.unit_of_work()
    await use(unit)
    await run_in_bridge(unit.discard)
    with pytest.raises(SessionFinished):
        await unit.async_read_session.execute(ONE)
    async with asyncio.timeout(2):
        await database.dispose(within=5)


async def test_a_read_session_that_was_closed_needs_no_end(database: Database) -> None:
    """The transaction beside it is committed."""
    unit = database.unit_of_work()
    await use(unit)
    await unit.async_read_session.execute(ONE)
    await unit.async_read_session.close()
    await run_in_bridge(unit.commit)
    assert await count(database) == 1


async def test_discard_leaves_what_is_done(database: Database) -> None:
    """A connection that is back in the pool since a commit is not cut."""
    unit = database.unit_of_work()
    await use(unit)
    await unit.async_session.commit()
    await run_in_bridge(unit.discard)
    assert database.pool_status()["idle"] >= 1
    assert await count(database) == 1


@on_postgresql
@pytest.mark.usefixtures("impatient")
async def test_a_task_that_does_not_let_go_is_cut_off(database: Database) -> None:
    """A COMMIT under way outlasts its cancellation; the unit of work does not wait for ever."""
    await make_slow_commit(database)
    tasks: list[asyncio.Task[Any]] = []

    async def work() -> None:
        async with database.session() as session:
            await session.execute(text("INSERT INTO slow VALUES (1), (2), (3), (4), (5)"))
            tasks.append(asyncio.ensure_future(session.commit()))
            await asyncio.sleep(0.02)

    with pytest.raises(ConcurrentSessionUse):
        await work()
    assert in_use(database) == 0
    assert await all_are_free(database)
    assert await count(database) == 0
    await asyncio.wait(tasks)
    assert tasks[0].cancelled() or tasks[0].exception() is not None


@pytest.mark.usefixtures("impatient")
async def test_a_task_that_ignores_its_cancellation_is_cut_off(database: Database) -> None:
    """Such as in a listener of its flush: the unit of work ends, and holds no connection."""
    let_go = asyncio.Event()
    tasks: list[asyncio.Task[Any]] = []

    def hold(*_: object) -> None:
        await_only(uninterrupted(let_go.wait(), within=60))

    async def work() -> None:
        async with database.block() as unit:
            await use(unit, 1)
            event.listen(unit.session, "before_flush", hold)
            tasks.append(asyncio.ensure_future(use(unit, 2)))
            await asyncio.sleep(0)

    with pytest.raises(ConcurrentSessionUse):
        async with asyncio.timeout(5):
            await work()
    assert not tasks[0].done()
    assert in_use(database) == 0
    let_go.set()
    await asyncio.wait(tasks)
    assert await count(database) == 0


async def test_the_two_sessions_end_together(database: Database) -> None:
    """A read session's connection is given back too, at a good end and at a bad one."""
    for error in (None, LookupError):
        with suppress(LookupError):
            async with database.block() as unit:
                await unit.async_read_session.execute(ONE)
                if error is not None:
                    raise error
        read_pool = database.read_pool_status()
        assert read_pool is not None
        assert read_pool["checked_out"] == 0


async def test_a_cancelled_unit_of_work_is_rolled_back(database: Database) -> None:
    """A cancellation in Python code costs the transaction, not the connection."""
    started = asyncio.Event()

    async def work() -> None:
        async with database.block() as unit:
            await use(unit)
            started.set()
            await asyncio.sleep(5)

    task = asyncio.ensure_future(work())
    await started.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert database.pool_status()["checked_out"] == 0
    assert database.pool_status()["idle"] >= 1
    assert await count(database) == 0


@on("postgresql", every_driver=True)
async def test_blocks_nest_as_units_of_work_of_their_own(database: Database) -> None:
    """The inner block commits although the outer one fails; current_session follows."""

    async def work() -> None:
        async with database.session() as outer:
            outer.add(Item(number=1))
            await outer.flush()
            async with database.session() as inner:
                assert current_session(AsyncSession) is inner
                inner.add(Item(number=2))
            assert current_session(AsyncSession) is outer
            raise LookupError

    with pytest.raises(LookupError):
        await work()
    assert await count(database) == 1


class Held:
    """Something that is reachable from a session, and from nothing else."""


async def succeeds(database: Database, held: Held) -> weakref.ref[object]:
    async with database.session() as session:
        session.info["held"] = held
        session.add(Item(number=1))
        on_commit(lambda: None)
        return weakref.ref(session.sync_session)


async def fails(database: Database, held: Held) -> weakref.ref[object]:
    with suppress(LookupError):
        async with database.session() as session:
            session.info["held"] = held
            await session.execute(ONE)
            raise LookupError
    return weakref.ref(session.sync_session)


async def handles_plainly(database: Database, held: Held) -> weakref.ref[object]:
    async def handler(session: Session) -> None:
        session.info["held"] = held
        session.add(Item(number=1))
        session.flush()
        await asyncio.sleep(0)

    async with database.block(plain=True) as unit:
        session = unit.session
        await bridged(handler(session))
        assert unit.async_session is not None
        assert unit.read_session.scalar is not None
    return weakref.ref(session)


async def is_never_used(database: Database, held: Held) -> weakref.ref[object]:
    async with database.session() as session:
        session.info["held"] = held
        return weakref.ref(session.sync_session)


@pytest.mark.parametrize("work", [succeeds, fails, handles_plainly, is_never_used])
async def test_nothing_of_an_ended_unit_of_work_stays_alive(database: Database, work: Any) -> None:
    """No reference cycle keeps its sessions until the garbage collector comes by."""
    gc.collect()
    gc.disable()
    try:
        held = Held()
        reference = weakref.ref(held)
        session = await work(database, held)
        del held
        assert session() is None
        assert reference() is None
        units = [unit for unit in gc.get_objects() if type(unit) is UnitOfWork]
        assert not [unit for unit in units if unit.database is database]
    finally:
        gc.enable()


@on_sqlite
async def test_a_session_asked_for_after_the_end_is_finished(database: Database) -> None:
    """The unit of work hands out sessions that refuse, and that nothing keeps alive."""
    async with database.block() as unit:
        pass
    with pytest.raises(SessionFinished):
        await unit.async_session.execute(ONE)
    with pytest.raises(SessionFinished):
        await unit.async_read_session.execute(ONE)
    assert in_use(database) == 0


async def test_a_session_that_is_first_looked_at_after_its_end(database: Database) -> None:
    """It is empty, and nobody waits for its end."""
    async with database.block() as unit:
        session = unit.session
    assert list(session.new) == []
    assert not database.live_units


async def test_a_connection_is_noted_once(database: Database) -> None:
    """A loop of savepoints does not make the unit of work larger, or slower."""
    async with database.session() as session:
        connection = (await session.connection()).sync_connection
        references = sys.getrefcount(connection)
        for _ in range(3):
            async with session.begin_nested():
                await session.execute(ONE)
        assert sys.getrefcount(connection) == references


async def test_a_long_block_keeps_no_connections(database: Database) -> None:
    """A worker that commits again and again in one block needs no more memory each time."""
    async with database.session() as session:
        first = weakref.ref((await session.connection()).sync_connection)
        for _ in range(3):
            await session.commit()
            await session.execute(ONE)
        gc.collect()
        assert first() is None
