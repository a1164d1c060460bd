"""Which unit of work is the current one: of a request, or of a block outside of requests."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast, overload

from sanic import Request, Sanic
from sanic.exceptions import BadRequest
from sanic.http.constants import Stage
from sanic.response import BaseHTTPResponse, ResponseStream
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .bridge import run_in_bridge
from .exceptions import DatabaseUnavailable, NoCurrentSession
from .observers import Observer, Origin
from .unit_of_work import Callback, UnitOfWork, block_units

if TYPE_CHECKING:
    from .database import Database

logger = logging.getLogger("sanic.root.db")

S = TypeVar("S", bound=Session | AsyncSession)

DEFAULT_NAME = "db"

PLANS = "__sanic_db_bp__"
"""The attribute of a wrapped handler that says how it wants its units of work."""


def databases_of(app: Sanic[Any, Any]) -> dict[str, Database]:
    """Return the databases of an app by the names of their blueprints."""
    databases = getattr(app.ctx, "_sanic_db_bp", None)
    if databases is None:
        databases = app.ctx._sanic_db_bp = {}
    return cast("dict[str, Database]", databases)


def observers_of(app: Sanic[Any, Any]) -> list[Observer]:
    """Return who observes the databases of an app, those that are registered later too."""
    observers = getattr(app.ctx, "_sanic_db_bp_observers", None)
    if observers is None:
        observers = app.ctx._sanic_db_bp_observers = []
    return cast("list[Observer]", observers)


def default_database(app: Sanic[Any, Any]) -> Database | None:
    """Return the database named ``db``, or else the first that was registered."""
    databases = databases_of(app)
    return databases.get(DEFAULT_NAME) or next(iter(databases.values()), None)


class Scope:
    """The units of work of one request, and how far the request has come.

    Args:
        request: the request; it is not kept alive.
    """

    __slots__ = (
        "_guards",
        "_request",
        "broken",
        "commit_wanted",
        "failure",
        "handling",
        "isolation_level",
        "plain",
        "task",
        "units",
        "used_by_middleware",
        "websocket",
    )

    def __init__(self, request: Request) -> None:
        self._request = weakref.ref(request)
        self._guards: asyncio.Task[Any] | None = None
        self.units: dict[str, UnitOfWork] = {}
        self.task = getattr(request, "_handler_task", None) or asyncio.current_task()
        self.handling: bool = getattr(request, "_handler_runs", False)
        self.websocket = False
        self.broken = False
        self.failure: BaseException | None = None
        self.used_by_middleware = False
        self.commit_wanted: bool | None = None
        self.isolation_level: str | None = None
        self.plain = False

    def unit(self, database: Database) -> UnitOfWork:
        """Return the request's unit of work on a database.

        Raises:
            NoCurrentSession: in a websocket handler, which has one for each message.
        """
        unit = self.units.get(database.name)
        if unit is not None and not (unit.finished and self.goes_on()):
            return unit
        if self.websocket:
            raise NoCurrentSession(
                "A websocket handler has no session of its own, as it may stay open for days: "
                "ask for 'db: Database' and open 'async with db.session() as session' for each "
                "message."
            )
        unit = database.unit_of_work(isolation_level=self.isolation_level, plain=self.plain)
        self.units[database.name] = unit
        if not self.goes_on():
            unit.finished = True
        elif not self.handling:
            self._guard()
        return unit

    def goes_on(self) -> bool:
        """Whether the answer is still to come, as seen from the current task."""
        if self.handling:
            return True
        request = self._request()
        if request is None or getattr(request, "_answered", False):
            return False
        stream = request.stream
        return (
            stream is not None
            and stream.stage is Stage.HANDLER
            and self.task is asyncio.current_task()
        )

    @property
    def name(self) -> str:
        """The name of the first database that was used, for errors."""
        return next(iter(self.units), DEFAULT_NAME)

    def reached(self) -> None:
        """The handler was reached, and its wrapper sees to the end."""
        self.handling = True
        self.unguard()

    @property
    def open_units(self) -> list[UnitOfWork]:
        """The units of work that are not finished."""
        return [unit for unit in self.units.values() if not unit.finished]

    def finish(self, *, good: bool) -> None:
        """End every unit of work, with a COMMIT if the answer is good; runs in the bridge.

        Raises:
            BadRequest: the client left before it had sent the whole body.
        """
        try:
            if good and getattr(self._request(), "_truncated", False):
                raise BadRequest("The client left before it had sent the whole body.", quiet=True)
            for unit in self.open_units:
                automatic = unit.database.commits_automatically
                if good and (automatic if self.commit_wanted is None else self.commit_wanted):
                    unit.commit()
                else:
                    unit.rollback()
        except BaseException:
            self.rollback()
            raise

    def rollback(self) -> None:
        """End every unit of work with a ROLLBACK; runs in the bridge."""
        for unit in self.open_units:
            unit.rollback()

    def commit_failed(self, request: Request, error: BaseException) -> None:
        """Log that the COMMIT failed, and take note that the answer must not look complete."""
        self.failure = error
        self.broken = is_answered(request)
        told = getattr(error, "quiet", False) or isinstance(error, DatabaseUnavailable)
        if isinstance(error, Exception) and not told:
            cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            logger.error(
                "%s: COMMIT failed: %s: %s", route_of(request), type(error).__name__, cause
            )
            # It has been logged: Sanic need not do it again, with a traceback.
            cast(Any, error).quiet = True

    def _guard(self) -> None:
        """Roll back when the connection's task ends, if nobody else could see to the end."""
        if self._guards is None and self.task is not None:
            self._guards = self.task
            self.task.add_done_callback(self._task_ended)

    def unguard(self) -> None:
        """Take the guard away: somebody else sees to the end."""
        if self._guards is not None:
            self._guards.remove_done_callback(self._task_ended)
            self._guards = None

    def _task_ended(self, _task: object) -> None:
        for unit in self.open_units:
            unit.database.roll_back_later(unit)


