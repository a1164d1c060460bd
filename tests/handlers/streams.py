"""Every way to write a streaming handler."""

from collections.abc import Awaitable, Callable
from typing import Any

from sanic import HTTPResponse, Request, text
from sanic.response import ResponseStream
from sqlalchemy.ext.asyncio import AsyncSession

from tests.shop import Item, Shop

Write = Callable[[str], Awaitable[None]]


Work = Callable[[AsyncSession, Write], Awaitable[None]]


async def respond(request: Request, session: AsyncSession, work: Work, status: int) -> None:
    response = await request.respond(status=status)
    await work(session, response.send)


async def respond_and_end(request: Request, session: AsyncSession, work: Work, status: int) -> None:
    response = await request.respond(status=status)
    await work(session, response.send)
    await response.eof()


async def respond_and_end_with_data(
    request: Request, session: AsyncSession, work: Work, status: int
) -> None:
    response = await request.respond(status=status)
    await work(session, response.send)
    await response.send("", True)


async def return_stream(
    request: Request, session: AsyncSession, work: Work, status: int
) -> ResponseStream:
    async def stream(response: Any) -> None:
        await work(session, response.write)

    return ResponseStream(stream, status=status)


WAYS: dict[str, Any] = {
    "respond": respond,
    "respond_and_end": respond_and_end,
    "respond_and_end_with_data": respond_and_end_with_data,
    "return_stream": return_stream,
}


def add_stream(app: Shop, way: Any, work: Work, status: int = 200) -> None:
    """Add the route / that streams in the given way."""

    @app.post("/")
    async def stream(request: Request, session: AsyncSession) -> Any:
        return await way(request, session, work, status)


async def receive_pieces(request: Request, session: AsyncSession) -> HTTPResponse:
    stream: Any = request.stream
    size = 0
    async for piece in stream:
        session.add(Item(name=f"piece {size}"))
        await session.flush()
        size += len(piece)
    return text(str(size))
