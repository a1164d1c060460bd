"""Single connections that are opened, used and closed over a network that is slow or frozen."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from sanic_db_bp import Database, DatabaseSettings
from sanic_db_bp.connections.liveness import LOOK_EVERY
from sanic_db_bp.connections.pool import status_of
from tests.faults.databases import SERVERS, Target
from tests.proxy import Proxy, proxied
from tests.shop import eventually

pytestmark = pytest.mark.parametrize("target", SERVERS, indirect=True)

IDLE = 5


@asynccontextmanager
async def _behind(proxy: Proxy, **settings: object) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(env_file=None, url=proxy.url, **settings))
    try:
        yield database
    finally:
        proxy.thaw()
        await database.dispose(within=0)


async def _fill_pool(database: Database) -> None:
    connections = [database.engine.connect() for _ in range(IDLE)]
    await asyncio.gather(*(connection.start() for connection in connections))
    await asyncio.gather(*(connection.close() for connection in connections))
    assert database.pool_status()["idle"] == IDLE


async def test_idle_connections_are_closed_all_at_once(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody answers their goodbye: they are cut together, which is no failure to be logged."""
    async with proxied(target.url) as proxy, _behind(proxy, pool_size=IDLE) as database:
        await _fill_pool(database)
        proxy.freeze()
        before = asyncio.all_tasks()
        await database.dispose(within=0)
        if closing := asyncio.all_tasks() - before:
            _, left = await asyncio.wait(closing, timeout=2)
            assert not left
    assert [record for record in caplog.records if record.levelname == "ERROR"] == []


async def test_a_cancelled_statement_does_not_wait_for_its_driver(target: Target) -> None:
    """A driver that asks the server to cancel is cancelled itself, by the second look."""
    async with proxied(target.url) as proxy, _behind(proxy) as database:
        await database.ping()
        proxy.freeze()
        waiting = asyncio.create_task(_execute(database))
        await asyncio.sleep(0.2)
        cancelled = time.monotonic()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        # Psycopg would wait for five seconds.
        assert time.monotonic() - cancelled < 4 * LOOK_EVERY
        assert database.pool_status()["checked_out"] == 0


async def test_a_timeout_of_the_app_stays_one(target: Target) -> None:
    """Although the driver had to be cancelled once more, there was one cancellation to count."""
    async with proxied(target.url) as proxy, _behind(proxy) as database:
        await database.ping()
        proxy.freeze()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.2):
                await _execute(database)
        assert database.pool_status()["checked_out"] == 0


async def _execute(database: Database) -> None:
    async with database.session() as session:
        await session.execute(text("SELECT 1"))


async def test_a_statement_does_not_wait_for_a_server_that_is_gone(
    target: Target, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Nor does a COMMIT, a ROLLBACK, or a statement for many rows: all are cut at one question.

    A short ``POOL_TIMEOUT`` is not kept waiting for the next look.
    """
    monkeypatch.setattr("sanic_db_bp.connections.liveness.ANSWER_WITHIN", 0.3)
    monkeypatch.setattr("sanic_db_bp.connections.liveness.LOOK_EVERY", 60)
    used, frozen = asyncio.Barrier(6), asyncio.Event()
    one, rows = text("SELECT 1"), text("DELETE FROM t WHERE n = :n")
    as_it_is = {"no_parameters": True}
    works: list[Callable[[AsyncSession], Awaitable[object]]] = [
        lambda session: session.execute(one),
        lambda session: session.execute(one, execution_options=as_it_is),
        lambda session: session.execute(rows, [{"n": 1}, {"n": 2}]),
        lambda session: session.commit(),
        lambda session: session.rollback(),
    ]

    async def work(database: Database, do: Callable[[AsyncSession], Awaitable[object]]) -> None:
        async with database.session() as session:
            await session.execute(text("SELECT 1"))
            await used.wait()
            await frozen.wait()
            await do(session)

    async with proxied(target.url) as proxy, _behind(proxy, pool_timeout=0.3) as database:
        working = [asyncio.create_task(work(database, each)) for each in works]
        await used.wait()
        proxy.freeze()
        frozen.set()
        async with asyncio.timeout(4):
            outcomes = await asyncio.gather(*working, return_exceptions=True)
        assert all(isinstance(outcome, DBAPIError | OSError) for outcome in outcomes), outcomes
        (record,) = [record for record in caplog.records if record.levelname == "ERROR"]
        assert "connections in use are cut: 5" in record.getMessage()
        assert database.pool_status()["checked_out"] == 0


async def test_the_end_of_reading_behind_pgbouncer_does_not_wait_for_a_server_that_is_gone(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """There a read session has a transaction, and its ROLLBACK is cut as any other."""
    monkeypatch.setattr("sanic_db_bp.connections.liveness.ANSWER_WITHIN", 0.3)
    settings = {"pgbouncer": True, "pool_timeout": 0.3}
    async with proxied(target.url) as proxy, _behind(proxy, **settings) as database:
        async with asyncio.timeout(4), database.read_session() as session:
            await session.execute(text("SELECT 1"))
            proxy.freeze()
        assert status_of(database.read_engine)["checked_out"] == 0


async def test_the_close_of_a_connection_does_not_wait_for_a_server_that_is_gone(
    target: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One of the overflow is closed by the request that has used it."""
    monkeypatch.setattr("sanic_db_bp.connections.liveness.ANSWER_WITHIN", 0.3)
    settings = {"pool_size": 1, "max_overflow": 1, "pool_timeout": 0.3}
    async with proxied(target.url) as proxy, _behind(proxy, **settings) as database:
        kept, closed = [await database.engine.connect() for _ in range(2)]
        for connection in (kept, closed):
            await connection.execute(text("SELECT 1"))
            await connection.commit()
        await kept.close()
        proxy.freeze()
        async with asyncio.timeout(4):
            await closed.close()


async def test_a_disposal_ends_the_question_whether_the_server_is_there(
    target: Target, caplog: pytest.LogCaptureFixture
) -> None:
    """Nobody waits for its answer any more."""
    async with proxied(target.url) as proxy, _behind(proxy, pool_timeout=0.1) as database:
        await database.ping()
        proxy.freeze()
        waiting = asyncio.create_task(_execute(database))
        await eventually(_questions, within=3)
        async with asyncio.timeout(3):
            await database.dispose(within=0)
            await asyncio.gather(waiting, return_exceptions=True)
            await asyncio.wait({*_questions(), asyncio.create_task(asyncio.sleep(0))})
        assert "has not answered" not in caplog.text
        assert [record for record in caplog.records if record.name == "asyncio"] == []


def _questions() -> list[asyncio.Task[object]]:
    """Give the tasks that ask a server whether it is there."""
    tasks = asyncio.all_tasks()
    return [t for t in tasks if getattr(t.get_coro(), "__name__", "") == "_connect_within_bound"]


async def test_opening_may_take_longer_than_waiting(target: Target) -> None:
    """However short ``POOL_TIMEOUT`` is, a database that is there is reached."""
    async with proxied(target.url) as proxy, _behind(proxy, pool_timeout=0.1) as database:
        proxy.there = proxy.back = 0.03
        assert await database.ping() > 0.1