class ScopedRequest(Request):
    """A request whose ``ctx.session`` is made when it is first asked for.

    Its units of work are finished before the answer goes out, whoever gives the answer.
    """

    __slots__ = ()

    units_of_work: Scope | None = None

    @property
    def ctx(self) -> Any:
        """The request's context."""
        if not self._ctx:
            self._ctx = _with_sessions(self.make_context(), self)
        return self._ctx

    async def receive_body(self) -> None:
        """See :meth:`sanic.Request.receive_body`."""
        if self.app.asgi:
            notice_disconnects(self)
        receive: Callable[[], Awaitable[None]] = super().receive_body
        await receive()

    async def respond(self, response: Any = None, **options: Any) -> Any:
        """See :meth:`sanic.Request.respond`."""
        scope = self.units_of_work
        if getattr(self, "_handler_runs", False) or (scope is not None and scope.handling):
            return await self._respond_for_handler(response, options)
        if scope is not None:
            # Only an exception handler comes after the handler; its work is kept by its status.
            reached = hasattr(self, "_handler_task")
            await _finish_rest(scope, good=reached and getattr(response, "status", 500) < 400)
        try:
            answer = await super().respond(response, **options)
        except BaseException:
            await _finish_rest(self.units_of_work, good=False)
            raise
        if self.units_of_work is not None:
            await _finish_rest(self.units_of_work, good=getattr(answer, "status", 500) < 400)
        cast(Any, self)._answered = True
        return answer

    async def _respond_for_handler(self, response: Any, options: dict[str, Any]) -> Any:
        answer = await super().respond(response, **options)
        if isinstance(answer, BaseHTTPResponse):
            if isinstance(response, ResponseStream):
                # A response middleware has replaced the stream, which will never run.
                if self.units_of_work is not None:
                    self.units_of_work.handling = False
                await _finish_rest(self.units_of_work, good=False)
            else:
                answer.__class__ = _mixed(FinishingResponse, type(answer))
        return answer


