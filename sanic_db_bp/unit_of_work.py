"""One transaction: opened lazily, finished exactly once."""

from __future__ import annotations

import asyncio
import inspect
import logging
from collections.abc import Awaitable, Callable
from contextvars import ContextVar, Token
from typing import TYPE_CHECKING, Any, Literal, cast

from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session, SessionTransaction

from .bridge import await_only, deliver_cancellation, held_back, uninterrupted
from .exceptions import ConcurrentSessionUse, SessionFinished
from .sessions import AsyncReadSession, ReadSession, SessionUse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from .database import Database

logger = logging.getLogger("sanic.root.db")

SessionForm = Literal["session", "async_session", "read_session", "async_read_session"]
"""An attribute of a unit of work that is one of its sessions."""

Callback = Callable[[], object] | Callable[[], Awaitable[object]]

CALLBACK_WITHIN = 60.0
"""Seconds that an asyncio callback may still run after the request was cancelled."""


class UnitOfWork:
    """What one request, or one block, does with one database.

    Nothing is opened before a session is first used. :meth:`commit` or :meth:`rollback` ends it;
    its sessions refuse every use after that. Both run in the bridge.

    Args:
        database: where the sessions come from.
        isolation_level: of its transaction, if not the engine's.
        plain: whether the code it was opened for is plain-``Session`` code.
    """

    __slots__ = (
        "_async_read_session",
        "_async_session",
        "_callbacks",
        "_cut",
        "_read",
        "_read_session",
        "_session",
        "_write",
        "before_use",
        "commits",
        "database",
        "ending",
        "finished",
        "isolation_level",
        "plain",
        "ready",
        "task",
    )

    def __init__(
        self, database: Database, isolation_level: str | None = None, plain: bool = False
    ) -> None:
        self.database = database
        self.isolation_level = isolation_level
        self.plain = plain
        self.before_use: Callable[[], object] | None = None
        """Called before one of its sessions is first used."""
        self.task: asyncio.Task[Any] | None = None
        """The task of the block that it was opened for."""
        self.finished = False
        self.ending = False
        """Whether the COMMIT that ends it is under way: what waits for it comes after the end."""
        self.commits = 0
        # What was handed out, and what of it was used.
        self._session: Session | None = None
        self._async_session: AsyncSession | None = None
        self._read_session: Session | None = None
        self._async_read_session: AsyncSession | None = None
        self._write: SessionUse | None = None
        self._read: SessionUse | None = None
        self._callbacks: list[tuple[Callback, tuple[SessionTransaction, ...]]] = []
        self.ready: list[Callback] = []
        """What waits for the end of a COMMIT that has been."""
        self._cut = False

    @property
    def session(self) -> Session:
        """The plain session."""
        if self._session is None:
            self._session = self.database.factory.shell(self)
        return self._session

    @property
    def async_session(self) -> AsyncSession:
        """The asyncio session over the same transaction."""
        if self._async_session is None:
            self._async_session = self.database.factory.async_shell(self.session)
        return self._async_session

    @property
    def read_session(self) -> ReadSession:
        """The plain session for reading."""
        if self._read_session is None:
            self._read_session = self.database.read_factory.shell(self)
        return cast(ReadSession, self._read_session)

    @property
    def async_read_session(self) -> AsyncReadSession:
        """The asyncio session for reading."""
        if self._async_read_session is None:
            factory = self.database.read_factory
            self._async_read_session = factory.async_shell(self.read_session)
        return cast(AsyncReadSession, self._async_read_session)

    def use(self, session: Session) -> SessionUse:
        """Take note that one of its plain sessions is used from now on."""
        if self.before_use is not None:
            self.before_use()
        use = SessionUse(self, session)
        if self.finished:
            return use
        self.database.live_units.add(self)
        if isinstance(session, ReadSession):
            self._read, form = use, self._async_read_session
        else:
            self._write, form = use, self._async_session
        if form is not None:
            # From now on SQLAlchemy's own look-ups find the asyncio form by the plain one.
            _ = form.sync_session
        return use

    @property
    def in_transaction(self) -> bool:
        """Whether anything would be lost by a rollback."""
        return self._write is not None and self._write.transacting is not None

    def commit(self) -> None:
        """Commit what was done and end the unit of work.

        Raises:
            ConcurrentSessionUse: a task still uses the session; everything was rolled back.
            ReadOnlySession: a read session has changes; everything was rolled back.
            SessionFinished: the transaction was cut off by :meth:`discard`.
            Exception: whatever the database raises; nothing of the transaction remains.
        """
        if self._cut:
            raise SessionFinished(self.database.name)
        try:
            write, read = self._write, self._read
            for use in (write, read):
                if use is not None and use.used_by is not None:
                    raise ConcurrentSessionUse(self.database.name)
            if read is not None:
                if (session := read.transacting) is not None:
                    session.flush()
                # What comes after the COMMIT may wait for a connection, and must hold none.
                read.close()
            if write is not None and (session := write.transacting) is not None:
                self.ending = True
                session.commit()
        except BaseException:
            self.rollback()
            raise
        if self._callbacks:
            self._call_after_commit()
        self._end()
        if self.ready:
            self.run_callbacks()
        if held_back:
            deliver_cancellation()

    def flush(self) -> None:
        """Write what waits to be written, and refuse what a read session has to write.

        Raises:
            Exception: whatever the database raises.
        """
        for use in (self._write, self._read):
            if use is not None and (session := use.transacting) is not None:
                session.flush()

    def rollback(self) -> None:
        """Roll back what was not committed and end the unit of work."""
        self._callbacks.clear()
        self._end()

    def discard(self) -> None:
        """End the unit of work without a word to the database: its connections are cut."""
        self.finished = True
        self._cut = self.in_transaction
        for use in (self._write, self._read):
            if use is not None:
                use.discard()
        self.database.live_units.discard(self)

    def _end(self) -> None:
        self.finished = True
        self.before_use = None
        write, read = self._write, self._read
        try:
            if write is not None:
                write.close()
        finally:
            try:
                if read is not None and not read.finished:
                    read.close()
            finally:
                # Nothing may keep the other alive until the garbage collector comes by.
                self._session = self._async_session = None
                self._read_session = self._async_read_session = None
                if write is not None or read is not None:
                    self._write = self._read = None
                    self.database.live_units.discard(self)

    def on_commit(self, callback: Callback) -> None:
        """Call something after the next successful COMMIT, and never after a rollback.

        What is registered inside a savepoint is forgotten if the savepoint is rolled back. Without
        a transaction, the good end of the unit of work counts as one.

        Raises:
            SessionFinished: the request or block is over.
        """
        if self.finished:
            raise SessionFinished(self.database.name)
        savepoints = []
        transaction = self.session.get_nested_transaction()
        while transaction is not None and transaction.nested:
            savepoints.append(transaction)
            transaction = transaction.parent
        self._callbacks.append((callback, tuple(savepoints)))

    def committed(self) -> None:
        """Called after the COMMIT, while the transaction is still being put away."""
        self.commits += 1
        if self._callbacks:
            self._call_after_commit()

    def _call_after_commit(self) -> None:
        self.ready += [callback for callback, _ in self._callbacks]
        self._callbacks.clear()

    def rolled_back(self, transaction: SessionTransaction) -> None:
        """Called after a ROLLBACK to a savepoint, of a flush, or of everything."""
        # A flush that fails takes back the savepoint around it.
        while not transaction.nested and transaction.parent is not None:
            transaction = transaction.parent
        self._callbacks = [
            (callback, savepoints)
            for callback, savepoints in self._callbacks
            if transaction not in savepoints
        ]

    def transaction_ended(self) -> None:
        """Called when the connection is back in the pool, committed or not."""
        self._callbacks.clear()

    def run_callbacks(self) -> None:
        """Call what waited for the COMMIT that has been; runs in the bridge."""
        while self.ready:
            _call(self.ready.pop(0))


def _call(callback: Callback) -> None:
    # The transaction is durable: an error here must not look like a failure of it.
    try:
        result = callback()
        if inspect.isawaitable(result):
            await_only(uninterrupted(result, within=CALLBACK_WITHIN))
    except (Exception, asyncio.CancelledError) as error:
        task = asyncio.current_task()
        if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
            raise
        logger.exception("on_commit: %r failed; the transaction is committed", callback)


_current: ContextVar[Mapping[str, UnitOfWork]] = ContextVar("sanic_db_bp_units")


def enter_block(name: str, unit: UnitOfWork) -> Token[Mapping[str, UnitOfWork]]:
    """Make a unit of work the current one of its database, until :func:`leave_block`."""
    around = {key: value for key, value in _current.get({}).items() if key != name}
    return _current.set({**around, name: unit})


def leave_block(token: Token[Mapping[str, UnitOfWork]]) -> None:
    """Make the unit of work around the block the current one again."""
    # Not a reset: an asynchronous generator may be closed in another context.
    _current.set({} if token.old_value is Token.MISSING else token.old_value)


def block_units() -> list[UnitOfWork]:
    """Return the units of work of the blocks around the caller, the innermost first."""
    return list(_current.get({}).values())[::-1]
