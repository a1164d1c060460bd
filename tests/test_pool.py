"""The pool: first come, first served, nothing lost, and an error that names the setting."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from typing import Any

import pytest
from sqlalchemy import event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.util.queue import Empty, Full

from sanic_db_bp.bridge import await_only, run_in_bridge
from sanic_db_bp.connections.pool import FairPool, close_connections
from sanic_db_bp.connections.queue import FairQueue
from sanic_db_bp.dialects import parse_url
from sanic_db_bp.engine import make_engine
from sanic_db_bp.exceptions import DatabaseUnavailable
from sanic_db_bp.settings import DatabaseSettings
from tests.databases import on_all, on_every_driver, on_every_driver_of_servers
from tests.proxy import proxied
from tests.shop import eventually

pytestmark = on_every_driver


def engine_of(url: str, *, name: str = "db", **values: Any) -> AsyncEngine:
    return make_engine(DatabaseSettings(env_file=None, **values), parse_url(url), name=name)


@pytest.fixture
async def single(database_url: str) -> AsyncIterator[AsyncEngine]:
    """An engine with one connection."""
    engine = engine_of(database_url, pool_size=1, pool_timeout=5)
    yield engine
    await engine.dispose()


def pool_of(engine: AsyncEngine) -> FairPool:
    assert isinstance(engine.pool, FairPool)
    return engine.pool


async def until_waiting(engine: AsyncEngine, count: int) -> None:
    """Let the tasks run until so many wait for a connection."""
    await until(lambda: len(pool_of(engine)._pool._waiting) >= count)


async def until(condition: Callable[[], bool]) -> None:
    """Let the tasks run until something is so, which nobody announces."""
    for _ in range(10_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise TimeoutError


@on_all
async def test_an_exhausted_pool_names_the_setting(database_url: str) -> None:
    """Who waits longer than POOL_TIMEOUT learns of it, and of POOL_SIZE, in a clear error."""
    engine = engine_of(database_url, name="shop", pool_size=1, pool_timeout=0.1)
    async with engine.connect():
        with pytest.raises(DatabaseUnavailable, match="POOL_TIMEOUT") as caught:
            await engine.connect()
    assert "'shop'" in str(caught.value)
    assert "0.1 s" in str(caught.value)
    assert ("POOL_SIZE" in str(caught.value)) is not database_url.startswith("sqlite")
    assert isinstance(caught.value, PoolTimeoutError)
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
    await engine.dispose()


async def test_first_come_first_served(single: AsyncEngine) -> None:
    """Tasks get the connection in the order in which they asked for it, newcomers last."""
    served: list[int] = []

    async def work(number: int) -> None:
        async with single.connect():
            served.append(number)

    async with single.connect():
        waiting = [asyncio.create_task(work(number)) for number in range(5)]
        await until_waiting(single, 5)
    await work(5)
    await asyncio.gather(*waiting)
    assert served == [0, 1, 2, 3, 4, 5]


async def test_who_gives_up_loses_nobody_the_connection(single: AsyncEngine) -> None:
    """A waiting task that is cancelled, even as it is served, leaves its turn to the next."""
    for moment in ("waiting", "served"):
        connection = await single.connect()
        first, second = (asyncio.create_task(use(single)) for _ in range(2))
        await until_waiting(single, 2)
        if moment == "waiting":
            first.cancel()
            await asyncio.sleep(0)
            await connection.close()
        else:
            waiter = pool_of(single)._pool._waiting[0]
            waiter.add_done_callback(partial(cancel, first))
            await connection.close()
        with suppress(asyncio.CancelledError):
            await first
        assert await second == 1
        assert pool_of(single).checkedout() == 0


def cancel(task: asyncio.Task[Any], *_: object) -> None:
    task.cancel()


async def use(engine: AsyncEngine) -> int:
    async with engine.connect() as connection:
        result: int = (await connection.execute(text("SELECT 1"))).scalar_one()
        return result


async def test_a_cancelled_connect_leaves_its_connection_to_the_next(single: AsyncEngine) -> None:
    """A pool comes up even if opening a connection takes longer than a request may."""
    opened = 0

    @event.listens_for(single.sync_engine, "connect")
    def count(*_: object) -> None:
        nonlocal opened
        opened += 1

    for _ in range(3):
        task = asyncio.create_task(use(single))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with asyncio.timeout(5):
        assert await use(single) == 1
    assert opened == 1
    assert pool_of(single).checkedout() == 0
    assert pool_of(single).checkedin() == 1


@on_every_driver_of_servers
async def test_many_cancellations_lose_no_connection(database_url: str) -> None:
    """Whenever a task is cancelled, its place in the pool is free again afterwards."""
    engine = engine_of(database_url, pool_size=2, pool_timeout=5)
    for ticks in range(40):
        tasks = [asyncio.create_task(use(engine)) for _ in range(4)]
        for _ in range(ticks):
            await asyncio.sleep(0)
        for task in tasks[::2]:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[1::2] == [1, 1]
        assert all(each == 1 or isinstance(each, asyncio.CancelledError) for each in outcomes)
    async with asyncio.timeout(5):
        async with engine.connect(), engine.connect():
            assert pool_of(engine).checkedout() == 2
    assert pool_of(engine).checkedout() == 0
    await engine.dispose()


def away(server: str) -> AsyncEngine:
    """An engine whose database is not there."""
    url = make_url(server).set(database="is_missing").render_as_string(hide_password=False)
    return engine_of(url, pool_size=1, pool_timeout=30)


async def test_a_failed_connect_lets_the_next_task_try(postgresql_server: str) -> None:
    """A database that is away is told to every waiting task at once, not after POOL_TIMEOUT."""
    engine = away(postgresql_server)
    async with asyncio.timeout(5):
        outcomes = await asyncio.gather(*[use(engine) for _ in range(5)], return_exceptions=True)
    assert all(isinstance(outcome, DatabaseUnavailable) for outcome in outcomes)
    assert {"connecting failed" in str(outcome) for outcome in outcomes} == {True}
    assert pool_of(engine).checkedout() == 0
    await engine.dispose()


async def test_a_failed_connect_after_a_cancellation_frees_its_place(
    postgresql_server: str,
) -> None:
    """Nobody waits for that connection any more, and nobody is told of it."""
    engine = away(postgresql_server)
    task = asyncio.create_task(use(engine))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = asyncio.create_task(use(engine))
    await until_waiting(engine, 1)
    task.cancel()
    async with asyncio.timeout(5):
        with pytest.raises(DatabaseUnavailable, match="connecting failed"):
            await waiting
    await asyncio.gather(task, return_exceptions=True)
    assert pool_of(engine).checkedout() == 0
    await engine.dispose()


@on_every_driver_of_servers
async def test_overflow_connections_are_closed_when_they_come_back(database_url: str) -> None:
    """MAX_OVERFLOW adds connections for a while, POOL_SIZE stay."""
    engine = engine_of(database_url, pool_size=1, max_overflow=1, pool_timeout=0.1)
    async with engine.connect(), engine.connect():
        assert pool_of(engine).overflow() == 1
        with pytest.raises(DatabaseUnavailable, match="all 2 connections"):
            await engine.connect()
    assert pool_of(engine).checkedin() == 1
    assert pool_of(engine).overflow() == 0
    await engine.dispose()


@on_all
async def test_the_connection_used_last_is_used_first(database_url: str) -> None:
    """It is the one that is surely still open."""
    engine = make_engine(
        DatabaseSettings(env_file=None, pool_size=3), parse_url(database_url), read_only=True
    )
    async with engine.connect(), engine.connect() as last:
        record = last.sync_connection
        assert record is not None
        used_last = record.connection.dbapi_connection
        async with engine.connect():
            pass
        await last.close()
        async with engine.connect() as again:
            assert again.sync_connection is not None
            assert again.sync_connection.connection.dbapi_connection is used_last
    await engine.dispose()


async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Say nothing, and leave when the client has left."""
    await reader.read()
    writer.close()