class RequestWithUnits(ScopedRequest):
    """What a request turns into when its scope is made.

    So a request that touches no database need not even say that it has none.
    """

    __slots__ = ()

    @property
    def units_of_work(self) -> Scope:  # type: ignore[override]
        """The units of work of the request."""
        return cast(Scope, self._scope)  # type: ignore[attr-defined]


async def _finish_rest(scope: Scope | None, *, good: bool) -> None:
    if scope is not None:
        if scope.open_units:
            await run_in_bridge(scope.finish, good=good)
        scope.unguard()


def notice_disconnects(request: Request) -> None:
    """Note when an ASGI client leaves, which Sanic takes for the end of the body."""
    transport: Any = request.transport
    receive = transport._receive

    async def receive_and_note() -> Any:
        message = await receive()
        if message["type"] == "http.disconnect":
            cast(Any, request)._truncated = True
        return message

    transport._receive = receive_and_note


class FinishingResponse(BaseHTTPResponse):
    """A streamed response: COMMIT comes before its last chunk, which is not sent if it fails."""

    __slots__ = ()

    async def send(self, data: Any = None, end_stream: bool | None = None) -> None:
        """See :meth:`sanic.response.BaseHTTPResponse.send`."""
        last = bool(end_stream) or (data is None and end_stream is None)
        request = getattr(self.stream, "request", None)
        if isinstance(request, RequestWithUnits) and not is_answered(request):
            # The client of a stream of known length would take it for complete before the COMMIT.
            self.headers.pop("content-length", None)
        if last and isinstance(request, RequestWithUnits):
            if request.units_of_work.open_units:
                await self._commit(request)
            if request.units_of_work.broken:
                _cut_off(request)
                return
        await super().send(data, end_stream)

    async def _commit(self, request: RequestWithUnits) -> None:
        try:
            await run_in_bridge(request.units_of_work.finish, good=self.status < 400)
        except BaseException as error:
            request.units_of_work.commit_failed(request, error)
            raise


def route_of(request: Request) -> str:
    """Return what a line in the log calls a request."""
    return f"{request.method} {request.path} ({request.name})"


def current_request() -> Request | None:
    """Return the request on whose behalf the current code runs."""
    return Request._current.get(None)


def current_origin() -> Origin | None:
    """Return what the log says of the current request."""
    request = current_request()
    return None if request is None else Origin(route_of(request), str(request.id))


def is_answered(request: Request) -> bool:
    """Whether the first byte of the answer was sent."""
    return request.stream is None or request.stream.stage is not Stage.HANDLER


def _cut_off(request: Request) -> None:
    # An ASGI server ends a response that was not completed by itself.
    if not request.app.asgi and request.transport is not None:
        request.transport.close()


REQUEST_SLOTS = ("_answered", "_handler_runs", "_handler_task", "_scope", "_truncated")
"""What a request has more: set when needed, as setting them up would cost every request."""

_mixed_classes: dict[tuple[type, type], Any] = {}


def _mixed(mixin: type, base: type, *slots: str) -> Any:
    """Return the class ``base`` with a mixin before it; an object of ``base`` may turn into one."""
    if issubclass(base, mixin):
        return base
    if (mixin, base) not in _mixed_classes:
        namespace: dict[str, Any] = {"__module__": base.__module__}
        if "__slots__" in vars(mixin):
            namespace["__slots__"] = slots
        _mixed_classes[mixin, base] = type(base.__name__, (mixin, base), namespace)
    return _mixed_classes[mixin, base]


def scoped_class(request_class: type[Request[Any, Any]]) -> type[ScopedRequest]:
    """Return the class of an app's requests whose context has the session."""
    return cast(type[ScopedRequest], _mixed(ScopedRequest, request_class, *REQUEST_SLOTS))


def scope_of(request: Request) -> Scope:
    """Return the units of work of a request.

    Raises:
        NoCurrentSession: the request is not of an app that has a database.
    """
    if not isinstance(request, ScopedRequest):
        raise NoCurrentSession(
            "This request is not one of an app with a database: register the blueprint with "
            "'app.blueprint(db_bp)' before the server starts."
        )
    if request.units_of_work is None:
        scope = request._scope = Scope(request)  # type: ignore[attr-defined]
        request.__class__ = _mixed(RequestWithUnits, type(request))
        wanted = getattr(request.route and request.route.handler, PLANS, None)
        if wanted is not None:
            wanted.plan(request).prepare(scope)
        return scope
    return request.units_of_work


