"""A connection pool for one event loop, which takes no lock."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from contextvars import Context
from typing import TYPE_CHECKING, Any, ClassVar, TypedDict

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.pool import AsyncAdaptedQueuePool, QueuePool
from sqlalchemy.util.queue import Empty, Full

from ..bridge import await_only, in_greenlet, run_in_bridge
from ..exceptions import DatabaseUnavailable
from .liveness import cut
from .queue import FairQueue

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine
    from sqlalchemy.pool import ConnectionPoolEntry

logger = logging.getLogger("sanic.root.db")

CLOSE_WITHIN = 1.0
"""Seconds that idle connections have to say goodbye to the server."""

SHORTEST_OPENING = 2.0
"""Seconds that opening a connection may take, however short ``POOL_TIMEOUT`` is."""


class PoolStatus(TypedDict):
    """How the connections of one pool are used at this moment."""

    size: int
    checked_out: int
    idle: int
    overflow: int


class PoolExhausted(DatabaseUnavailable, PoolTimeoutError):
    """No connection became free within ``POOL_TIMEOUT``."""

    entry = "pool-exhausted"


class FairPool(AsyncAdaptedQueuePool):
    """SQLAlchemy's pool for asyncio, with a fair queue and an error that names the settings.

    A connection is opened in a task of its own: if the request that wanted it is cancelled
    meanwhile, the connection is not lost but idle for the next one, so that a pool comes up even
    if opening a connection takes longer than a request may.
    """

    _queue_class = FairQueue
    _pool: FairQueue

    is_closed: Callable[[Any], bool] = staticmethod(lambda _driver_connection: False)
    """Whether an idle connection is known to be dead; each database has its own way to tell."""

    on_wait: tuple[Callable[[float, bool], None], ...] = ()
    """Called after each wait for a connection: how many seconds, and whether there was one.

    They belong to the class, which each engine has for itself: SQLAlchemy makes a new pool of it
    when an engine is disposed.
    """

    under_way: ClassVar[set[asyncio.Task[None]]] = set()
    """Tasks with a connection of their own, which end by themselves; also of the class."""

    on_dispose: tuple[Callable[[], None], ...] = ()
    """Called when the pool is disposed. SQLAlchemy's own event would cost each statement."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._opening: set[asyncio.Task[ConnectionPoolEntry]] = set()
        self._closing: set[asyncio.Task[None]] = set()
        self._is_disposed = False

    def waiting(self) -> int:
        """Return how many tasks wait for a connection that others have."""
        return self._pool.waiting()

    def _do_get(self) -> ConnectionPoolEntry:
        if not self.on_wait:
            return self._get()
        started, found = time.perf_counter(), False
        try:
            record = self._get()
            found = True
            return record
        finally:
            for waited in self.on_wait:
                waited(time.perf_counter() - started, found)

    def _get(self) -> ConnectionPoolEntry:
        deadline: float | None = None
        while True:
            while self._pool.idle:
                record = self._pool.idle.pop()
                if self._is_usable(record):
                    return record
                self._drop(record)
            clock = asyncio.get_running_loop().time
            if deadline is None:
                deadline = clock() + self._timeout
            if self._inc_overflow():
                return self._opened(deadline)
            try:
                return self._pool.get(timeout=deadline - clock())
            except Empty:
                if clock() >= deadline:
                    raise self._exhausted() from None

    def _is_usable(self, record: Any) -> bool:
        # SQLAlchemy would open it again in place: in the task of the request, and for it alone.
        opened: float = record.starttime
        too_old = self._recycle > -1 and time.time() - opened > self._recycle
        if too_old or opened < self._invalidate_time or record.dbapi_connection is None:
            return False
        return not self.is_closed(record.dbapi_connection.driver_connection)

    def _drop(self, record: ConnectionPoolEntry) -> None:
        try:
            if record.dbapi_connection is not None:
                # Not in the context of the request: what closes a connection has timers.
                closing = run_in_bridge(record.invalidate)
                await_only(asyncio.get_running_loop().create_task(closing, context=Context()))
        finally:
            self._dec_overflow()
            self._pool.wake_next()

    def _do_return_conn(self, record: ConnectionPoolEntry) -> None:
        if record.dbapi_connection is None:
            self._drop(record)
            return
        if self._is_disposed:
            self._close_late(record)
            return
        try:
            self._pool.put_nowait(record)
        except Full:
            # A connection of the overflow.
            super()._do_return_conn(record)

    def _close_late(self, record: ConnectionPoolEntry) -> None:
        """Close what nobody will take out again."""
        self._dec_overflow()
        if in_greenlet():
            record.close()
        else:
            closing = run_in_bridge(record.close)
            task = asyncio.get_running_loop().create_task(closing, context=Context())
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)

    def _opened(self, deadline: float) -> ConnectionPoolEntry:
        loop = asyncio.get_running_loop()
        # Not in the context of the request, which the connection may keep for as long as it lives.
        task = loop.create_task(run_in_bridge(self._create_connection), context=Context())
        self._opening.add(task)
        left = max(deadline - loop.time(), SHORTEST_OPENING)
        waiting = asyncio.wait({task}, timeout=left)
        try:
            await_only(loop.create_task(waiting, context=Context()))
        except BaseException:
            task.add_done_callback(self._keep, context=Context())
            raise
        if not task.done():
            task.add_done_callback(self._keep, context=Context())
            raise self._too_slow()
        if task.cancelled() or task.exception() is not None:
            self._give_up(task)
        self._opening.discard(task)
        record = task.result()
        if self._is_disposed:
            # Its unit of work has been cut off, and would not give it back.
            self._close_late(record)
            raise DatabaseUnavailable(
                self._orig_logging_name or "db", "the engine was disposed meanwhile"
            )
        return record

    def _keep(self, task: asyncio.Task[ConnectionPoolEntry]) -> None:
        if task.cancelled() or task.exception() is not None:
            self._give_up(task)
        else:
            self._opening.discard(task)
            self._do_return_conn(task.result())

    def _give_up(self, task: asyncio.Task[ConnectionPoolEntry]) -> None:
        self._opening.discard(task)
        self._dec_overflow()
        self._pool.wake_next()

    def dispose(self) -> None:
        """Close every idle connection, and do not wait for those that are being opened."""
        self._is_disposed = True
        for task in self._opening:
            task.cancel()
        for stop in self.on_dispose:
            stop()
        super().dispose()

    async def close_idle(self, within: float) -> None:
        """Close the idle connections, all at once.

        Args:
            within: seconds that they have to say goodbye; what is left then is cut.
        """
        closing = {}
        while not self._pool.empty():
            record = self._pool.get_nowait()
            if record.dbapi_connection is not None:
                # A unit of work that was cut off may have invalidated it after its return.
                connection = record.dbapi_connection.driver_connection
                task = asyncio.create_task(run_in_bridge(record.close))
                closing[task] = record, connection
        if not closing:
            return
        try:
            _, late = await asyncio.wait(closing, timeout=within)
        except asyncio.CancelledError:
            for task, (record, _) in closing.items():
                # The end of the loop cancels those too, some before they have begun: left to the
                # next disposal, which comes with that end.
                task.cancel()
                self._pool.put_nowait(record)
            raise
        for task in late:
            cut(closing[task][1])

    async def end_what_is_under_way(self, within: float) -> None:
        """Wait, after the disposal, for connections that come or go behind everybody's back.

        Args:
            within: seconds that they have; what is left then is cancelled, and has as long again.
        """
        loop = asyncio.get_running_loop()
        end = loop.time() + within
        while tasks := self._under_way_in(loop):
            if (left := end - loop.time()) <= 0:
                for task in tasks:
                    task.cancel()
                await asyncio.wait(tasks, timeout=within)
                return
            await asyncio.wait(tasks, timeout=left)

    def _under_way_in(self, loop: asyncio.AbstractEventLoop) -> set[asyncio.Task[Any]]:
        tasks: list[asyncio.Task[Any]] = [*self.under_way, *self._opening, *self._closing]
        # An event loop that has ended leaves behind what it did not finish.
        return {task for task in tasks if task.get_loop() is loop and not task.done()}

    def _too_slow(self) -> PoolExhausted:
        return PoolExhausted(
            self._orig_logging_name or "db",
            f"a new connection took longer to open than POOL_TIMEOUT, {self.timeout():g} s",
        )

    def _exhausted(self) -> PoolExhausted:
        connections = self.size() + self._max_overflow
        remedy = "Raise POOL_SIZE, or hold connections for less long"
        if getattr(self._dialect, "name", None) == "sqlite":
            remedy = (
                "SQLite has one for writing: end a session before the next is opened, and read "
                "with read sessions"
            )
        return PoolExhausted(
            self._orig_logging_name or "db",
            f"all {connections} connections were in use for {self.timeout():g} s (POOL_TIMEOUT). "
            f"{remedy}",
        )


async def close_connections(engine: AsyncEngine) -> None:
    """Close the connections of an engine, within a bound; what fails is logged."""
    pool = engine.pool
    try:
        async with asyncio.timeout(2 * CLOSE_WITHIN):
            if isinstance(pool, FairPool):
                await pool.close_idle(CLOSE_WITHIN)
            await engine.dispose()
    except (TimeoutError, SQLAlchemyError, OSError):
        logger.exception("closing the connections of %s failed", engine.url)
    if isinstance(pool, FairPool):
        await pool.end_what_is_under_way(CLOSE_WITHIN)


def status_of(engine: AsyncEngine) -> PoolStatus:
    """Return how the pool of an engine is used; all 0 for a pool that keeps none."""
    pool: Any = engine.pool
    if not isinstance(pool, QueuePool):
        return {"size": 0, "checked_out": 0, "idle": 0, "overflow": 0}
    return {
        "size": pool.size(),
        "checked_out": pool.checkedout(),
        "idle": pool.checkedin(),
        "overflow": max(0, pool.overflow()),
    }
