"""Requests that use a session and never reach their handler."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

import pytest
import pytest_asyncio

from tests.faults.clients import connected
from tests.faults.serving import Served
from tests.shop import RawClient

pytestmark = pytest.mark.asyncio(loop_scope="session")

NUMBER = 8

FAULTS = {
    "middleware that answers": ("POST /upload/x HTTP/1.1\nX-Middleware: answers", 202),
    "middleware that raises": ("POST /upload/x HTTP/1.1\nX-Middleware: raises", 500),
    "a dependency that raises": ("POST /unreached/dependency HTTP/1.1", 500),
    "no such route": ("POST /unreached/nowhere HTTP/1.1\nX-Middleware: passes", 404),
    "no such method": ("PUT /unreached/body HTTP/1.1\nX-Middleware: passes", 405),
}


@pytest_asyncio.fixture(autouse=True, loop_scope="session")
async def without_garbage_collector(app: Served) -> AsyncIterator[None]:
    """Nothing may be left to it."""
    async with app.server.client() as client:
        await client.post("/garbage/off")
        yield
        await client.post("/garbage/on")


async def _clients(app: Served, stack: AsyncExitStack) -> list[RawClient]:
    return [await stack.enter_async_context(connected(app.server.port)) for _ in range(NUMBER)]


@pytest.mark.parametrize("fault", FAULTS)
async def test_a_handler_that_is_not_reached(app: Served, fault: str) -> None:
    """The session is finished while the client's connection stays open."""
    head, expected = FAULTS[fault]
    async with AsyncExitStack() as stack:
        clients = await _clients(app, stack)
        for number, client in enumerate(clients):
            client.send(f"{head}\nX-Name: unreached-{number}\nContent-Length: 0")
        answers = await asyncio.gather(*(client.answer() for client in clients))
        assert [status for status, _ in answers] == [expected] * NUMBER
        await app.is_clean()
    assert app.stored("unreached") == []


async def test_a_body_that_is_too_large(app: Served) -> None:
    """Sanic refuses it after the dependencies were made; under ASGI it has no limit."""
    async with AsyncExitStack() as stack:
        clients = await _clients(app, stack)
        for number, client in enumerate(clients):
            client.send(
                f"POST /unreached/body HTTP/1.1\nX-Name: large-{number}\nContent-Length: 7000000",
                bytes(7_000_000 if app.server.way == "asgi" else 1000),
            )
        answers = await asyncio.gather(*(client.answer() for client in clients))
        refused = app.server.way != "asgi"
        assert [status for status, _ in answers] == [413 if refused else 200] * NUMBER
        await app.is_clean()


async def test_a_body_that_is_cut_off(app: Served) -> None:
    """A truncated body never leads to a COMMIT, neither natively nor under ASGI."""
    for path in ("/unreached/body?", "/upload/cut-", "/write/session/cut-", "/write/context/cut-"):
        async with AsyncExitStack() as stack:
            for number, client in enumerate(await _clients(app, stack)):
                head = f"POST {path}{number} HTTP/1.1\nX-Name: cut-{number}\nContent-Length: 1000"
                client.send(head, bytes(500))
            await asyncio.sleep(0.1)
        await app.is_clean()
    assert app.stored("cut") == await app.committed("cut") == []
