"""Makes the sessions of a unit of work, in their plain and their asyncio form."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..bridge import in_greenlet
from .guards import guarded_class
from .reading import ReadSession

if TYPE_CHECKING:
    from ..unit_of_work import UnitOfWork

S = TypeVar("S", bound=Session | AsyncSession)

BUFFERED = {"prebuffer_rows": True}
"""As SQLAlchemy's asyncio sessions read: a result has no rows to wait for."""


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
        engine: what the sessions are bound to.
        session_class: the plain class, such as a subclass of ``Session`` for one database.
        async_session_class: the asyncio class.
        expire_on_commit: whether objects are read anew when used after a commit.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        session_class: type[Session],
        async_session_class: type[AsyncSession],
        *,
        expire_on_commit: bool,
    ) -> None:
        self._engine = engine
        self.session_class = guarded_class(session_class)
        self._shell_class = _shell_class(self.session_class, self._make)
        self._async_session_class = _direct_class(async_session_class)
        self._async_shell_class = _shell_class(self._async_session_class, self._make_async)
        self._expire_on_commit = expire_on_commit

    def shell(self, unit: UnitOfWork) -> Session:
        """Return a new session of a unit of work, which is made at its first use."""
        shell = self._shell_class.__new__(self._shell_class)
        shell.__dict__["_unit"] = unit
        return shell

    def _make(self, shell: Session) -> None:
        unit: UnitOfWork = shell.__dict__.pop("_unit")
        shell.__dict__["unit_of_work_use"] = unit.use(shell)
        bind = self._engine.sync_engine
        if unit.isolation_level is not None and not issubclass(self.session_class, ReadSession):
            bind = bind.execution_options(isolation_level=unit.isolation_level)
        self.session_class.__init__(shell, bind, expire_on_commit=self._expire_on_commit)

    def async_shell(self, session: Session) -> AsyncSession:
        """Return the asyncio form of a session, which is made at its first use too."""
        shell = self._async_shell_class.__new__(self._async_shell_class)
        shell.__dict__["_form_of"] = session
        return shell

    def _make_async(self, shell: AsyncSession) -> None:
        session = shell.__dict__.pop("_form_of")
        as_class = cast(type[Session], lambda **_: session)
        self._async_session_class.__init__(shell, self._engine, sync_session_class=as_class)


def _shell_class(made: type[S], make: Callable[[S], None]) -> type[S]:
    """Return the class of sessions that cost nothing until they are used."""

    def become(self: Any) -> None:
        object.__setattr__(self, "__class__", made)
        make(self)

    def make_and_get(self: Any, name: str) -> Any:
        become(self)
        return getattr(self, name)

    def make_and_set(self: Any, name: str, value: object) -> None:
        become(self)
        setattr(self, name, value)

    methods = {
        "__module__": made.__module__,
        "__getattr__": make_and_get,
        "__setattr__": make_and_set,
    }
    return cast(type[S], type(made.__name__, (made,), methods))


def _direct_class(async_session_class: type[AsyncSession]) -> type[AsyncSession]:
    """Return the class of asyncio sessions that need no greenlet of their own in the bridge."""
    bases: tuple[type, ...] = (DirectAsyncSession,)
    if async_session_class is not AsyncSession:
        # What the class itself overrides comes first.
        bases = (async_session_class, DirectAsyncSession)
    methods = {"__module__": async_session_class.__module__}
    return cast(type[AsyncSession], type(async_session_class.__name__, bases, methods))
