"""A suite that uses the plugin: each test begins with empty tables, whatever those before did."""

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import NullPool, insert, select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from sanic_db_bp.contrib.testing import TestTransactionError
from tests.plugin_project.shop import Item, create_app, reusable_client, same_database

App = Sanic[Any, Any]
DATABASE = os.environ["SANIC_DB_URL"].split(":")[0]


@pytest.fixture
def app(sanic_db: None) -> App:
    return create_app(pool_timeout=5)


def names(session: Session) -> list[str]:
    return list(session.scalars(select(Item.name).order_by(Item.name)))


@pytest.mark.parametrize("time", [1, 2])
def test_test_client(app: App, sanic_db_session: Session, time: int) -> None:
    assert names(sanic_db_session) == []
    sanic_db_session.add(Item(name="Cocoa"))
    sanic_db_session.commit()
    assert app.test_client.post("/add/Tea")[1].status == 201
    assert app.test_client.post("/add-plainly/Coffee")[1].status == 201
    assert app.test_client.get("/names")[1].json == ["Cocoa", "Coffee", "Tea"]
    assert app.test_client.get("/names-plainly")[1].json == ["Cocoa", "Coffee", "Tea"]
    assert names(sanic_db_session) == ["Cocoa", "Coffee", "Tea"]


def test_the_start_of_a_server_does_not_count(
    app: App, assert_max_queries: Callable[[int], AbstractContextManager[list[str]]]
) -> None:
    with assert_max_queries(1) as queries:
        app.test_client.get("/names")
    assert len(queries) == 1


@pytest.mark.parametrize("time", [1, 2])
async def test_asgi_client(app: App, sanic_db_session: Session, time: int) -> None:
    assert names(sanic_db_session) == []
    assert (await app.asgi_client.post("/add/Tea"))[1].status == 201
    async with app.ctx.db.session() as session:
        session.add(Item(name="Coffee"))
    assert (await app.asgi_client.get("/names"))[1].json == ["Coffee", "Tea"]
    await app.ctx.db.run_sync(lambda session: session.add(Item(name="Cocoa")))
    assert names(sanic_db_session) == ["Cocoa", "Coffee", "Tea"]
    await app.ctx.db.dispose()


@pytest.mark.parametrize("time", [1, 2])
def test_reusable_client(app: App, sanic_db_session: Session, time: int) -> None:
    assert names(sanic_db_session) == []
    with reusable_client(app) as client:
        assert client.post("/add/Tea")[1].status == 201
        assert client.get("/names")[1].json == ["Tea"]
        assert client.post("/add/Tea")[1].status == 500
        assert client.post("/names-of-all-kinds/Coffee")[1].json == [["Coffee", "Tea"]] * 2 or (
            sorted(client.get("/names")[1].json) == ["Coffee", "Tea"]
        )


def test_changed_rows_are_counted(app: App, sanic_db_session: Session) -> None:
    sanic_db_session.add_all([Item(name="Tea"), Item(name="Coffee")])
    result: Any = sanic_db_session.execute(update(Item).values(name=Item.name + " to go"))
    assert result.rowcount == 2
    assert names(sanic_db_session) == ["Coffee to go", "Tea to go"]


def test_concurrent_requests(app: App, sanic_db_session: Session) -> None:
    with reusable_client(app) as client:

        async def ask_all() -> list[Any]:
            paths = [f"/add-and-wait/{number}" for number in range(10)]
            url = f"http://{client.host}:{client.port}"
            return await asyncio.gather(*(client._session.post(url + path) for path in paths))

        answers = client._run(ask_all())
    counts = sorted(answer.json() for answer in answers)
    assert counts == [[number, number + 1] for number in range(10)]
    assert len(names(sanic_db_session)) == 10


def test_error_rolls_back_its_request_alone(app: App, sanic_db_session: Session) -> None:
    app.test_client.post("/add/Tea")
    assert app.test_client.post("/add-and-fail/Coffee")[1].status == 500
    assert app.test_client.post("/add/Tea")[1].status == 500
    assert names(sanic_db_session) == ["Tea"]


@pytest.mark.skipif(DATABASE.startswith("sqlite"), reason="one writer: the app would wait, too")
def test_sessions_inside_of_a_request(app: App, sanic_db_session: Session) -> None:
    assert app.test_client.post("/add-around/Tea")[1].status == 201
    assert names(sanic_db_session) == ["Tea", "Tea after", "Tea inside"]
    results = app.test_client.post("/add-at-once/Coffee")[1].json
    assert results == ["None", "None", "LookupError('Coffee')"]
    assert names(sanic_db_session)[:3] == ["Coffee", "Coffee 0", "Coffee 1"]
    assert len(names(sanic_db_session)) == 6


def test_task_of_a_request(app: App, sanic_db_session: Session) -> None:
    assert app.test_client.post("/add-later/Tea")[1].status == 201
    assert names(sanic_db_session) == ["Tea"]


def test_on_commit(app: App) -> None:
    app.test_client.post("/add-and-tell/Tea?good=1")
    app.test_client.post("/add-and-tell/Coffee")
    assert app.ctx.told == ["Tea"]


def test_retries(app: App, sanic_db_session: Session) -> None:
    assert app.test_client.post("/add-again/Tea")[1].status == 201
    assert app.ctx.told == ["Tea", "Tea"]
    assert names(sanic_db_session) == ["Tea"]


