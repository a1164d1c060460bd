"""One call of a handler in its units of work: bridged, committed or rolled back, tried again."""

from __future__ import annotations

import functools
import logging
from collections.abc import Awaitable, Callable, Mapping
from inspect import isawaitable, ismethod
from types import CoroutineType
from typing import Any, TypeVar, cast, overload

from sanic import Request
from sanic.response import BaseHTTPResponse, ResponseStream

from ..bridge import bridged, run_in_bridge
from .plan import NO_PLAN, PLANS, Handler, Plan, Transaction, Wrapped
from .request import ScopedRequest, scope_of
from .retries import may_run_again, pause, raise_lost_race
from .scope import Scope

logger = logging.getLogger("sanic.root.db")

F = TypeVar("F", bound=Callable[..., Any])


@overload
def transactional(handler: F, /) -> F: ...
@overload
def transactional(
    *, commit: bool | None = None, isolation: str | None = None, retries: int = 0
) -> Callable[[F], F]: ...
def transactional(
    handler: F | None = None,
    /,
    *,
    commit: bool | None = None,
    isolation: str | None = None,
    retries: int = 0,
) -> F | Callable[[F], F]:
    """Say how a handler's transaction is to be.

    Args:
        handler: the handler, where the decorator stands without parentheses.
        commit: False: what the handler did not commit itself is rolled back. True: it is
            committed, also where the setting ``COMMIT`` is ``manual``. By default as the setting
            says.
        isolation: the isolation level of the transaction, such as ``"SERIALIZABLE"``
            ("Setting Transaction Isolation Levels" in SQLAlchemy's documentation).
        retries: how many times the handler runs again, with a clean session, when its transaction
            fails with a serialization failure or a deadlock. It does not run again once a byte of
            the answer was sent, once the handler has committed by itself, or if a middleware took
            part in the transaction.

    Returns:
        A decorator that marks the handler and leaves it as it is. Among the ``decorators`` of a
        class-based view it is for all methods that have none of their own.
    """
    wanted = Transaction(commit, isolation, retries)

    def mark(handler: F) -> F:
        marked: Any = handler
        if ismethod(handler):
            # It takes no attributes, and its function serves other objects, too.
            marked = functools.update_wrapper(functools.partial(handler), handler)
        marked.__transaction__ = wanted
        return cast(F, marked)

    return mark if handler is None else mark(handler)


def wrap(handler: Handler, plans: Mapping[str | None, Plan]) -> Handler:
    """Return the handler that sees to the units of work of each call."""
    wrapped = Wrapped(handler, plans)
    needed = any(plan.needs_bridge for plan in plans.values())
    make = _in_bridge if needed else _watched
    result = functools.update_wrapper(make(wrapped), handler)
    setattr(result, PLANS, wrapped)
    return result


def _watched(wrapped: Wrapped) -> Handler:
    """For a handler that asks for no session, but may find one on the request."""
    handler = wrapped.original

    async def call(request: Any, *args: Any, **kwargs: Any) -> Any:
        request._handling = True
        if request.units_of_work is not None:
            request.units_of_work.reached(NO_PLAN)
        try:
            response = handler(request, *args, **kwargs)
            # Most are coroutines, and isawaitable() is slow to find that out.
            if type(response) is CoroutineType or (
                not isinstance(response, BaseHTTPResponse) and isawaitable(response)
            ):
                response = await response
        except BaseException as error:
            request._handling = False
            if request.units_of_work is None:
                raise
            await run_in_bridge(_failed, request, request.units_of_work, error)
            return None
        if isinstance(response, ResponseStream):
            _keep_open(request, response)
            return response
        request._handling = False
        if request.units_of_work is not None:
            await run_in_bridge(_finished, request, request.units_of_work, response)
        return response

    return call


