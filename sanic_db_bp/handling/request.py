"""Requests that have units of work, and responses that finish them before their last byte."""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Awaitable, Callable
from functools import partial
from inspect import isawaitable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar, cast

from sanic import Request, Sanic
from sanic.handlers import ErrorHandler
from sanic.http.constants import Stage
from sanic.response import BaseHTTPResponse, ResponseStream
from sqlalchemy.ext.asyncio import AsyncSession

from ..exceptions import NoCurrentSession
from ..registry import DEFAULT_NAME, databases_of
from ..unit_of_work import UnitOfWork
from .plan import PLANS
from .scope import Scope

if TYPE_CHECKING:
    from ..database import Database


class ScopedRequest(Request):
    """A request whose ``ctx.session`` is made when it is first asked for.

    What it has more is set when it is needed: setting it up would cost every request.
    """

    __slots__ = ()

    more_slots: ClassVar = ("_handling", "_offered", "_scope", "_task")
    with_units: ClassVar[type[RequestWithUnits]]
    offering: ClassVar[type[OfferingRequest]]
    without_units: ClassVar[type[ScopedRequest]]

    units_of_work: Scope | None = None
    truncated: bool = False
    """Whether the client left before it had sent the whole body."""

    @property
    def ctx(self) -> Any:
        """The request's context."""
        if not self._ctx:
            self._ctx = _with_sessions(self.make_context(), self)
        return self._ctx

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that serves the request, as long as it does."""
        protocol: Any = self.protocol
        if hasattr(protocol, "_task"):
            return cast("asyncio.Task[Any] | None", protocol._task)
        # HTTP/3 has one for each request.
        return asyncio.current_task()

    @property
    def was_handled(self) -> bool:
        """Whether the handler was reached, or an error has come instead."""
        return hasattr(self, "_handling")

    @property
    def is_answered(self) -> bool:
        """Whether the first byte of the answer was sent."""
        return self.stream is None or self.stream.stage is not Stage.HANDLER

    @property
    def for_log(self) -> str:
        """What a line in the log calls the request."""
        return f"{self.method} {self.path} ({self.name})"

    def scoped(self) -> Scope:
        """Return the units of work of the request, with which it turns into another class."""
        if self.units_of_work is not None:
            return self.units_of_work
        request: Any = self
        scope: Scope
        request._scope = scope = Scope(self)
        self.__class__ = self.with_units
        wanted = getattr(self.route and self.route.handler, PLANS, None)
        if wanted is not None:
            scope.plan = wanted.plan(self)
        return scope

    def offer(self) -> None:
        """Turn into a request whose handler is given sessions that it may not use."""
        request: Any = self
        request._offered = {}
        request.__class__ = self.offering

    def unit(self, database: Database) -> UnitOfWork:
        """Return the unit of work on a database that the handler is given."""
        return self.scoped().unit(database)

    def unscoped(self) -> None:
        """Turn into what it was, as nothing is left to be finished."""
        request: Any = self
        self.__class__ = self.without_units
        request._handling = False
        del request._scope

    def finish_with_response(self) -> None:
        """Let the response that is there already finish what was begun after it."""
        response = self.stream and self.stream.response
        if isinstance(response, BaseHTTPResponse):
            finishing(response)


class OfferingRequest(ScopedRequest):
    """A request whose handler was given sessions, and has used none of them yet.

    Most of what a unit of work needs is only made at the first use.
    """

    __slots__ = ()

    @property
    def _units(self) -> dict[str, UnitOfWork]:
        units: dict[str, UnitOfWork] = self._offered  # type: ignore[attr-defined]
        return units

    def unit(self, database: Database) -> UnitOfWork:
        """Return the unit of work on a database that the handler is given."""
        unit = self._units.get(database.name)
        if unit is None:
            self._units[database.name] = unit = UnitOfWork(database)
            unit.before_use = self.scoped
        return unit

    def scoped(self) -> Scope:
        """Return the units of work of the request: those that were offered, to begin with."""
        units = self._units
        scope = super().scoped()
        scope.take(units)
        return scope

    def respond(self, response: Any = None, **options: Any) -> Any:
        """See :meth:`sanic.Request.respond`; what is used after it is part of the answer, too."""
        self.scoped()
        return self.respond(response, **options)

    def unscoped(self) -> None:
        """Turn into what it was, as nothing was used; nor will it be."""
        request: Any = self
        for unit in self._units.values():
            unit.rollback()
        request.__class__ = self.without_units
        request._handling = False


class RequestWithUnits(ScopedRequest):
    """What a request turns into when its scope is made.

    Its units of work are finished before the answer goes out, whoever gives the answer.
    """

    __slots__ = ()

    @property
    def units_of_work(self) -> Scope:  # type: ignore[override]
        """The units of work of the request."""
        scope: Scope = self._scope  # type: ignore[attr-defined]
        return scope

    async def respond(self, response: Any = None, **options: Any) -> Any:
        """See :meth:`sanic.Request.respond`."""
        scope = self.units_of_work
        handling = scope.handling
        if not self.was_handled:
            # A middleware answers in place of the handler.
            await scope.finish_rest(good=False)
        answer = await super().respond(response, **options)
        if isinstance(answer, BaseHTTPResponse):
            if handling and isinstance(response, ResponseStream):
                # A response middleware has replaced the stream, which will never run.
                scope.handling = False
                await scope.finish_rest(good=False)
            elif handling or scope.open_units:
                finishing(answer)
        return answer


class ErrorHandlerAfterRollback(ErrorHandler):
    """Ends what was begun before an error in the handler's place, and then handles the error.

    An exception handler has a transaction of its own, whatever came before it.
    """

    def response(self, request: Request, exception: Exception) -> Any:
        """See :meth:`sanic.handlers.ErrorHandler.response`."""
        handle: Callable[..., Any] = super().response
        scope = None
        if isinstance(request, ScopedRequest) and not request.was_handled:
            cast(Any, request)._handling = False
            scope = request.units_of_work
        if scope is None:
            return handle(request, exception)
        return _after_rollback(scope, partial(handle, request, scope.to_tell(exception)))


async def _after_rollback(scope: Scope, handle: Callable[[], Any]) -> Any:
    await scope.finish_rest(good=False)
    response = handle()
    return await response if isawaitable(response) else response


class ASGIRequest(ScopedRequest):
    """A request that notes when its client leaves, which Sanic takes for the end of the body."""

    __slots__ = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        transport: Any = self.transport
        transport._receive = _Receive(transport._receive)
        cast(Any, self)._task = asyncio.current_task()

    @property
    def task(self) -> asyncio.Task[Any] | None:
        """The task that serves the request."""
        return cast("asyncio.Task[Any] | None", cast(Any, self)._task)

    @property
    def truncated(self) -> bool:  # type: ignore[override]
        """Whether the client left before it had sent the whole body."""
        return bool(cast(Any, self.transport)._receive.client_left)


class _Receive:
    __slots__ = ("_receive", "client_left")

    def __init__(self, receive: Callable[[], Awaitable[Any]]) -> None:
        self._receive = receive
        self.client_left = False

    async def __call__(self) -> Any:
        message = await self._receive()
        self.client_left = self.client_left or message["type"] == "http.disconnect"
        return message


class FinishingResponse(BaseHTTPResponse):
    """A response that is sent in parts: COMMIT comes before its last, which is kept if it fails."""

    __slots__ = ()

    async def send(self, data: Any = None, end_stream: bool | None = None) -> None:
        """See :meth:`sanic.response.BaseHTTPResponse.send`."""
        request = getattr(self.stream, "request", None)
        if isinstance(request, RequestWithUnits):
            if bool(end_stream) or (data is None and end_stream is None):
                await self._finish(request)
                if request.units_of_work.broken:
                    # Sanic closes a connection on which an answer was not completed.
                    return
            elif not request.is_answered:
                # A client that knows the length would not wait for the COMMIT.
                self.headers.pop("content-length", None)
        await super().send(data, end_stream)

    async def _finish(self, request: RequestWithUnits) -> None:
        scope = request.units_of_work
        try:
            await scope.finish_rest(good=self.status < 400)
        except BaseException as error:
            scope.commit_failed(request, error)
            raise


def finishing(response: BaseHTTPResponse) -> None:
    """Let a response finish the units of work of its request."""
    response.__class__ = _mixed(FinishingResponse, type(response))


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


def scoped_class(app: Sanic[Any, Any]) -> type[ScopedRequest]:
    """Return the class for an app's requests, made of the one that the app has."""
    mixin = ASGIRequest if app.asgi else ScopedRequest
    scoped = _mixed(mixin, app.request_class or Request, *ScopedRequest.more_slots)
    scoped.with_units, scoped.without_units = _mixed(RequestWithUnits, scoped), scoped
    scoped.offering = _mixed(OfferingRequest, scoped)
    return cast(type[ScopedRequest], scoped)


def handle_errors_after_rollback(app: Sanic[Any, Any]) -> None:
    """Give the app's exception handlers a transaction of their own also without a handler."""
    handler: Any = app.error_handler
    handler.__class__ = _mixed(ErrorHandlerAfterRollback, type(handler))


def scope_of(request: Request) -> Scope:
    """Return the units of work of a request.

    Raises:
        NoCurrentSession: the request is not of an app that has a database.
    """
    if not isinstance(request, ScopedRequest):
        raise NoCurrentSession(
            "This request is not one of an app with a database: register the blueprint with "
            "'app.blueprint(db_bp)' before the server starts.",
            entry="request-without-database",
        )
    return request.scoped()


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
    return None if database is None else used_beside_handler(request).unit(database).async_session


def used_beside_handler(request: Request) -> Scope:
    """Return the units of work of a request for code that is perhaps not its handler."""
    scope = scope_of(request)
    scope.used_by_middleware = scope.used_by_middleware or not scope.handling
    return scope
