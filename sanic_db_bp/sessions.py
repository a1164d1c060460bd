"""The sessions that a unit of work hands out: guarded, in a plain and an asyncio form."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, cast

from sqlalchemy import Connection, Engine, event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionOrigin

from .bridge import await_only, deliver_cancellation, in_greenlet, uninterrupted
from .exceptions import (
    ConcurrentSessionUse,
    ReadOnlySession,
    SessionError,
    SessionFinished,
    SessionOutsideBridge,
)

if TYPE_CHECKING:
    from .unit_of_work import UnitOfWork

logger = logging.getLogger("sanic.root.db")

S = TypeVar("S", bound=Session)

WAITS_FOR_DATABASE = (
    "execute",
    "scalar",
    "scalars",
    "connection",
    "flush",
    "commit",
    "rollback",
    "begin_nested",
    "prepare",
    "bulk_save_objects",
    "bulk_insert_mappings",
    "bulk_update_mappings",
)
CHANGES_SESSION = ("add", "add_all", "delete", "delete_all", "merge", "merge_all", "refresh")
ENDS_SESSION = ("close", "reset", "invalidate")

BUFFERED = {"prebuffer_rows": True}
"""As SQLAlchemy's asyncio sessions read: a result has no rows to wait for."""

STILL_IN_USE = 2.0
"""Seconds that the end of a unit of work waits for another task that still uses its session.

After them the task is cancelled, and has as long again to let go.
"""


class ReadSession(Session):
    """A plain session for reading alone.

    Each statement is a transaction of its own on a read-only engine, so that one SELECT costs one
    round trip. The database refuses to write; changed objects are refused at the flush.
    """


