"""The dependencies of an app, as sanic-ext knows them."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from sanic import Sanic
from sanic_ext.extensions.injection.constructor import Constructor

from ..bridge import bridged
from ..handling.retries import LostRace, lost_race
from .annotations import hints_of

OURS, BRIDGED = "__sanic_db_bp__", "__sanic_db_bp_bridged__"
"""The marks of constructors that this package has registered, and that it runs in the bridge; the
latter is the original."""

REQUEST = "__sanic_db_bp_request__"
"""The argument that the request has for a dependency which does not ask for it."""


def registry_of(app: Sanic[Any, Any]) -> dict[type, Constructor] | None:
    """Return the dependencies, if the app uses sanic-ext; there is no public way to list them."""
    registry = getattr(getattr(app, "_ext", None), "_injection_registry", None)
    return None if registry is None else registry._registry


def registered_by(app: Sanic[Any, Any]) -> set[type]:
    """Return the types that the app has told sanic-ext by itself."""
    registry = registry_of(app) or {}
    return {injected for injected, made in registry.items() if not hasattr(made.func, OURS)}


def register(app: Sanic[Any, Any], injected: type, constructor: Callable[..., Any]) -> None:
    """Tell sanic-ext one of this package's types; what the app has said stays."""
    if injected not in (registry_of(app) or {}):
        setattr(constructor, OURS, True)
        app.ext.add_dependency(injected, constructor)


def bridge(constructor: Constructor) -> None:
    """Let a dependency use the plain sessions that it asks for."""
    if not hasattr(constructor.func, BRIDGED):
        wanted = constructor.request_arg
        constructor.request_arg = wanted or REQUEST
        constructor.func = _bridged(constructor.func, wanted)


def original_of(constructor: Constructor) -> Any:
    """Return the callable with which the app makes a dependency."""
    return getattr(constructor.func, BRIDGED, constructor.func)


def _bridged(function: Callable[..., Any], request_argument: str | None) -> Callable[..., Any]:
    async def call(arguments: dict[str, Any]) -> Any:
        made = function(**arguments)
        return await made if inspect.isawaitable(made) else made

    async def construct(**arguments: Any) -> Any:
        request = arguments[request_argument] if request_argument else arguments.pop(REQUEST)
        for argument in arguments.values():
            if isinstance(argument, LostRace):
                return argument
        try:
            return await bridged(call(arguments))
        except Exception as error:
            if lost := lost_race(request, error):
                return lost
            raise

    construct.__name__ = getattr(function, "__name__", repr(function))
    construct.__annotations__ = hints_of(function)
    setattr(construct, BRIDGED, function)
    return construct
