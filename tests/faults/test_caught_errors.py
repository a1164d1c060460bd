"""A database error that a handler catches never makes the COMMIT keep less than the client is told.

A failed statement may end its transaction, and no database says so at the COMMIT: PostgreSQL
answers it with ROLLBACK, MariaDB commits what came after a deadlock or a lost race for a row,
SQLite has stored each statement that came after an error such as a full disk or ``OR ROLLBACK``.
"""

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress

import pytest
from sanic import HTTPResponse, Request, empty
from sqlalchemy import insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from sanic_db_bp import on_commit
from tests.serving import serving
from tests.shop import Item, Observer, Shop, connection_id, eventually, make_app, settled

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


async def _fill_the_disk(session: AsyncSession, _observer: Observer) -> None:
    pages = await session.scalar(text("PRAGMA page_count"))
    await session.execute(text(f"PRAGMA max_page_count = {pages + 1}"))
    try:
        await session.execute(text("INSERT INTO item (name, stock) VALUES (zeroblob(50000), 0)"))
    finally:
        await session.execute(text("PRAGMA max_page_count = 1000000"))


async def _come_too_late(session: AsyncSession, observer: Observer) -> None:
    await session.execute(text("SELECT * FROM item"))
    observer.run("UPDATE item SET stock = stock + 1 WHERE id = 1")
    await session.execute(text("UPDATE item SET stock = stock + 1 WHERE id = 1"))


async def _fill_the_lock_table(session: AsyncSession, _observer: Observer) -> None:
    # The server's error and what it does, as its memory would not be full in a test's time.
    await session.execute(text("ROLLBACK"))
    await session.execute(text("SIGNAL SQLSTATE 'HY000' SET MYSQL_ERRNO = 1206"))


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

_FATAL: list[tuple[str, Failure]] = [
    ("sqlite", _roll_back_on_conflict),
    ("sqlite", _fill_the_disk),
    ("postgresql-asyncpg", _abort),
    ("postgresql-psycopg", _abort),
    ("mariadb-asyncmy", _lose_a_deadlock),
    ("mariadb-asyncmy", _come_too_late),
    ("mariadb-asyncmy", _fill_the_lock_table),
]

ON_FATAL = pytest.mark.parametrize(
    ("database_url", "fail"),
    _FATAL,
    ids=[f"{database}{fail.__name__}" for database, fail in _FATAL],
    indirect=["database_url"],
)

FRUITS = ["plum", "pear", "peach", "fig"]


def _app(database_url: str, fail: Failure) -> Shop:
    if fail is _come_too_late:
        # The default of MariaDB since 11.6.
        isolated = {"init_command": "SET SESSION innodb_snapshot_isolation = ON"}
        return make_app(database_url, connect_args=isolated)
    return make_app(database_url)


async def _stock(app: Shop) -> None:
    async with app.ctx.db.session() as session:
        session.add_all(Item(name=name) for name in FRUITS)


@ON_FATAL
@pytest.mark.parametrize("explicit", [False, True], ids=["automatic", "explicit"])
async def test_commit_of_an_ended_transaction_fails(
    database_url: str, fail: Failure, explicit: bool
) -> None:
    """The client is told of the failure, nothing is stored, and no callback runs."""
    observer = Observer(database_url)
    app = _app(database_url, fail)
    called: list[str] = []

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
        await _stock(app)
        assert (await client.post("/")).status_code == 500
        await settled(app, observer)
        assert "apple" not in observer.names()
        assert called == []


@ON_FATAL
@pytest.mark.parametrize("status", [200, 409])
async def test_what_follows_the_end_of_a_transaction_is_not_stored(
    database_url: str, fail: Failure, status: int
) -> None:
    """A statement after the caught error is rolled back with the rest, and the next one is kept."""
    observer = Observer(database_url)
    app = _app(database_url, fail)

    @app.post("/")
    async def run(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        with suppress(DBAPIError):
            await fail(session, observer)
        with suppress(DBAPIError):
            await session.execute(insert(Item).values(name="cherry", stock=0))
        return empty(status)

    @app.post("/next")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="kiwi"))
        return empty()

    async with serving(app) as client:
        await _stock(app)
        assert (await client.post("/")).status_code == (500 if status == 200 else status)
        await settled(app, observer)
        assert sorted(observer.names()) == sorted(FRUITS)
        assert (await client.post("/next")).status_code == 204
        assert sorted(observer.names()) == sorted([*FRUITS, "kiwi"])


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
            await _abort(session, observer)
        await session.rollback()
        session.add(Item(name="apple"))
        return empty(200)

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple"]


@pytest.mark.parametrize(
    "database_url",
    ["postgresql-asyncpg", "postgresql-psycopg", "mariadb-asyncmy"],
    indirect=True,
)
async def test_a_connection_that_is_lost_after_a_caught_error_fails_the_commit(
    database_url: str,
) -> None:
    """The error is that of the connection; some drivers' COMMIT would do nothing, and say so."""
    observer = Observer(database_url)
    app = make_app(database_url)

    @app.post("/")
    async def run(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        with suppress(DBAPIError):
            async with session.begin_nested():
                await session.execute(text("SELECT nonsense"))
        observer.kill(await connection_id(session))
        with pytest.raises(DBAPIError) as caught:
            await session.commit()
        assert caught.value.connection_invalidated
        return empty(409)

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 409
        await settled(app, observer)
        assert observer.names() == []