def _in_bridge(wrapped: Wrapped) -> Handler:
    """For a handler that asks for a session, or for something that has one."""

    def call(request: Any, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        plan = wrapped.plan(request)
        request._handling = True
        if request.units_of_work is None:
            request.offer()
        else:
            request.units_of_work.reached(plan)
        return bridged(_run(wrapped.original, plan, request, args, kwargs))

    return call


async def _run(
    handler: Handler,
    plan: Plan,
    request: ScopedRequest,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    for name, provide in plan.providers.items():
        kwargs[name] = provide(request)
    # sanic-ext does not look for the HEAD of a class-based view.
    incomplete = not plan.dependency_names <= kwargs.keys()
    retries = plan.transaction.retries
    while True:
        try:
            if incomplete:
                kwargs.update(await plan.arguments_again(request, kwargs))
            if plan.transaction.retries:
                raise_lost_race(kwargs)
            response = handler(request, *args, **kwargs)
            if type(response) is CoroutineType or (
                not isinstance(response, BaseHTTPResponse) and isawaitable(response)
            ):
                response = await response
        except BaseException as error:
            if (scope := request.units_of_work) is None:
                request.unscoped()
                raise
            if not retries or not may_run_again(request, scope, error):
                _failed(request, scope, error)
                return None
        else:
            if isinstance(response, ResponseStream):
                request.scoped()
            if (scope := request.units_of_work) is None:
                request.unscoped()
                return response
            try:
                return _succeeded(request, scope, response)
            except BaseException as error:
                if not retries or not may_run_again(request, scope, error):
                    _commit_failed(request, scope, error)
                    return response
        retries -= 1
        scope.rollback()
        await pause(request, plan.transaction.retries - retries)
        for unit in scope.units.values():
            unit.database.retried()
        scope.handling = incomplete = True


def _finished(request: ScopedRequest, scope: Scope, response: Any) -> Any:
    """End the units of work after a handler that has returned; runs in the bridge."""
    try:
        return _succeeded(request, scope, response)
    except BaseException as error:
        _commit_failed(request, scope, error)
        return response


def _succeeded(request: ScopedRequest, scope: Scope, response: Any) -> Any:
    """Commit or roll back, as the answer says; returns the answer. Runs in the bridge."""
    if isinstance(response, ResponseStream):
        _keep_open(request, response)
        return response
    try:
        scope.finish(good=_is_good(request, response))
    finally:
        scope.handling = False
    if not request.responded:
        request.unscoped()
    return response


def _is_good(request: Request, response: Any) -> bool:
    if request.responded and request.stream is not None:
        response = request.stream.response
    return isinstance(response, BaseHTTPResponse) and response.status < 400


def _failed(request: ScopedRequest, scope: Scope, error: BaseException) -> None:
    """Roll back after an error of the handler, and raise it again; runs in the bridge.

    Raises:
        DatabaseUnavailable: in place of the driver's error that the connection was lost.
    """
    scope.handling = False
    scope.broken = request.is_answered
    scope.rollback()
    if scope.broken and error is scope.failure:
        return
    raise scope.to_tell(error)


def _commit_failed(request: ScopedRequest, scope: Scope, error: BaseException) -> None:
    """Let the client see that nothing was stored: by the error, or by a body that has no end."""
    scope.commit_failed(request, error)
    if not scope.broken or not isinstance(error, Exception):
        raise error


def _keep_open(request: Any, response: ResponseStream) -> None:
    """Keep the units of work open to the end of a stream that runs after its handler."""
    stream = response.streaming_fn

    async def run(target: Any) -> None:
        try:
            await stream(target)
        except BaseException as error:
            request._handling = False
            if request.units_of_work is None:
                raise
            _failed(request, request.units_of_work, error)
            return
        request._handling = False
        if request.units_of_work is not None:
            _finish_stream(request, request.units_of_work, response)

    async def run_bridged(target: Any) -> None:
        await bridged(run(target))

    response.streaming_fn = run_bridged


def _finish_stream(request: ScopedRequest, scope: Scope, response: ResponseStream) -> None:
    try:
        scope.finish(good=response.status < 400)
    except BaseException as error:
        _commit_failed(request, scope, error)
    finally:
        scope.handling = False


def wrap_websocket(handler: Handler, plan: Plan) -> Handler:
    """Return the websocket handler that begins when what came before it is committed.

    A websocket may stay open for days, and Sanic cancels its handler even on a clean close: it has
    no transaction of its own, but one for each message.
    """

    async def call(request: ScopedRequest, *args: Any, **kwargs: Any) -> Any:
        scope = scope_of(request)
        scope.reached(plan)
        await run_in_bridge(scope.finish, good=True)
        scope.handling = False
        scope.websocket = True
        for name, provide in plan.providers.items():
            kwargs.setdefault(name, provide(request))
        return await handler(request, *args, **kwargs)

    result = functools.update_wrapper(call, handler)
    setattr(result, PLANS, Wrapped(handler, {None: plan}))
    return result
