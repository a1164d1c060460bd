"""Under an ASGI server streams are committed as under Sanic's own."""

from contextlib import suppress
from typing import Any

from sanic import HTTPResponse, Request
from sqlalchemy.ext.asyncio import AsyncSession

from tests.databases import on_postgresql
from tests.handlers.streams import Write, add_stream, receive_pieces
from tests.shop import Item, Observer, Shop, asgi_serving, doom, settled


@on_postgresql
async def test_asgi_streams_are_committed_before_their_end(
    app: Shop, observer: Observer, way: Any
) -> None:
    """The row is stored when the last message is sent."""
    seen: list[list[str]] = []

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("ok")

    async def look(message: dict[str, Any]) -> None:
        seen.append(observer.names())

    add_stream(app, way, work)
    async with asgi_serving(app) as server:
        answer = await server.request("POST", "/", send=look)
        assert (answer.status, answer.body, answer.complete) == (200, b"ok", True)
        assert seen[0] == []
        assert seen[-1] == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_asgi_commit_failure_at_the_end(app: Shop, observer: Observer, way: Any) -> None:
    """The last message is not sent, so that the server ends the connection."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("begun")
        await doom(session, observer)

    add_stream(app, way, work)
    async with asgi_serving(app) as server:
        answer = await server.request("POST", "/")
        assert answer.body == b"begun"
        assert not answer.complete
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_asgi_failure_within_the_stream(app: Shop, observer: Observer, way: Any) -> None:
    """The body is not completed, and nothing is stored."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("begun")
        raise ValueError("broken")

    add_stream(app, way, work)
    async with asgi_serving(app) as server:
        answer = await server.request("POST", "/")
        assert not answer.complete
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_asgi_client_that_leaves_within_the_stream(
    app: Shop, observer: Observer, way: Any
) -> None:
    """A server that refuses to send any more makes the stream fail, and nothing is stored."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        for _ in range(3):
            await write("x")

    async def gone(message: dict[str, Any]) -> None:
        if message["type"] == "http.response.body":
            raise OSError("the client is gone")

    add_stream(app, way, work)
    async with asgi_serving(app) as server:
        with suppress(OSError):
            await server.request("POST", "/", send=gone)
        await settled(app, observer)
        assert observer.names() == []


async def test_asgi_upload_that_is_cut_off(app: Shop, observer: Observer) -> None:
    """A handler that reads the body in pieces never commits one that was cut off."""

    @app.post("/", stream=True)
    async def receive(request: Request, session: AsyncSession) -> HTTPResponse:
        return await receive_pieces(request, session)

    async with asgi_serving(app) as server:
        answer = await server.request(
            "POST",
            "/",
            {"type": "http.request", "body": b"half", "more_body": True},
            headers={"content-length": "8"},
        )
        assert answer.status != 200
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_asgi_stream_after_a_body_that_was_cut_off(
    app: Shop, observer: Observer, way: Any
) -> None:
    """A streamed answer to a truncated body is not committed either."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="half"))
        await session.flush()
        await write("ok")

    add_stream(app, way, work)
    async with asgi_serving(app) as server:
        answer = await server.request(
            "POST", "/", {"type": "http.request", "body": b"half", "more_body": True}
        )
        assert not answer.complete
        assert observer.names() == []
        await settled(app, observer)