class SessionContext:
    """Gives the context of a request its ``session``, the AsyncSession on the database ``db``.

    The session of a database of another name is ``<name>_session``.
    """

    def __getattr__(self, name: str) -> Any:
        """Return a session, or what the class of the context itself says."""
        session = _context_session(self, name)
        if session is not None:
            return session
        own = getattr(super(), "__getattr__", None)
        if own is None:
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return own(name)


def _with_sessions(context: Any, request: ScopedRequest) -> Any:
    if type(context) is SimpleNamespace:
        context = _mixed(SessionContext, SimpleNamespace)(**context.__dict__)
    elif hasattr(context, "__dict__"):
        context.__class__ = _mixed(SessionContext, type(context))
    else:
        return context
    context.__dict__["_request"] = weakref.ref(request)
    return context


def _context_session(context: Any, name: str) -> AsyncSession | None:
    if name != "session" and not name.endswith("_session"):
        return None
    request = context.__dict__["_request"]()
    database_name = DEFAULT_NAME if name == "session" else name.removesuffix("_session")
    database = databases_of(request.app).get(database_name)
    return None if database is None else _used_beside_handler(request).unit(database).async_session


def _used_beside_handler(request: Request) -> Scope:
    scope = scope_of(request)
    scope.used_by_middleware = scope.used_by_middleware or not scope.handling
    return scope


def current_unit(session_class: type[Session | AsyncSession] | None = None) -> UnitOfWork:
    """Return the unit of work of the innermost block around the caller, or of its request.

    Args:
        session_class: of the database that is meant; by default the innermost, or ``db``.

    Raises:
        NoCurrentSession: there is none.
    """
    for unit in block_units():
        if session_class is None or unit.database.form_of(session_class):
            return unit
    request = current_request()
    if request is not None:
        for database in _candidates(request.app):
            if session_class is None or database.form_of(session_class):
                return _used_beside_handler(request).unit(database)
    wanted = "session" if session_class is None else session_class.__name__
    raise NoCurrentSession(
        f"There is no current {wanted}: the code runs outside of a request and of a block. Open "
        "one: 'async with app.ctx.db.session() as session'."
    )


def _candidates(app: Sanic[Any, Any]) -> list[Database]:
    first = default_database(app)
    return [] if first is None else [first, *databases_of(app).values()]


@overload
def current_session() -> Any: ...
@overload
def current_session(session_class: type[S]) -> S: ...
def current_session(session_class: Any = None) -> Any:
    """Return the session of the current request or block, from anywhere in its code.

    Args:
        session_class: the class of the session, which tells the form and the database:
            ``current_session(Session)``, ``current_session(ReportsAsyncSession)``. Without it, the
            session is in the form that the code around was opened with: a plain ``Session`` in
            ``run_sync`` and in a handler that asks for one, an ``AsyncSession`` everywhere else.

    Returns:
        The session, the same that the handler or the block has.

    Raises:
        NoCurrentSession: the code runs outside of a request and of a block.
        SessionFinished: on use, if the request or block is over.
    """
    unit = current_unit(session_class)
    if session_class is None:
        return unit.session if unit.plain else unit.async_session
    return getattr(unit, unit.database.form_of(session_class) or "session")


def on_commit(callback: Callback) -> None:
    """Call something after the COMMIT of the current unit of work, never after a rollback.

    An error in it is logged and changes nothing: the transaction is durable by then. An asyncio
    callback is awaited before the answer is sent; long work belongs into ``app.add_task``.

    Args:
        callback: a function without arguments, or one that returns an awaitable.

    Raises:
        NoCurrentSession: the code runs outside of a request and of a block.
    """
    current_unit().on_commit(callback)
