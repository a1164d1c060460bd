"""Comments in SQL reach the server, and never do more than that."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sanic import HTTPResponse, Request, json
from sqlalchemy import Connection, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import ConfigurationError
from sanic_db_bp.contrib import sql_comments
from sanic_db_bp.contrib.sql_comments import _comment
from tests.databases import on, on_every_driver, on_every_driver_of_servers, on_postgresql
from tests.serving import serving
from tests.shop import Item, Shop, make_app

OWN_STATEMENT = {
    "postgresql": "SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()",
    "mysql": "SELECT info FROM information_schema.processlist WHERE id = connection_id()",
}


TRACEPARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def own_statement(session: AsyncSession, comment: str = "") -> str:
    """Ask the server which statement it executes: this one."""
    connection = await session.connection()
    question = OWN_STATEMENT[connection.dialect.name] + comment
    answer = await connection.exec_driver_sql(question)
    return str(answer.scalar_one())


def commenting_app(database_url: str, **options: Any) -> Shop:
    app = make_app(database_url)
    sql_comments.install(app, **options)

    @app.get("/items/<name>")
    async def handle(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
        return json(await own_statement(session))

    return app


async def comment_seen(
    database_url: str, headers: dict[str, str] | None = None, **options: Any
) -> str:
    """Give what the server got after the statement."""
    async with serving(commenting_app(database_url, **options)) as client:
        answer = await client.get("/items/tea", headers=headers)
    _, _, comment = answer.json().partition(" /*")
    return comment and f"/*{comment}"


@on_every_driver_of_servers
async def test_the_server_is_told_application_and_route(database_url: str) -> None:
    """By default the comment is the same for every request of a route, whatever the driver."""
    comment = await comment_seen(database_url)
    assert re.fullmatch(
        r"/\*application='shop-\d+',route='%2Fitems%2F%3Cname%3Astr%3E'\*/", comment
    )


@on_every_driver_of_servers
async def test_other_keys_are_told_if_asked_for_in_order_of_their_names(
    database_url: str,
) -> None:
    """Keys of the app's own stand among them; those without a value are left out."""
    values = {"b": lambda: "it's 100 %", "a key": lambda: "x", "none": lambda: None}
    comment = await comment_seen(
        database_url,
        {"X-Request-ID": "*/; DROP TABLE item; --", "traceparent": TRACEPARENT},
        keys=("traceparent", "request_id", "controller"),
        values=values,
    )
    assert re.fullmatch(
        r"/\*a%20key='x',b='it%27s%20100%20%25',controller='shop-\d+\.handle',"
        rf"request_id='%2A%2F%3B%20DROP%20TABLE%20item%3B%20--',traceparent='{TRACEPARENT}'\*/",
        comment,
    )


@on_postgresql
@pytest.mark.parametrize("sent", ["", "x", "00-1-2-3", f"{TRACEPARENT}*/"])
async def test_a_traceparent_that_is_none_is_left_out(database_url: str, sent: str) -> None:
    """The header comes from the client, who may send anything."""
    assert await comment_seen(database_url, {"traceparent": sent}, keys=["traceparent"]) == ""


@on_postgresql
@pytest.mark.parametrize(
    ("sent", "told"), [(b"r" * 5000, "r" * 128), (b"r\xff", "r%3F")], ids=["long", "no text"]
)
async def test_a_client_cannot_spoil_statements(database_url: str, sent: bytes, told: str) -> None:
    """A long request id is cut off, and of one that is no text something is left out."""
    async with serving(commenting_app(database_url, keys=["request_id"])) as client:
        answer = await client.get("/items/tea", headers={b"X-Request-ID": sent})
    assert answer.json().endswith(f" /*request_id='{told}'*/")


def test_an_unknown_key_is_a_configuration_error(database_url: str) -> None:
    """It is told at the installation, with the keys that there are."""
    with pytest.raises(ConfigurationError, match=r"rout: .* no such key. There are: .*route"):
        sql_comments.install(make_app(database_url), keys=["rout"])


@on_every_driver_of_servers
async def test_a_statement_that_has_a_comment_gets_no_other(database_url: str) -> None:
    """Whoever comments by himself has said all, such as another instrumentation."""
    app = commenting_app(database_url, values={"k": lambda: "v"})
    async with serving(app):
        # PostgreSQL shows the same all through a transaction.
        async with app.ctx.db.session() as session:
            assert (await own_statement(session)).endswith(" /*k='v'*/")
        async with app.ctx.db.session() as session:
            assert (await own_statement(session, " /* mine */")).endswith(" /* mine */")


