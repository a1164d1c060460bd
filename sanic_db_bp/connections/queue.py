"""The idle connections of a pool, and the tasks that wait for one: first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from contextvars import Context
from typing import TYPE_CHECKING

from sqlalchemy.util.queue import AsyncAdaptedQueue, Empty, Full

from ..bridge import await_only

if TYPE_CHECKING:
    from sqlalchemy.pool import ConnectionPoolEntry


class FairQueue(AsyncAdaptedQueue["ConnectionPoolEntry"]):
    """Idle connections, and the tasks that wait for one.

    A connection that comes back is handed to the task that has waited longest. ``asyncio.Queue``
    lets a newcomer take it before the waiting task wakes up, which under load makes some wait far
    longer than others.
    """

    def __init__(self, maxsize: int = 0, use_lifo: bool = False) -> None:
        super().__init__(maxsize, use_lifo)
        self.idle: deque[ConnectionPoolEntry] = deque()
        """The last used at the end, because it is the one surely still open."""
        self._waiting: deque[asyncio.Future[ConnectionPoolEntry]] = deque()

    def empty(self) -> bool:
        """Whether nothing is idle."""
        return not self.idle

    def full(self) -> bool:
        """Whether one more would be too many."""
        return 0 < self.maxsize <= len(self.idle)

    def qsize(self) -> int:
        """How many are idle."""
        return len(self.idle)

    def waiting(self) -> int:
        """How many tasks wait."""
        return sum(not waiter.done() for waiter in self._waiting)

    def put_nowait(self, item: ConnectionPoolEntry) -> None:
        """Hand over to the task that has waited longest, or keep as idle."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_result(item)
                return
        if 0 < self.maxsize <= len(self.idle):
            raise Full
        self.idle.append(item)

    def put(
        self, item: ConnectionPoolEntry, block: bool = True, timeout: float | None = None
    ) -> None:
        """Never waits: there are as many places as connections."""
        self.put_nowait(item)

    def get_nowait(self) -> ConnectionPoolEntry:
        """Return an idle one, the last used first."""
        try:
            return self.idle.pop()
        except IndexError:
            raise Empty from None

    def get(self, block: bool = True, timeout: float | None = None) -> ConnectionPoolEntry:
        """Return an idle one, or wait for the next, at most so many seconds."""
        if self.idle or not block:
            return self.get_nowait()
        return await_only(self._next(timeout))

    async def _next(self, seconds: float | None) -> ConnectionPoolEntry:
        loop = asyncio.get_running_loop()
        waiter: asyncio.Future[ConnectionPoolEntry] = loop.create_future()
        self._waiting.append(waiter)
        timer = None
        if seconds is not None:
            # It outlives its cancellation, and in the request's context would keep the request.
            timer = loop.call_later(max(0, seconds), _give_up, waiter, context=Context())
        try:
            return await waiter
        except asyncio.CancelledError:
            if waiter.done() and not waiter.cancelled():
                self._pass_on(waiter)
            raise
        finally:
            if timer is not None:
                timer.cancel()

    def _pass_on(self, waiter: asyncio.Future[ConnectionPoolEntry]) -> None:
        if waiter.exception() is None:
            self.put_nowait(waiter.result())
        else:
            self.wake_next()

    def wake_next(self) -> None:
        """Let the task that has waited longest try to connect: a place has become free."""
        while self._waiting:
            waiter = self._waiting.popleft()
            if not waiter.done():
                waiter.set_exception(Empty())
                return


def _give_up(waiter: asyncio.Future[ConnectionPoolEntry]) -> None:
    if not waiter.done():
        waiter.set_exception(Empty())
