"""Streams that fail at their end, lose their client, or are never read."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack

import httpx
import pytest

from tests.faults.app import STREAMS
from tests.faults.clients import connected
from tests.faults.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")
in_both_ways = pytest.mark.parametrize("way", STREAMS)

NUMBER = 10


async def _whole(client: httpx.AsyncClient, path: str) -> bool:
    """Tell whether a client takes the body for complete."""
    try:
        answer = await client.post(path)
    except httpx.RemoteProtocolError:
        return False
    assert answer.status_code == 200
    return True


@in_both_ways
async def test_streams_commit_at_their_end(app: Served, way: str) -> None:
    """More streams than connections are all served, and what they wrote is stored."""
    names = [f"good-{way}-{number}" for number in range(NUMBER)]
    async with app.server.client() as client:
        paths = (f"/stream/{way}/{name}?pause=0.01" for name in names)
        assert all(await asyncio.gather(*(_whole(client, path) for path in paths)))
    assert len(app.stored(f"good-{way}")) == 2 * NUMBER
    assert sorted(await app.committed(f"good-{way}")) == sorted(names)
    await app.is_clean()


@in_both_ways
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


async def _read_begun(app: Served, stack: AsyncExitStack, path: str) -> None:
    """Have as many clients as the database has writers read the first bytes of a stream each."""
    for number in range(app.writers):
        client = await stack.enter_async_context(connected(app.server.port, receive_buffer=4096))
        client.send(f"POST {path.format(number)} HTTP/1.1\nContent-Length: 0")
        await client.reader.readuntil(b"xxx")


@in_both_ways
async def test_clients_that_leave_within_the_stream(app: Served, way: str) -> None:
    """The connection is free at once, and nothing is stored; uvicorn lets the handler go on."""
    asgi = app.server.way == "asgi"
    for batch in "abcde" if app.target.is_file else "ab":
        path = f"/stream/{way}/left-{way}-{batch}{{}}?pause={0.1 if asgi else 20}"
        async with AsyncExitStack() as stack:
            await _read_begun(app, stack, path)
        # Earlier than RESPONSE_TIMEOUT.
        await app.is_clean(within=3)
    stored, committed = app.stored(f"left-{way}"), await app.committed(f"left-{way}")
    assert len(stored) == 2 * len(committed)
    assert asgi or not stored


@pytest.mark.parametrize("app", ["asyncpg-native", "sqlite-asgi"], indirect=True)
async def test_clients_that_never_read(app: Served) -> None:
    """RESPONSE_TIMEOUT frees their connections; under uvicorn they are free when they leave."""
    asgi = app.server.way == "asgi"
    async with AsyncExitStack() as stack:
        await _read_begun(app, stack, "/stream/respond/unread-{}?chunks=20000")
        if not asgi:
            await app.server.at_rest(within=10)
            assert app.stored("unread") == []
    await app.is_clean()
    assert len(app.stored("unread")) == 2 * len(await app.committed("unread"))
