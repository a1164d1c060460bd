"""A database error that a handler catches never makes the COMMIT keep less than the client is told.

A failed statement may end its transaction, and no database says so at the COMMIT: PostgreSQL
answers it with ROLLBACK, MariaDB commits what came after a deadlock, SQLite what came after an
error such as a full disk or ``OR ROLLBACK``.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from sanic import HTTPResponse, Request, empty
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from sanic_db_bp import on_commit
from tests.serving import serving
from tests.shop import Item, Observer, eventually, make_app, settled

Failure = Callable[[AsyncSession, Observer], Awaitable[None]]

ON_EACH = pytest.mark.parametrize(
    "database_url",
    ["sqlite", "postgresql-asyncpg", "postgresql-psycopg", "mariadb-asyncmy"],
    indirect=True,
)


async def _abort(session: AsyncSession, _observer: Observer) -> None:
    await session.execute(text("SELECT nonsense"))


async def _roll_back_on_conflict(session: AsyncSession, _observer: Observer) -> None:
    await session.execute(text("INSERT OR ROLLBACK INTO item (name, stock) VALUES ('plum', 0)"))


async def _lose_a_deadlock(session: AsyncSession, observer: Observer) -> None:
    plum = "UPDATE item SET stock = stock + 1 WHERE id = 1"
    pears = "UPDATE item SET stock = stock + 1 WHERE id IN (2, 3, 4)"
    with observer.transaction() as other:
        # The server gives up the transaction that has changed less.
        other.execute(text(pears))
        await session.execute(text(plum))
        waiting = asyncio.create_task(asyncio.to_thread(other.execute, text(plum)))
        try:
            await eventually(lambda: observer.scalar(_WAITING) == 1, within=5)
            await session.execute(text(pears))
        finally:
            await waiting


# Not innodb_trx: it stays as it was while it is asked more often than ten times a second.
_WAITING = (
    "SELECT count(*) FROM information_schema.processlist WHERE db = database() "
    "AND info LIKE 'UPDATE item%%id = 1'"
)

_FATAL: dict[str, Failure] = {
    "sqlite": _roll_back_on_conflict,
    "postgresql": _abort,
    "mysql": _lose_a_deadlock,
}


@ON_EACH
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
async def test_commit_of_an_ended_transaction_fails(database_url: str, explicit: bool) -> None:
    """The client is told of the failure, nothing is stored, and no callback runs."""
    observer = Observer(database_url)
    app = make_app(database_url)
    called: list[str] = []
    fail = _FATAL[observer.kind]

    @app.post("/")
    async def run(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        on_commit(lambda: called.append("apple"))
        with suppress(DBAPIError):
            await fail(session, observer)
        if explicit:
            await session.commit()
        return empty(200)

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add_all(Item(name=name) for name in ("plum", "pear", "peach", "fig"))
        assert (await client.post("/")).status_code == 500
        await settled(app, observer)
        assert "apple" not in observer.names()
        assert called == []


@ON_EACH
async def test_an_error_caught_outside_of_a_savepoint_is_harmless(database_url: str) -> None:
    """After a rollback to the savepoint the transaction is whole, and is committed."""
    observer = Observer(database_url)
    app = make_app(database_url)

    @app.post("/")
    async def run(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        with suppress(DBAPIError):
            async with session.begin_nested():
                await _abort(session, observer)
        assert await session.scalar(select(Item.name)) == "apple"
        return empty(200)

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple"]


@ON_EACH
async def test_a_rollback_makes_a_caught_error_forgotten(database_url: str) -> None:
    """What is done after it is a transaction of its own."""
    observer = Observer(database_url)
    app = make_app(database_url)

    @app.post("/")
    async def run(request: Request, session: AsyncSession) -> HTTPResponse:
        with suppress(DBAPIError):
            await _FATAL["postgresql"](session, observer)
        await session.rollback()
        session.add(Item(name="apple"))
        return empty(200)

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple"]
