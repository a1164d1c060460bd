"""One server for the whole run, on the configured database, with tables that the suite makes."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import pytest
from sanic import Sanic
from sanic_testing.reusable import ReusableClient  # type: ignore[import-untyped]
from sqlalchemy import URL, Connection, insert, select
from sqlalchemy.orm import Session

from tests.plugin_project.shop import Base, Item, create_app, reusable_client, same_database


@pytest.fixture(scope="session")
def sanic_db_provision() -> Callable[[URL], AbstractContextManager[URL]]:
    return nullcontext


@pytest.fixture(scope="session")
def sanic_db_schema() -> Callable[[Connection], None]:
    # Without the other table no constraint is deferred.
    return partial(Base.metadata.create_all, tables=[Base.metadata.tables[Item.__tablename__]])


@pytest.fixture(scope="session")
def app() -> Sanic[Any, Any]:
    return create_app(create_tables=False)


async def commit_around_a_rollback(app: Sanic[Any, Any]) -> None:
    databases = app.ctx.db, same_database(app)
    outer, inner = [await each.engine.connect() for each in databases]
    await outer.execute(insert(Item).values(name="There-too"))
    await inner.execute(insert(Item).values(name="Gone"))
    await outer.commit()
    await inner.rollback()
    for connection, database in zip((outer, inner), databases, strict=True):
        await connection.close()
        await database.dispose()


@pytest.fixture(scope="session")
def server(sanic_db_for_session: None, app: Sanic[Any, Any]) -> Iterator[ReusableClient]:
    asyncio.run(commit_around_a_rollback(app))
    with reusable_client(app) as client:
        assert client.post("/add/Always-there")[1].status == 201
        yield client


@pytest.fixture
def client(sanic_db: None, server: ReusableClient) -> ReusableClient:
    return server


@pytest.mark.parametrize("time", [1, 2])
def test_each_test_begins_anew(client: ReusableClient, time: int) -> None:
    assert client.post("/add/Tea")[1].status == 201
    assert client.get("/names")[1].json == ["Always-there", "Tea", "There-too"]


def test_session_of_the_test(client: ReusableClient, sanic_db_session: Session) -> None:
    assert client.post("/add/Tea")[1].status == 201
    statement = select(Item.name).order_by(Item.name)
    assert list(sanic_db_session.scalars(statement)) == ["Always-there", "Tea", "There-too"]
