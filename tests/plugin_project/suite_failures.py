"""Tests that have to fail, each for the reason in its name."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import text
from sqlalchemy.orm import Session

from sanic_db_bp.contrib.testing import TestTransactionError
from tests.plugin_project.shop import Item, create_app

App = Sanic[Any, Any]
MaxQueries = Callable[[int], AbstractContextManager[list[str]]]


@pytest.fixture
def app(sanic_db: None) -> App:
    return create_app(pool_timeout=0.5)


def test_passes_with_few_queries(
    app: App, sanic_db_session: Session, assert_max_queries: MaxQueries
) -> None:
    with assert_max_queries(1) as queries:
        app.test_client.get("/names")
    assert queries == ["SELECT item.name FROM item ORDER BY item.name"]
    with assert_max_queries(1):
        sanic_db_session.get(Item, 1)


def test_too_many_queries(app: App, assert_max_queries: MaxQueries) -> None:
    with assert_max_queries(2):
        app.test_client.post("/add/Tea")
        app.test_client.get("/names")
        app.test_client.get("/names")


def test_passes_without_leaks(app: App, assert_no_leaked_connections: None) -> None:
    app.test_client.post("/add/Tea")
    app.test_client.post("/add-and-fail/Coffee")


def test_leaked_connection(app: App, assert_no_leaked_connections: None) -> None:
    app.test_client.get("/leak")


async def test_held_up_by_its_own_transaction(app: App) -> None:
    db = app.ctx.db

    async def read() -> None:
        async with db.read_session() as session:
            await session.execute(text("SELECT 1"))

    async with db.engine.connect() as connection:
        await connection.execute(text("SELECT 1"))
        with pytest.raises(
            TestTransactionError, match="all that a test does shares one connection"
        ):
            await asyncio.create_task(read())
    await db.dispose()


def test_ends_its_transaction(app: App, sanic_db_session: Session) -> None:
    sanic_db_session.execute(text("COMMIT"))