Statement = Callable[[AsyncSession], Awaitable[object]]


async def with_percent(session: AsyncSession) -> object:
    return await session.scalar(select(Item.name).where(Item.name.like("te%")))


async def with_percent_and_parameters(session: AsyncSession) -> object:
    return await session.scalar(
        text("SELECT name FROM item WHERE name LIKE '%ea' AND 1 = :one"), {"one": 1}
    )


async def to_the_driver(session: AsyncSession) -> object:
    connection = await session.connection()
    return (await connection.exec_driver_sql("SELECT name FROM item")).scalar()


async def without_parameters(session: AsyncSession) -> object:
    connection = await session.connection()
    options = {"no_parameters": True}
    statement = "SELECT name FROM item WHERE name LIKE '%ea'"
    return (await connection.exec_driver_sql(statement, execution_options=options)).scalar()


async def with_a_semicolon(session: AsyncSession) -> object:
    return await session.scalar(text("SELECT name FROM item;"))


async def with_a_comment_of_its_own(session: AsyncSession) -> object:
    return await session.scalar(text("SELECT name FROM item /* mine */"))


async def with_a_line_comment(session: AsyncSession) -> object:
    return await session.scalar(text("SELECT name FROM item -- mine"))


async def many(session: AsyncSession) -> object:
    rows = [{"name": str(number), "stock": 1} for number in range(50)]
    await session.execute(insert(Item), rows)
    return "tea" if await session.scalar(text("SELECT count(*) FROM item")) == 51 else None


async def many_objects(session: AsyncSession) -> object:
    session.add_all([Item(name=str(number)) for number in range(50)])
    await session.flush()
    return "tea" if await session.scalar(text("SELECT count(*) FROM item")) == 51 else None


STATEMENTS = [
    with_percent,
    with_percent_and_parameters,
    to_the_driver,
    without_parameters,
    with_a_semicolon,
    with_a_comment_of_its_own,
    with_a_line_comment,
    many,
    many_objects,
]


@on_every_driver
async def test_statements_of_every_kind_work_with_comments(database_url: str) -> None:
    """Percent signs, semicolons, comments and many rows: the result is the same as without."""
    app = make_app(database_url)
    sql_comments.install(app, values={"k": lambda: "100 %s (name)s *//*"})

    @app.get("/<number:int>")
    async def handle(request: Request, number: int, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="tea"))
        await session.flush()
        found = await STATEMENTS[number](session)
        await session.rollback()
        return json(found)

    async with serving(app) as client:
        for number, statement in enumerate(STATEMENTS):
            answer = await client.get(f"/{number}")
            assert answer.text == '"tea"', statement.__name__


@on_every_driver_of_servers
async def test_outside_of_requests_there_is_no_comment(database_url: str) -> None:
    """Nothing is known of a background task but what the app says itself."""
    app = commenting_app(database_url)
    async with serving(app), app.ctx.db.session() as session:
        assert await own_statement(session) == OWN_STATEMENT[session.get_bind().dialect.name]


@on("mariadb", every_driver=True)
async def test_many_rows_still_travel_together(database_url: str) -> None:
    """MySQL's drivers join the rows of executemany, unless something follows the values."""
    app = make_app(database_url)
    sql_comments.install(app, values={"k": lambda: "v"})
    async with serving(app):
        await app.ctx.db.run_sync(insert_many)


def insert_many(session: Session) -> None:
    connection = session.connection()
    before = questions(connection)
    connection.execute(insert(Item), [{"name": str(n), "stock": 1} for n in range(50)])
    assert questions(connection) - before <= 3


def questions(connection: Connection) -> int:
    """How many statements the server has got on this connection."""
    row = connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Questions'").one()
    return int(row[1])


@given(st.dictionaries(st.text(min_size=1), st.text(), min_size=1))
def test_no_key_and_no_value_ends_the_comment(pairs: dict[str, str]) -> None:
    """Whatever the text: one comment, of harmless characters, with the keys in order."""
    comment = _comment(tuple(pairs.items()), "%")
    assert re.fullmatch(
        r" /\*(%?[\w.~-]*='(%?[\w.~-])*',?)*\*/", comment.replace("%", ""), re.ASCII
    )
    keys = re.findall(r"(?:\*|,)([^=]*)='", comment)
    assert len(keys) == len(pairs)
