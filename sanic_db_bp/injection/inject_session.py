"""Sessions for functions that are no handlers: background tasks, commands, helpers."""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Coroutine, Iterable
from contextlib import AsyncExitStack
from typing import Any, ParamSpec, Protocol, TypeVar, cast, overload

from sanic import Request, Sanic
from sanic.exceptions import SanicException
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..bridge import bridged
from ..database import Database
from ..exceptions import ConfigurationError
from ..handling.request import ScopedRequest, scope_of
from ..unit_of_work import UnitOfWork, block_units
from .annotations import hints_of, without_none
from .injectables import Injectables

P = ParamSpec("P")
T = TypeVar("T")


class _Decorator(Protocol):
    @overload
    def __call__(
        self, function: Callable[P, Coroutine[Any, Any, T]], /
    ) -> Callable[..., Coroutine[Any, Any, T]]: ...
    @overload
    def __call__(self, function: Callable[P, T], /) -> Callable[..., Coroutine[Any, Any, T]]: ...


@overload
def inject_session(
    function: Callable[P, Coroutine[Any, Any, T]], /
) -> Callable[..., Coroutine[Any, Any, T]]: ...
@overload
def inject_session(function: Callable[P, T], /) -> Callable[..., Coroutine[Any, Any, T]]: ...
@overload
def inject_session(*, app: Sanic[Any, Any] | None = None) -> _Decorator: ...
def inject_session(
    function: Callable[..., Any] | None = None, /, *, app: Sanic[Any, Any] | None = None
) -> Any:
    """Give a function the sessions that its parameters are annotated with.

    In the task of a request or of a block, the function joins its unit of work. Anywhere else
    each call has its own: committed when the function returns, rolled back if it raises. What the
    caller passes by itself is left as it is.

    Args:
        function: a coroutine function, or a plain function, which runs without blocking the event
            loop.
        app: the app whose databases are meant. By default the app or request among the arguments,
            the current request's, or the only app of the process.

    Returns:
        A coroutine function without those parameters.

    Raises:
        ConfigurationError: on the call, if no database has such a session.
    """
    if function is None:
        return functools.partial(_decorated, app=app)
    return _decorated(function, app=app)


def _decorated(function: Callable[..., Any], app: Sanic[Any, Any] | None) -> Callable[..., Any]:
    signature = inspect.signature(function)

    async def call(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind_partial(*args, **kwargs).arguments
        hints = hints_of(function, f"the function '{function.__qualname__}'")
        wanted = {name: hint for name, hint in hints.items() if name not in given}
        async with AsyncExitStack() as stack:
            kwargs |= await _arguments(wanted, app or _app_among(given.values()), stack)
            return await bridged(_called(function, args, kwargs))

    functools.update_wrapper(call, function)
    # sanic-ext goes by __wrapped__ to the bare command, and Sanic reads options off the signature.
    del call.__wrapped__  # type: ignore[attr-defined]
    hints = hints_of(function)
    left = [each for each in signature.parameters.values() if not _is_ours(hints.get(each.name))]
    call.__annotations__ = hints
    call.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
    return call


async def _called(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    result = function(*args, **kwargs)
    return await result if inspect.isawaitable(result) else result


def _is_ours(hint: Any) -> bool:
    wanted = without_none(hint)
    return inspect.isclass(wanted) and issubclass(
        wanted, (Session, AsyncSession, Database, AsyncEngine)
    )


async def _arguments(
    wanted: dict[str, Any], app: Sanic[Any, Any], stack: AsyncExitStack
) -> dict[str, Any]:
    injectables = Injectables(app)
    arguments = {}
    for name, hint in wanted.items():
        session_class = without_none(hint)
        if session_class in injectables.objects and injectables.sessions:
            arguments[name] = injectables.object(session_class)
        elif session_class in injectables.sessions:
            database, form = injectables.sessions[session_class]
            plain = form in ("session", "read_session")
            unit = await _unit(app, database, stack, plain=plain)
            arguments[name] = getattr(unit, form)
        elif _is_ours(hint):
            raise injectables.unknown(session_class, name, "function")
    return arguments


async def _unit(
    app: Sanic[Any, Any], database: Database, stack: AsyncExitStack, *, plain: bool
) -> UnitOfWork:
    """Join the unit of work of the current task, or open one for the call."""
    task = asyncio.current_task()
    for unit in block_units():
        if unit.database is database and unit.task is task and not unit.finished:
            return unit
    request = Request._current.get(None)
    if isinstance(request, ScopedRequest) and request.app is app:
        scope = scope_of(request)
        if request.task is task and scope.goes_on():
            return scope.unit(database)
    return await stack.enter_async_context(database.block(plain=plain))


def _app_among(arguments: Iterable[Any]) -> Sanic[Any, Any]:
    for argument in (*arguments, Request._current.get(None)):
        if isinstance(argument, Sanic):
            return argument
        if isinstance(argument, Request):
            return cast("Sanic[Any, Any]", argument.app)
    try:
        return Sanic.get_app()
    except SanicException:
        raise ConfigurationError(
            "@inject_session cannot tell which app is meant: pass the app or the request to the "
            "function, or name it: @inject_session(app=app).",
            entry="which-app",
        ) from None