class AsyncReadSession(AsyncSession):
    """The asyncio form of :class:`ReadSession`.

    Raises:
        SessionError: on ``stream()``, which needs a transaction; an ``AsyncSession`` has one.
    """

    sync_session_class = ReadSession

    async def stream(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: PostgreSQL has no cursors outside of a transaction."""
        raise SessionError(
            "A read session cannot stream rows. Ask for an AsyncSession to stream.",
            entry="read-session-streams",
        )

    stream_scalars = stream


@event.listens_for(ReadSession, "before_flush")
def _refuse_to_write(session: Session, _context: object, _instances: object) -> None:
    use: SessionUse | None = session.__dict__.get("unit_of_work_use")
    raise ReadOnlySession("db" if use is None else use.database)


class SessionUse:
    """One session of a unit of work: its two forms, and which task uses it just now."""

    __slots__ = (
        "_async_session",
        "_connections",
        "_factory",
        "_freed",
        "_isolation_level",
        "_session",
        "finished",
        "made",
        "unit",
        "used_by",
    )

    def __init__(
        self, unit: UnitOfWork, factory: SessionFactory, isolation_level: str | None = None
    ) -> None:
        self.unit = unit
        self.used_by: asyncio.Task[Any] | None = None
        self.finished = unit.finished
        self.made = False
        self._factory = factory
        self._isolation_level = isolation_level
        self._session: Session | None = None
        self._async_session: AsyncSession | None = None
        self._connections: list[Connection] = []
        self._freed: asyncio.Future[None] | None = None

    @property
    def database(self) -> str:
        """The name of the database."""
        return self._factory.database

    @property
    def session(self) -> Session:
        """The plain form: an empty shell until it is first used."""
        if self._session is None:
            self._session = self._factory.shell(self)
        return self._session

    def make(self, shell: Session) -> None:
        """Turn the shell into a session."""
        self.made = True
        self.unit.began()
        self._factory.make(shell, self._isolation_level)

    @property
    def async_session(self) -> AsyncSession:
        """The asyncio form of the same session."""
        if self._async_session is None:
            self._async_session = self._factory.make_async(self.session)
        return self._async_session

    @property
    def begun(self) -> bool:
        """Whether a transaction is under way."""
        return self.made and self._session is not None and self._session.in_transaction()

    def enter(self) -> None:
        """Reserve the session for the current task.

        Raises:
            SessionFinished, ConcurrentSessionUse, SessionOutsideBridge: it may not use it.
        """
        if self.finished:
            raise SessionFinished(self.database)
        task = _current_task()
        if task is None:
            raise SessionOutsideBridge(self.database, "in a thread")
        if self.used_by is not None:
            raise ConcurrentSessionUse(self.database)
        if not in_greenlet():
            raise SessionOutsideBridge(self.database, "in a task or function of its own")
        self.used_by = task

    def leave(self) -> None:
        """Let other tasks use the session again."""
        self.used_by = None
        if self._freed is not None and not self._freed.done():
            self._freed.set_result(None)

    def connected(self, connection: Connection) -> None:
        """Take note of a connection, so that it can be discarded if all else fails."""
        self._connections = [each for each in self._connections if not each.closed]
        self._connections.append(connection)

    def close(self) -> None:
        """Roll back what was not committed and give the connection back; runs in the bridge."""
        try:
            if self.made and not self.finished:
                self._close(self.session)
        finally:
            # Nothing may keep the other alive until the garbage collector comes by.
            self.finished = True
            self._session = self._async_session = None
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


def _directly(method: Callable[..., Any]) -> Any:
    @wraps(method)
    async def call(self: AsyncSession, *args: Any, **kwargs: Any) -> Any:
        if in_greenlet():
            return getattr(self.sync_session, method.__name__)(*args, **kwargs)
        return await method(self, *args, **kwargs)

    return call


class DirectAsyncSession(AsyncSession):
    """An AsyncSession that calls its plain session without a greenlet of its own.

    In the bridge the code runs in one already; elsewhere it is SQLAlchemy's own.
    """

    async def execute(self, statement: Any, params: Any = None, **options: Any) -> Any:
        """See ``AsyncSession.execute``."""
        if options or not in_greenlet():
            return await super().execute(statement, params, **options)
        return self.sync_session.execute(statement, params, execution_options=BUFFERED)

    scalar = _directly(AsyncSession.scalar)
    get = _directly(AsyncSession.get)
    get_one = _directly(AsyncSession.get_one)
    refresh = _directly(AsyncSession.refresh)
    merge = _directly(AsyncSession.merge)
    delete = _directly(AsyncSession.delete)
    flush = _directly(AsyncSession.flush)
    commit = _directly(AsyncSession.commit)
    rollback = _directly(AsyncSession.rollback)
    close = _directly(AsyncSession.close)


class SessionFactory:
    """Makes the sessions of one engine.

    Args:
        database: the database's name, for errors.
        engine: what the sessions are bound to.
        session_class: the plain class, such as a subclass of ``Session`` for one database.
        async_session_class: the asyncio class.
        expire_on_commit: whether objects are read anew when used after a commit.
    """

    def __init__(
        self,
        database: str,
        engine: AsyncEngine,
        session_class: type[Session],
        async_session_class: type[AsyncSession],
        *,
        expire_on_commit: bool,
    ) -> None:
        self.database = database
        self._engine = engine
        self.session_class = _guarded_class(session_class)
        self._shell_class = _shell_class(self.session_class)
        self._async_session_class = _direct_class(async_session_class)
        self._expire_on_commit = expire_on_commit

    def shell(self, use: SessionUse) -> Session:
        """Return a new session that reports to the given use, and is made at its first use."""
        session = self._shell_class.__new__(self._shell_class)
        session.__dict__["unit_of_work_use"] = use
        return session

    def make(self, shell: Session, isolation_level: str | None) -> None:
        """Make the session that a shell stands for."""
        shell.__class__ = self.session_class
        self.session_class.__init__(
            shell, self._bind(isolation_level), expire_on_commit=self._expire_on_commit
        )

    def make_async(self, session: Session) -> AsyncSession:
        """Return the asyncio form of a session."""
        as_class = cast(type[Session], lambda **_: session)
        return self._async_session_class(self._engine, sync_session_class=as_class)

    def _bind(self, isolation_level: str | None) -> Engine:
        engine = self._engine.sync_engine
        if isolation_level is None:
            return engine
        return engine.execution_options(isolation_level=isolation_level)


def use_of(session: Session) -> SessionUse:
    """Return which use of which unit of work a session belongs to."""
    return cast(SessionUse, session.__dict__["unit_of_work_use"])


def _guarded_class(session_class: type[S]) -> type[S]:
    namespace = {"__module__": session_class.__module__, **_guarded_methods(session_class)}
    bases: tuple[type, ...] = (session_class,)
    base: type[Session] = ReadSession if issubclass(session_class, ReadSession) else Session
    if session_class is not base:
        # What a subclass adds may call super().execute(), which passes by its own guards.
        bases = (session_class, type("Session", (base,), _guarded_methods(base)))
    guarded = cast(type[S], type(session_class.__name__, bases, namespace))
    event.listen(guarded, "after_begin", _after_begin)
    if not issubclass(session_class, ReadSession):
        # The end of a read session says nothing about what is to be committed.
        event.listen(guarded, "after_commit", _after_commit)
        event.listen(guarded, "after_soft_rollback", _after_soft_rollback)
        event.listen(guarded, "after_transaction_end", _after_transaction_end)
    return guarded


def _guarded_methods(session_class: type[Session]) -> dict[str, Any]:
    methods: dict[str, Any] = {"begin": _joining(session_class.begin)}
    methods |= {name: _alone(getattr(session_class, name)) for name in WAITS_FOR_DATABASE}
    methods |= {name: _alone(getattr(session_class, name)) for name in ENDS_SESSION}
    if not issubclass(session_class, ReadSession):
        for name in ("rollback", *ENDS_SESSION):
            methods[name] = _forgetting_callbacks(methods[name])
    methods |= {name: _unless_finished(methods[name]) for name in ENDS_SESSION}
    methods |= {name: _alive(getattr(session_class, name)) for name in CHANGES_SESSION}
    return methods


def _shell_class(guarded: type[S]) -> type[S]:
    """Return the class of sessions that cost nothing until they are used."""

    def make_first(self: Any, name: str) -> Any:
        use_of(self).make(self)
        return getattr(self, name)

    methods = {"__module__": guarded.__module__, "__getattr__": make_first}
    return cast(type[S], type(guarded.__name__, (guarded,), methods))


def _direct_class(async_session_class: type[AsyncSession]) -> type[AsyncSession]:
    """Return the class of asyncio sessions that need no greenlet of their own in the bridge."""
    bases: tuple[type, ...] = (DirectAsyncSession,)
    if async_session_class is not AsyncSession:
        # What the class itself overrides comes first.
        bases = (async_session_class, DirectAsyncSession)
    methods = {"__module__": async_session_class.__module__}
    return cast(type[AsyncSession], type(async_session_class.__name__, bases, methods))


def _alone(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        use = self.__dict__["unit_of_work_use"]
        if use.used_by is not None and use.used_by is _current_task():
            return method(self, *args, **kwargs)
        use.enter()
        try:
            result = method(self, *args, **kwargs)
        finally:
            use.leave()
        use.unit.run_callbacks()
        deliver_cancellation()
        return result

    return guarded


def _alive(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if use_of(self).finished:
            raise SessionFinished(use_of(self).database)
        return method(self, *args, **kwargs)

    return guarded


def _forgetting_callbacks(method: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(method)
    def guarded(self: Any) -> None:
        method(self)
        # Without a transaction SQLAlchemy has nothing to roll back, and tells nobody.
        use_of(self).unit.transaction_ended()

    return guarded


def _unless_finished(method: Callable[[Any], None]) -> Callable[[Any], None]:
    @wraps(method)
    def guarded(self: Any) -> None:
        if not use_of(self).finished:
            method(self)

    return guarded


class BlockTransaction(SessionTransaction):
    """What ``session.begin()`` returns: its end uses the session as alone as any other method."""

    def __exit__(self, *exception: Any) -> None:
        """Commit, or roll back if the block has raised."""
        use = use_of(self.session)
        use.enter()
        try:
            super().__exit__(*exception)
        finally:
            use.leave()
        use.unit.run_callbacks()
        deliver_cancellation()


def _joining(begin: Callable[[Any, bool], SessionTransaction]) -> Callable[..., SessionTransaction]:
    @wraps(begin)
    def guarded(self: Any, nested: bool = False) -> SessionTransaction:
        use = use_of(self)
        if use.finished:
            raise SessionFinished(use.database)
        # A middleware or dependency may have used the session before: one unit of work, one
        # transaction.
        current: SessionTransaction | None = self.get_transaction()
        if nested or current is None or current.origin is not SessionTransactionOrigin.AUTOBEGIN:
            current = begin(self, nested)
        if not nested:
            current.__class__ = BlockTransaction
        return current

    return guarded


def _after_begin(session: Session, _transaction: object, connection: Connection) -> None:
    use_of(session).connected(connection)


def _after_commit(session: Session) -> None:
    if not session.in_nested_transaction():
        use_of(session).unit.committed()


def _after_soft_rollback(session: Session, transaction: SessionTransaction) -> None:
    use_of(session).unit.rolled_back(transaction)


def _after_transaction_end(session: Session, transaction: SessionTransaction) -> None:
    use = use_of(session)
    if transaction.parent is None:
        use.unit.transaction_ended()
        if use.used_by is None:
            # Committed by the transaction's own method, not by the session's.
            use.unit.run_callbacks()


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