@pytest.mark.skipif(DATABASE.startswith("mysql"), reason="nothing is deferred")
def test_deferred_constraint(app: App, sanic_db_session: Session) -> None:
    assert app.test_client.post("/add-part/7")[1].status == 500
    sanic_db_session.add(Item(id=7, name="Tea"))
    sanic_db_session.commit()
    assert app.test_client.post("/add-part/7")[1].status == 201
    assert app.test_client.post("/add-part/8")[1].status == 500


def test_stream(app: App, sanic_db_session: Session) -> None:
    sanic_db_session.add_all([Item(name="Tea"), Item(name="Coffee")])
    sanic_db_session.commit()
    assert app.test_client.get("/stream")[1].text == "Coffee\nTea\n"


def test_read_session_leaves_nothing(app: App, sanic_db_session: Session) -> None:
    status = app.test_client.post("/write-in-read-session")[1].status
    assert (status == 201) == DATABASE.startswith("mysql")
    assert names(sanic_db_session) == []
    assert app.test_client.post("/add/Tea")[1].status == 201


def test_failed_statement_of_the_test(app: App, sanic_db_session: Session) -> None:
    sanic_db_session.add(Item(name="Tea"))
    sanic_db_session.commit()
    sanic_db_session.add(Item(name="Tea"))
    with pytest.raises(IntegrityError):
        sanic_db_session.commit()
    sanic_db_session.rollback()
    assert names(sanic_db_session) == ["Tea"]


def test_transaction_of_a_server_that_was_stopped(app: App, sanic_db_session: Session) -> None:
    async def begin() -> None:
        connection = await app.ctx.db.engine.connect()
        await connection.execute(insert(Item).values(name="Tea"))
        kept.append(connection)

    kept: list[Any] = []
    asyncio.run(begin())
    assert names(sanic_db_session) == []
    asyncio.run(kept[0].close())


@pytest.mark.parametrize("time", [1, 2])
def test_transaction_that_is_left_open(app: App, sanic_db_session: Session, time: int) -> None:
    async def begin() -> None:
        connection = await app.ctx.db.engine.connect()
        await connection.execute(insert(Item).values(name="Tea"))
        kept.append(connection)

    assert names(sanic_db_session) == []
    asyncio.run(begin())


kept: list[Any] = []


def test_without_a_statement(app: App, sanic_db_session: Session) -> None:
    assert not sanic_db_session.in_transaction()


def test_many_rows_at_once(sanic_db_session: Session) -> None:
    sanic_db_session.execute(insert(Item), [{"name": "Tea"}, {"name": "Coffee"}])
    assert names(sanic_db_session) == ["Coffee", "Tea"]


def test_cursor_of_the_driver(sanic_db_session: Session) -> None:
    sanic_db_session.add_all([Item(name="Tea"), Item(name="Coffee")])
    sanic_db_session.commit()
    cursor: Any = sanic_db_session.connection().connection.cursor()
    cursor.execute("SELECT name FROM item ORDER BY name")
    assert [name for (name,) in cursor] == ["Coffee", "Tea"]


def test_app_without_a_pool(sanic_db: None) -> None:
    app = create_app(engine_options={"poolclass": NullPool})
    app.test_client.post("/add/Tea")
    assert app.test_client.get("/names")[1].json == ["Tea"]


async def test_isolation_level(app: App) -> None:
    db = app.ctx.db
    async with db.engine.connect() as connection:
        default = connection.sync_connection.default_isolation_level
        assert await connection.get_isolation_level() == default
    async with db.read_engine.connect() as connection:
        assert await connection.get_isolation_level() == "AUTOCOMMIT"
    await db.dispose()


async def test_transaction_that_outlasts_the_one_around_it(app: App) -> None:
    db, other = app.ctx.db, same_database(app)
    async with db.engine.connect() as outer, other.engine.connect() as inner:
        await outer.execute(insert(Item).values(name="Tea"))
        await inner.execute(insert(Item).values(name="Coffee"))
        await outer.commit()
        await inner.execute(insert(Item).values(name="Cocoa"))
        await inner.rollback()
        assert list(await outer.scalars(select(Item.name))) == ["Tea"]
    await db.dispose()
    await other.dispose()


async def test_connection_that_was_thrown_away(app: App) -> None:
    async with app.ctx.db.engine.connect() as connection:
        lent: Any = (await connection.get_raw_connection()).dbapi_connection
        await connection.invalidate()
        with pytest.raises(TestTransactionError, match="given back already"):
            lent.cursor().execute("SELECT 1")
    await app.ctx.db.dispose()


async def test_rollback_of_what_is_being_undone(app: App) -> None:
    databases = [app.ctx.db, same_database(app), same_database(app)]
    outer, middle, inner = [await each.engine.connect() for each in databases]
    for connection in (outer, middle, inner):
        await connection.execute(text("SELECT 1"))
    slow = asyncio.create_task(inner.execute(text(SLOW)))
    await asyncio.sleep(0)
    await asyncio.gather(outer.rollback(), middle.rollback())
    await slow
    assert (await middle.execute(text("SELECT 1"))).scalar() == 1
    for connection in (inner, middle, outer):
        await connection.close()
    for each in databases:
        await each.dispose()


SLOW = {
    "postgresql": "SELECT pg_sleep(0.1)",
    "mysql": "SELECT SLEEP(0.1)",
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 1000000) "
    "SELECT max(x) FROM n",
}[DATABASE.partition("+")[0]]
