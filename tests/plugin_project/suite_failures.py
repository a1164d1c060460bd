"""Tests that have to fail, each for the reason in its name."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import MetaData, text
from sqlalchemy.orm import Session

from sanic_db_bp.contrib.testing import TestTransactionError
from tests.plugin_project.shop import Item, create_app, same_database

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


async def test_goes_on_after_the_end_of_what_is_around_it(app: App) -> None:
    db, other = app.ctx.db, same_database(app)
    async with db.engine.connect() as outer, other.engine.connect() as inner:
        await outer.execute(text("SELECT 1"))
        await inner.execute(text("SELECT 1"))
        await outer.rollback()
        with pytest.raises(TestTransactionError, match="was undone with the one around it"):
            await inner.execute(text("SELECT 1"))
        await inner.rollback()
        await inner.execute(text("SELECT 1"))
    await db.dispose()
    await other.dispose()


async def test_creates_tables_too_late(app: App, sanic_db_session: Session) -> None:
    sanic_db_session.add(Item(name="Tea"))
    sanic_db_session.commit()
    with pytest.raises(TestTransactionError, match="tables cannot be created"):
        await app.ctx.db.create_missing_tables(MetaData())


class TestWithoutDatabase:
    @pytest.fixture
    def app(self, sanic_db: None) -> App:
        return Sanic("without-database")

    def test_session(self, sanic_db_session: Session) -> None:
        raise AssertionError("not reached")


class TestUnreachable:
    @pytest.fixture
    def app(self, sanic_db: None) -> App:
        return create_app(url="postgresql://127.0.0.1:1/shop")

    def test_session(self, sanic_db_session: Session) -> None:
        raise AssertionError("not reached")
