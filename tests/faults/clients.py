"""Clients that do what no decent client does: they leave, stall, send half a body, never read."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Coroutine, Iterable
from contextlib import asynccontextmanager, suppress
from typing import Any, TypeVar

from tests.servers import HOST
from tests.shop import RawClient

T = TypeVar("T")


@asynccontextmanager
async def connected(port: int, *, receive_buffer: int | None = None) -> AsyncIterator[RawClient]:
    """Connect to a server; leave it at the end without another word.

    Args:
        port: of the server.
        receive_buffer: bytes that the system takes for a client that does not read.
    """
    sock = socket.socket()
    sock.setblocking(False)
    if receive_buffer is not None:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    await asyncio.get_running_loop().sock_connect(sock, (HOST, port))
    limit = receive_buffer or 2**16
    reader, writer = await asyncio.open_connection(sock=sock, limit=limit)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.transport.abort()


async def leave_after(port: int, head: str, seconds: float) -> bytes:
    """Send a request without a body and leave after a time; returns what has come until then."""
    async with connected(port) as client:
        client.send(head)
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                return await client.reader.read(2**16)
    return b""


async def at_once(work: Iterable[Coroutine[Any, Any, T]], *, limit: int) -> list[T]:
    """Run coroutines concurrently, never more than ``limit`` of them; returns their results."""
    places = asyncio.Semaphore(limit)

    async def run(each: Coroutine[Any, Any, T]) -> T:
        async with places:
            return await each

    return list(await asyncio.gather(*map(run, work)))
