"""What was cancelled ends before the event loop stands still."""

import asyncio
import sqlite3

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import SQLAlchemyError

from sanic_db_bp.shutdown import end_cancelled_tasks
from tests.serving import serving
from tests.shop import Item, make_app
from tests.slow_sql import all_are_free, sleep_for, teach_to_sleep


async def test_a_cancelled_task_that_goes_on_loses_its_connection(
    database_url: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server stops all the same, and the log says whom it did not wait for."""
    monkeypatch.setattr("sanic_db_bp.shutdown.CANCELLED_WITHIN", 0.2)
    app = make_app(database_url)
    started = asyncio.Event()

    async def stubborn() -> None:
        async with app.ctx.db.session() as session:
            await session.execute(text("SELECT 1"))
            started.set()
            try:
                await asyncio.Event().wait()
            finally:
                await session.execute(sleep_for(app.ctx.db, 30))

    async with serving(app):
        teach_to_sleep(app.ctx.db.engine)
        await app.ctx.db.engine.dispose()
        task = app.add_task(stubborn(), name="stubborn")
        assert task is not None
        await started.wait()
        task.cancel()
        await end_cancelled_tasks(app, [app.ctx.db])
        with pytest.raises((SQLAlchemyError, sqlite3.Error)):
            await asyncio.wait_for(task, 5)
        assert await all_are_free(app.ctx.db)
        app.purge_tasks()
    assert "still run: stubborn" in caplog.text


async def test_a_cancelled_task_rolls_back_in_time(database_url: str) -> None:
    """Nothing is cut, and its connection is good for the next."""
    app = make_app(database_url)
    started = asyncio.Event()

    async def work() -> None:
        async with app.ctx.db.session() as session:
            session.add(Item(name="tea"))
            await session.flush()
            started.set()
            await asyncio.Event().wait()

    async with serving(app):
        task = app.add_task(work(), name="work")
        assert task is not None
        await started.wait()
        task.cancel()
        await end_cancelled_tasks(app, [app.ctx.db])
        assert task.cancelled()
        assert app.ctx.db.pool_status()["checked_out"] == 0
        async with app.ctx.db.session() as session:
            assert await session.scalar(select(Item.name)) is None
        app.purge_tasks()


async def test_tasks_that_nobody_has_cancelled_go_on(database_url: str) -> None:
    """They have the grace period, as without a database."""
    app = make_app(database_url)
    goes_on = asyncio.Event()
    async with serving(app):
        task = app.add_task(goes_on.wait(), name="patient")
        assert task is not None
        await end_cancelled_tasks(app, [app.ctx.db])
        assert not task.done()
        goes_on.set()
        await task
        app.purge_tasks()
