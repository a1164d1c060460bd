"""A client that leaves and a time that is over roll everything back."""

import asyncio
from typing import Any

import pytest
from sanic import HTTPResponse, Request, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.databases import on_servers
from tests.proxy import proxied
from tests.serving import serving
from tests.shop import (
    Item,
    Observer,
    Shop,
    SlowQuery,
    errors,
    eventually,
    make_app,
    raw_client,
    settled,
)


async def test_a_client_that_leaves_in_a_query(app: Shop, observer: Observer) -> None:
    """Nothing is stored and the connection is out of the pool no longer."""
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        await query.run(session)
        return text("stored")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await query.begun()
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


async def test_a_client_that_leaves_between_two_statements(app: Shop, observer: Observer) -> None:
    """What the handler did before is rolled back, and the connection stays good."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        reached.set()
        await asyncio.sleep(5)
        return text("stored")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 2)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


async def test_a_client_that_leaves_a_plain_session(app: Shop, observer: Observer) -> None:
    """A handler with a plain session that catches the cancellation stores nothing either."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: Session) -> HTTPResponse:
        session.add(Item(name="apple"))
        session.flush()
        reached.set()
        try:
            await asyncio.sleep(5)
        finally:
            session.add(Item(name="pear"))
        return text("stored")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 2)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


async def test_a_client_that_leaves_during_the_commit(
    database_url: str, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """A COMMIT runs to its end, and its connection goes back to the pool."""
    async with proxied(database_url) as proxy:
        app = make_app(proxy.url)
        tasks: list[asyncio.Task[Any] | None] = []

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="apple"))
            await session.flush()
            await proxy.watch(session)
            proxy.hold_commits()
            tasks.append(asyncio.current_task())
            return text("stored")

        async with serving(app) as client, raw_client(client) as leaver:
            leaver.send("POST / HTTP/1.1\nContent-Length: 0")
            await proxy.held()
            leaver.leave()
            await eventually(lambda: tasks[0] is not None and tasks[0].cancelling())
            proxy.release()
            await settled(app, observer)
            assert observer.names() == ["apple"]
            assert app.ctx.db.pool_status()["idle"] == 1
            assert errors(caplog) == [], "the COMMIT has not failed"


@on_servers
async def test_a_commit_without_an_answer_is_given_up(
    database_url: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A COMMIT that hangs after its client has left holds its place for a bounded time."""
    monkeypatch.setattr("sanic_db_bp.connections.commit.FINISH_WITHIN", 0.1)
    async with proxied(database_url) as proxy:
        app = make_app(proxy.url)

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="apple"))
            await session.flush()
            proxy.hold_commits()
            return text("stored")

        # asyncpg takes two seconds of its own to find the line dead.
        async with serving(app) as client, raw_client(client) as leaver:
            leaver.send("POST / HTTP/1.1\nContent-Length: 0")
            await proxy.held()
            leaver.leave()
            await settled(app, observer, within=4)
            proxy.release()


async def test_response_timeout_in_a_query(app: Shop, observer: Observer) -> None:
    """The client gets 503, nothing is stored, and the server works at the query no longer."""
    app.config.RESPONSE_TIMEOUT = 0.3
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        await query.run(session)
        return text("stored")

    async with serving(app) as client:
        response = await client.post("/")
        assert response.status_code == 503
        await settled(app, observer)
        if observer.kind != "sqlite":
            await eventually(lambda: observer.slow_queries() == 0)
        assert observer.names() == []


async def test_response_timeout_between_two_statements(app: Shop, observer: Observer) -> None:
    """The client gets 503 and nothing is stored."""
    app.config.RESPONSE_TIMEOUT = 0.2

    @app.post("/")
    async def add(request: Request, session: Session) -> HTTPResponse:
        session.add(Item(name="apple"))
        session.flush()
        await asyncio.sleep(5)
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 503
        await settled(app, observer)
        assert observer.names() == []


async def test_a_cancellation_that_the_handler_survives(app: Shop, observer: Observer) -> None:
    """A timeout of the handler's own round a query leaves the session usable."""
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        try:
            async with asyncio.timeout(0.1):
                await asyncio.sleep(5)
        except TimeoutError:
            session.add(Item(name="pear"))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple", "pear"]
        assert query is not None
