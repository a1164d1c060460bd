"""One session of a unit of work that is in use, and which task uses it just now."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection
from sqlalchemy.orm import Session

from ..bridge import await_only, current_task, uninterrupted
from ..exceptions import (
    ConcurrentSessionUse,
    SessionError,
    SessionFinished,
    SessionOutsideBridge,
)

if TYPE_CHECKING:
    from ..unit_of_work import UnitOfWork

logger = logging.getLogger("sanic.root.db")

STILL_IN_USE = 2.0
"""Seconds that the end of a unit of work waits for another task that still uses its session.

After them the task is cancelled, and has as long again to let go.
"""


class SessionUse:
    """One session of a unit of work that is in use, and which task uses it just now."""

    __slots__ = ("_connections", "_freed", "finished", "session", "unit", "used_by")

    def __init__(self, unit: UnitOfWork, session: Session) -> None:
        self.unit = unit
        self.used_by: asyncio.Task[Any] | None = None
        self.finished = unit.finished
        self.session = None if unit.finished else session
        """The plain form; nothing after the end."""
        self._connections: list[Connection] = []
        self._freed: asyncio.Future[None] | None = None

    @property
    def database(self) -> str:
        """The name of the database."""
        return self.unit.database.name

    @property
    def transacting(self) -> Session | None:
        """The session, if it has a transaction under way."""
        session = self.session
        return session if session is not None and session.in_transaction() else None

    def enter(self, task: asyncio.Task[Any] | None) -> None:
        """Reserve the session.

        Args:
            task: which uses it, if it runs in the bridge; see :func:`bridged_task`.

        Raises:
            SessionFinished, ConcurrentSessionUse, SessionOutsideBridge: it may not use it.
        """
        if task is None or self.used_by is not None or self.finished:
            raise self._refusal(task)
        self.used_by = task

    def _refusal(self, task: asyncio.Task[Any] | None) -> SessionError:
        if self.finished:
            return SessionFinished(self.database)
        if task is None and current_task() is None:
            return SessionOutsideBridge(self.database, "in a thread")
        if self.used_by is not None:
            return ConcurrentSessionUse(self.database)
        return SessionOutsideBridge(self.database, "in a task or function of its own")

    def leave(self) -> None:
        """Let other tasks use the session again."""
        self.used_by = None
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)

    def connected(self, connection: Connection) -> None:
        """Take note of a connection, so that it can be discarded if all else fails."""
        if connection not in self._connections:
            self._connections = [each for each in self._connections if not each.closed]
            self._connections.append(connection)

    def close(self) -> None:
        """Roll back what was not committed and give the connection back; runs in the bridge."""
        try:
            if self.session is not None and not self.finished:
                self._close(self.session)
        finally:
            # Nothing may keep the other alive until the garbage collector comes by.
            self.finished = True
            self.session = None
            self._connections.clear()

    def _close(self, session: Session) -> None:
        try:
            if self.used_by is not None and not self._wait_until_free():
                self.discard()
            elif session.in_transaction() or session.identity_map:
                session.close()
        except BaseException as error:
            if self.used_by is not None:
                await_only(uninterrupted(self._cancel_use(), within=STILL_IN_USE))
            self.discard()
            if not isinstance(error, Exception):
                raise
            # The transaction is gone all the same; its own error matters more than this one.
            logger.error("%s: ROLLBACK failed, the connection was cut: %s", self.database, error)

    def discard(self) -> None:
        """Cut the connection; its place in the pool is free again."""
        self.finished = True
        for connection in self._connections:
            if not connection.closed:
                connection.invalidate()
                connection.close()

    def _wait_until_free(self) -> bool:
        """Wait for the task that uses the session; in the end its statement is cancelled."""
        self._freed = asyncio.get_running_loop().create_future()
        await_only(asyncio.wait({self._freed}, timeout=STILL_IN_USE))
        if self.used_by is not None:
            await_only(self._cancel_use())
        return self._freed.done()

    async def _cancel_use(self) -> None:
        assert self.used_by is not None
        assert self._freed is not None
        self.used_by.cancel()
        await asyncio.wait({self._freed}, timeout=STILL_IN_USE)