async def test_disposal_does_not_wait_for_a_connection_that_is_being_opened() -> None:
    """A server that does not answer cannot hold up the end."""
    silent = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = silent.sockets[0].getsockname()[1]
    engine = engine_of(f"postgresql://u@127.0.0.1:{port}/d", pool_timeout=5)
    task = asyncio.create_task(use(engine))
    await until(lambda: bool(pool_of(engine)._opening))
    async with asyncio.timeout(1):
        await engine.dispose()
        with pytest.raises((asyncio.CancelledError, DatabaseUnavailable)):
            await task
    silent.close()


@on_every_driver_of_servers
async def test_a_connection_that_comes_too_late_is_kept_for_the_next(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who wanted it is told that POOL_TIMEOUT is over; it is not opened in vain."""
    monkeypatch.setattr("sanic_db_bp.connections.pool.SHORTEST_OPENING", 0.1)
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url, pool_size=1, pool_timeout=0.1)
        proxy.freeze()
        with pytest.raises(PoolTimeoutError, match=r"longer to open than POOL_TIMEOUT, 0\.1 s"):
            await use(engine)
        assert pool_of(engine).checkedout() == 1
        proxy.thaw()
        async with asyncio.timeout(5):
            await asyncio.wait(pool_of(engine)._opening)
        assert pool_of(engine).checkedin() == 1
        assert await use(engine) == 1
        assert proxy.lines == 1
        await engine.dispose()


@on_every_driver_of_servers
@pytest.mark.parametrize("cancelled", [False, True])
async def test_a_connection_that_comes_after_the_disposal_is_closed(
    database_url: str, cancelled: bool
) -> None:
    """Whether somebody still waits for it or not: nobody would close it later."""
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url, pool_size=1)
        pool = pool_of(engine)
        task = asyncio.create_task(use(engine))
        await until(lambda: bool(pool._opening))
        (opening,) = pool._opening
        # After the last moment at which it could be cancelled, and before anybody has it.
        opening.add_done_callback(lambda _: pool.dispose())
        if cancelled:
            task.cancel()
        refused: Any = asyncio.CancelledError if cancelled else DatabaseUnavailable
        with pytest.raises(refused):
            await task
        await asyncio.wait({opening})
        await pool.end_what_is_under_way(1)
        await eventually(lambda: proxy.lines == 0)


@on_every_driver_of_servers
async def test_a_driver_that_succeeds_in_spite_of_its_cancellation(database_url: str) -> None:
    """The connection that it has opened is closed."""
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url, pool_size=1)
        dialect: Any = engine.dialect
        connect = dialect.connect
        lines: list[int] = []
        begun = asyncio.Event()

        def stubborn(*args: Any, **arguments: Any) -> Any:
            begun.set()
            with suppress(asyncio.CancelledError):
                await_only(asyncio.sleep(5))
            connection = connect(*args, **arguments)
            lines.append(proxy.lines)
            return connection

        dialect.connect = stubborn
        task = asyncio.create_task(use(engine))
        await begun.wait()
        await close_connections(engine)
        with pytest.raises((asyncio.CancelledError, DatabaseUnavailable)):
            await task
        await eventually(lambda: proxy.lines == 0)
    assert lines == [1]


@on_every_driver_of_servers
async def test_a_cancellation_just_after_the_opening_loses_no_connection(database_url: str) -> None:
    """The driver has ended, and the pool does not have the connection yet."""
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url, pool_size=1)
        dialect: Any = engine.dialect
        connect = dialect.connect

        def connect_then_cancel(*args: Any, **arguments: Any) -> Any:
            connection = connect(*args, **arguments)
            attempt = asyncio.current_task()
            (opening,) = pool_of(engine)._opening
            assert attempt is not None
            # Before the callback that wakes the task which waits for the attempt.
            attempt.get_loop().call_soon(opening.cancel)
            return connection

        dialect.connect = connect_then_cancel
        with pytest.raises((asyncio.CancelledError, DatabaseUnavailable)):
            await use(engine)
        await eventually(lambda: proxy.lines == 0)
        await engine.dispose()


@on_every_driver_of_servers
async def test_an_idle_connection_that_was_invalidated_needs_no_end(single: AsyncEngine) -> None:
    """As that of a unit of work which was cut off while it gave its connection back."""
    assert await use(single) == 1
    (record,) = pool_of(single)._pool.idle
    await run_in_bridge(record.invalidate)
    await close_connections(single)


@on_every_driver_of_servers
async def test_a_disposal_that_is_cancelled_leaves_the_rest_to_the_next(database_url: str) -> None:
    """The end of the event loop cancels it, and disposes once more."""
    async with proxied(database_url) as proxy:
        engine = engine_of(proxy.url, pool_size=1)
        assert await use(engine) == 1
        before = asyncio.all_tasks()
        closing = asyncio.create_task(close_connections(engine))
        await until(lambda: pool_of(engine).checkedin() == 0)
        # As asyncio.run does, which also cancels what has not begun.
        for task in asyncio.all_tasks() - before:
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await close_connections(engine)
        await eventually(lambda: proxy.lines == 0)


# The queue by itself


async def test_a_queue_is_full_when_every_place_is_taken() -> None:
    """One more than maxsize is refused; a queue without a bound takes all."""
    bounded: FairQueue = FairQueue(1)
    assert bounded.empty()
    item: Any = object()
    bounded.put(item)
    assert bounded.full()
    assert bounded.qsize() == 1
    with pytest.raises(Full):
        bounded.put(item)
    assert bounded.get() is item
    assert not bounded.full()
    unbounded: FairQueue = FairQueue()
    unbounded.put(item)
    assert not unbounded.full()


async def test_a_turn_to_connect_is_passed_on_by_who_gives_up() -> None:
    """A place that has become free is not lost with the task that was woken for it."""
    queue: FairQueue = FairQueue(1)
    first, second = (asyncio.create_task(run_in_bridge(queue.get, True, 5)) for _ in range(2))
    await until(lambda: queue.waiting() == 2)
    queue.wake_next()
    first.cancel()
    with pytest.raises(asyncio.CancelledError):
        await first
    with pytest.raises(Empty):
        await second


async def test_what_comes_just_before_the_time_is_up_is_taken() -> None:
    """If both happen while the event loop is busy, what was handed over counts."""
    queue: FairQueue = FairQueue(1)
    item: Any = object()
    waiting = asyncio.create_task(run_in_bridge(queue.get, True, 0.2))
    await until(lambda: queue.waiting() == 1)
    asyncio.get_running_loop().call_later(0, queue.put_nowait, item)
    time.sleep(0.25)  # noqa: ASYNC251 - the event loop is busy until the time is up
    assert await waiting is item


async def test_who_has_time_waits_without_end() -> None:
    """As in any queue, if no timeout is given."""
    queue: FairQueue = FairQueue(1)
    item: Any = object()
    waiting = asyncio.create_task(run_in_bridge(queue.get))
    await until(lambda: queue.waiting() == 1)
    queue.put(item)
    assert await waiting is item


async def test_an_empty_queue_says_so_at_once() -> None:
    """Who does not want to wait is told."""
    queue: FairQueue = FairQueue(1)
    with pytest.raises(Empty):
        queue.get_nowait()
    with pytest.raises(Empty):
        queue.get(block=False)
