"""A suite that uses the plugin: each test begins with empty tables, whatever those before did."""

import asyncio
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import insert, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from tests.plugin_project.shop import Item, create_app, reusable_client

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
