"""Under an ASGI server the same holds as under Sanic's own."""

import asyncio
from typing import Any

import pytest
from sanic import HTTPResponse, Request, text
from sanic.response import BaseHTTPResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from tests.databases import on_postgresql
from tests.handlers.helpers import use_session
from tests.shop import Item, Observer, Shop, asgi_serving, checked_out, doom, errors, settled


async def test_asgi_commits_before_the_first_message(app: Shop, observer: Observer) -> None:
    """Under an ASGI server too the row is stored when the answer begins."""
    seen: list[Any] = []

    @app.post("/<status:int>")
    async def add(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name=f"apple {status}"))
        await session.flush()
        return text("stored", status)

    async def look(message: dict[str, Any]) -> None:
        seen.append((observer.names(), checked_out(app)))

    async with asgi_serving(app) as server:
        assert (await server.request("POST", "/500")).status == 500
        assert observer.names() == []
        assert (await server.request("POST", "/200", send=look)).status == 200
        assert seen[0] == (["apple 200"], 0)


async def test_asgi_commit_failure_reaches_the_client(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Under an ASGI server too a failed COMMIT is an error for the client."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        await doom(session, observer)
        return text("stored")

    async with asgi_serving(app) as server:
        answer = await server.request("POST", "/")
        assert answer.status >= 500
        assert len(errors(caplog)) == 1
        await settled(app, observer)


@pytest.mark.parametrize("asks", [True, False])
@on_postgresql
async def test_asgi_client_that_leaves_within_the_body(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture, asks: bool
) -> None:
    """A truncated body never leads to a commit, though Sanic runs the handler with it."""
    bodies: list[bytes] = []

    if asks:

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            bodies.append(request.body)
            session.add(Item(name="half"))
            await session.flush()
            return text("stored")
    else:

        @app.post("/")
        async def note(request: Request) -> HTTPResponse:
            bodies.append(request.body)
            await use_session(request, "half")
            return text("stored")

    async with asgi_serving(app) as server:
        answer = await server.request(
            "POST",
            "/",
            {"type": "http.request", "body": b"half", "more_body": True},
            headers={"content-length": "8"},
        )
        assert answer.status != 200
        assert errors(caplog) == [], "it is no fault of the server"
        assert observer.names() == []
        await settled(app, observer)
        answer = await server.request(
            "POST",
            "/",
            {"type": "http.request", "body": b"whole b", "more_body": True},
            {"type": "http.request", "body": b"y", "more_body": False},
            headers={"content-length": "8"},
        )
        assert answer.status == 200
        assert observer.names() == ["half"]


@on_postgresql
async def test_asgi_client_that_leaves_within_a_chunked_body(app: Shop, observer: Observer) -> None:
    """A body of unknown length that is cut off never leads to a commit either."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="half"))
        await session.flush()
        return text("stored")

    async with asgi_serving(app) as server:
        answer = await server.request(
            "POST",
            "/",
            {"type": "http.request", "body": b"half", "more_body": True},
            headers={"transfer-encoding": "chunked"},
        )
        assert answer.status != 200
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_asgi_middleware_that_answers_first(app: Shop, observer: Observer) -> None:
    """Under an ASGI server too the work of such middleware is rolled back."""

    @app.on_request
    async def guard(request: Request) -> HTTPResponse:
        await use_session(request)
        return text("stop")

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with asgi_serving(app) as server:
        assert (await server.request("POST", "/")).body == b"stop"
        await settled(app, observer, within=0.2)
        assert observer.names() == []


@on_postgresql
async def test_asgi_request_that_is_cancelled(app: Shop, observer: Observer) -> None:
    """An ASGI server that cancels a request leaves nothing behind."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="half"))
        await session.flush()
        reached.set()
        await asyncio.sleep(5)
        return text("stored")

    async with asgi_serving(app) as server:
        running = asyncio.create_task(server.request("POST", "/"))
        await asyncio.wait_for(reached.wait(), 2)
        running.cancel()
        await asyncio.wait({running})
        await settled(app, observer)
        assert observer.names() == []


@on_postgresql
@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("asks", [True, False])
async def test_asgi_request_that_is_cancelled_in_response_middleware(
    app: Shop, observer: Observer, asks: bool, before: bool
) -> None:
    """What the handler did stays; the session of the middleware is ended though nobody answers."""
    reached = asyncio.Event()

    if before:

        @app.on_request
        async def begin(request: Request) -> None:
            await request.ctx.session.execute(select(1))

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        await use_session(request, "after")
        reached.set()
        await asyncio.sleep(5)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="handler"))
        return text("stored")

    @app.get("/")
    async def answer(request: Request) -> HTTPResponse:
        return text("ok")

    async with asgi_serving(app) as server:
        running = asyncio.create_task(server.request("POST" if asks else "GET", "/"))
        await asyncio.wait_for(reached.wait(), 2)
        running.cancel()
        await asyncio.wait({running})
        await settled(app, observer)
        assert observer.names() == (["handler"] if asks else [])
