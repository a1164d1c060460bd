"""Streams that fail at their end, lose their client, or are never read."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.faults.app import STREAMS
from tests.faults.clients import connected
from tests.faults.serving import Served

pytestmark = [
    pytest.mark.asyncio(loop_scope="session"),
    pytest.mark.parametrize("way", STREAMS),
]

NUMBER = 10


async def _whole(client: httpx.AsyncClient, path: str) -> bool:
    """Tell whether a client takes the body for complete."""
    try:
        answer = await client.post(path)
    except httpx.RemoteProtocolError:
        return False
    assert answer.status_code == 200
    return True


async def test_streams_commit_at_their_end(app: Served, way: str) -> None:
    """More streams than connections are all served, and what they wrote is stored."""
    names = [f"good-{way}-{number}" for number in range(NUMBER)]
    async with app.server.client() as client:
        paths = (f"/stream/{way}/{name}?pause=0.01" for name in names)
        assert all(await asyncio.gather(*(_whole(client, path) for path in paths)))
    assert len(app.stored(f"good-{way}")) == 2 * NUMBER
    assert sorted(await app.committed(f"good-{way}")) == sorted(names)
    await app.is_clean()


async def test_a_commit_that_fails_at_the_end(app: Served, way: str) -> None:
    """The body has no end, so that the client can tell; one line of the log has the route."""
    app.server.new_lines()
    doom = "killed" if app.target.observer.kind == "mysql" else "constraint"
    async with app.server.client() as client:
        paths = (f"/stream/{way}/bad-{way}-{number}?doom={doom}" for number in range(NUMBER))
        assert not any(await asyncio.gather(*(_whole(client, path) for path in paths)))
    assert app.stored(f"bad-{way}") == await app.committed(f"bad-{way}") == []
    await app.is_clean()
    lines = [line for line in app.server.new_lines() if "COMMIT failed" in line]
    assert len(lines) == NUMBER
    assert all(f"POST /stream/{way}/bad-{way}-" in line for line in lines)


async def test_clients_that_leave_within_the_stream(app: Served, way: str) -> None:
    """Their connections are free at once, and nothing is stored."""
    start = time.monotonic()
    for _ in range(NUMBER // 5):
        async with AsyncExitStack() as stack:
            for number in range(5):
                client = await stack.enter_async_context(connected(app.server.port))
                client.send(f"POST /stream/{way}/left-{way}-{number}?pause=20 HTTP/1.1")
                await client.reader.readuntil(b"xxx")
    await app.is_clean()
    assert time.monotonic() - start < 4, "not before RESPONSE_TIMEOUT"
    assert app.stored(f"left-{way}") == []


async def test_clients_that_never_read(app: Served, way: str) -> None:
    """RESPONSE_TIMEOUT frees their connections; uvicorn waits until they leave."""
    async with AsyncExitStack() as stack:
        for number in range(5):
            client = await stack.enter_async_context(
                connected(app.server.port, receive_buffer=4096)
            )
            path = f"/stream/{way}/unread-{way}-{number}?chunks=20000"
            client.send(f"POST {path} HTTP/1.1\nContent-Length: 0")
        if app.server.way == "asgi":
            await asyncio.sleep(0.5)
        else:
            await app.server.at_rest(within=10)
    await app.is_clean()
    assert app.stored(f"unread-{way}") == []
