"""Websockets, and apps that are served in other ways or more than once."""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, closing
from typing import Any

import httpx
import pytest
from sanic import HTTPResponse, Request, Websocket, json
from sanic.views import HTTPMethodView
from sanic_testing.reusable import ReusableClient  # type: ignore[import-untyped]
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import ConfigurationError, Database
from tests.injection.helpers import App, Note, Sink, make_sink, notes_of
from tests.serving import serving


async def test_a_websocket_handler_opens_a_session_for_each_message(
    app: App, websocket: Callable[[httpx.AsyncClient, str], Any]
) -> None:
    """``db: Database`` is injected beside path parameters and dependencies."""
    app.ext.add_dependency(Sink, make_sink)

    async def chat(request: Request, ws: Websocket, room: str, db: Database, sink: Sink) -> None:
        async for message in ws:
            async with db.session() as session:
                session.add(Note(text=f"{room}: {message}"))
            await ws.send(sink.text)

    app.add_websocket_route(chat, "/<room>")
    async with serving(app) as client:
        async with websocket(client, "/lobby") as socket:
            for message in ("a", "b"):
                await socket.send(message)
                assert await socket.recv() == "plain"
        assert await notes_of(app) == ["plain", "lobby: a", "lobby: b"]


@pytest.fixture
def websocket() -> Callable[[httpx.AsyncClient, str], Any]:
    """Open a websocket at a path of the served app."""
    from websockets.asyncio.client import ClientConnection, connect

    @asynccontextmanager
    async def open_socket(client: httpx.AsyncClient, path: str) -> AsyncIterator[ClientConnection]:
        url = str(client.base_url).replace("http", "ws").rstrip("/")
        async with connect(f"{url}{path}", proxy=None) as connection:
            yield connection

    return open_socket


def add_counting_handlers(app: App) -> list[str]:
    """Add handlers that tell how often they were called."""
    calls: list[str] = []
    app.ext.add_dependency(Sink, make_sink)

    @app.post("/<value>")
    async def handler(request: Request, value: str, session: Session, db: Database) -> HTTPResponse:
        calls.append(value)
        session.add(Note(text=value))
        session.flush()
        return json(session.scalar(select(func.count()).select_from(Note)))

    @app.get("/")
    async def root(request: Request, sink: Sink, session: AsyncSession) -> HTTPResponse:
        calls.append("sink")
        return json(sink.text)

    async def socket(request: Request, ws: Websocket, db: Database) -> None:
        async with db.session() as session:
            await ws.send(str(await session.scalar(select(func.count()).select_from(Note))))

    app.add_websocket_route(socket, "/ws")

    class Viewed(HTTPMethodView, attach=app, uri="/view"):
        async def get(self, request: Request, session: Session) -> HTTPResponse:
            return json(session.scalar(select(func.count()).select_from(Note)))

    return calls


async def test_an_app_may_be_served_again(app: App) -> None:
    """A second start wraps nothing twice and finds the data in the file."""
    calls = add_counting_handlers(app)
    for number in (1, 2, 3):
        async with serving(app) as client:
            assert (await client.post("/x")).json() == number
            assert (await client.get("/view")).json() == number
            assert (await client.head("/view")).status_code == 200
            found: Any = app.router.find_route_by_view_name("handler")
            handler = found.handler
            assert handler.__wrapped__.__name__ == "handler"
            assert not hasattr(handler.__wrapped__, "__wrapped__")
    assert calls == ["x", "x", "x"]


async def test_routes_that_are_added_later_are_as_the_others(
    app: App, websocket: Callable[[httpx.AsyncClient, str], Any]
) -> None:
    """Injected and committed, or refused; those that were there are wrapped once."""
    calls = add_counting_handlers(app)
    # sanic-ext's part for it fails on routes that it has not seen at the start.
    app.config.CORS = False

    async def recipe(request: Request, value: str) -> HTTPResponse:
        request.ctx.session.add(Note(text=value))
        await request.ctx.session.flush()
        return json("stored")

    async def plain(request: Request, value: str, session: Session, sink: Sink) -> HTTPResponse:
        session.add(Note(text=f"{sink.text}-{value}"))
        return json("stored")

    async def wrong(request: Request, ws: Websocket, session: Session) -> None:
        raise AssertionError("not reached")

    async def socket(request: Request, ws: Websocket, db: Database) -> None:
        async with db.read_session() as session:
            await ws.send(str(await session.scalar(select(func.count()).select_from(Note))))

    async with serving(app) as client:
        with app.amend():
            app.add_route(recipe, "/recipe/<value>", methods=["POST"])
            app.add_route(plain, "/plain/<value>", methods=["POST"])
            app.add_websocket_route(socket, "/later")
        assert (await client.post("/plain/a")).json() == "stored"
        assert (await client.post("/recipe/b")).json() == "stored"
        assert await notes_of(app) == ["plain", "plain-a", "b"]
        assert (await client.post("/c")).json() == 4
        assert calls == ["c"]
        found: Any = app.router.find_route_by_view_name("handler")
        assert not hasattr(found.handler.__wrapped__, "__wrapped__")
        async with websocket(client, "/later") as connection:
            assert await connection.recv() == "4"
        with pytest.raises(ConfigurationError, match=r"'app\.wrong' asks for"), app.amend():
            app.add_websocket_route(wrong, "/wrong")


def test_sanic_testings_client_restarts_the_server(app: App) -> None:
    """Each request of ``test_client`` is a start of its own; the file keeps the data."""
    add_counting_handlers(app)
    for number in (1, 2):
        _, response = app.test_client.post("/x")
        assert (response.status, response.json) == (200, number)
    _, response = app.test_client.get("/")
    assert response.status == 500, "make_sink finds more than one note"


def test_sanic_testings_reusable_client_works(app: App) -> None:
    """One start, several requests."""
    add_counting_handlers(app)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    # The loop that it makes by itself it never closes.
    with (
        closing(asyncio.new_event_loop()) as loop,
        ReusableClient(app, host="127.0.0.1", port=port, loop=loop) as client,
    ):
        for number in (1, 2):
            _, response = client.post("/x")
            assert (response.status, response.json) == (200, number)


async def test_sanic_testings_asgi_client_works(app: App) -> None:
    """The ASGI client starts the app for each request too."""
    add_counting_handlers(app)
    for number in (1, 2):
        _, response = await app.asgi_client.post("/x")
        assert (response.status, response.json) == (200, number)
    _, response = await app.asgi_client.get("/view")
    assert response.json == 2
