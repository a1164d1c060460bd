"""A body that is read in pieces is committed at its end."""

import asyncio
from typing import Any

from sanic import HTTPResponse, Request
from sqlalchemy.ext.asyncio import AsyncSession

from tests.databases import on_postgresql
from tests.handlers.streams import receive_pieces
from tests.serving import serving
from tests.shop import Item, Observer, Shop, raw_client, settled


@on_postgresql
async def test_an_upload_is_committed_at_its_end(app: Shop, observer: Observer) -> None:
    """A handler that reads the body in pieces is one transaction."""

    @app.post("/", stream=True)
    async def receive(request: Request, session: AsyncSession) -> HTTPResponse:
        return await receive_pieces(request, session)

    async def pieces() -> Any:
        for _ in range(3):
            yield b"x" * 10
            await asyncio.sleep(0)

    async with serving(app) as client:
        assert (await client.post("/", content=pieces())).text == "30"
        assert "piece 0" in observer.names()
        await settled(app, observer)


async def test_an_upload_that_is_cut_off(app: Shop, observer: Observer) -> None:
    """A client that leaves within the body of such a handler stores nothing."""
    reached = asyncio.Event()

    @app.post("/", stream=True)
    async def receive(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="begun"))
        await session.flush()
        reached.set()
        return await receive_pieces(request, session)

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 100", b"x" * 10)
        await asyncio.wait_for(reached.wait(), 5)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []
