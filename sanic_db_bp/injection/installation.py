"""Prepares an app: its dependencies, its requests, and every route that it has or gets later."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, cast

from sanic import Sanic
from sanic_ext.extensions.injection.constructor import Constructor
from sanic_ext.extensions.openapi.builders import OperationStore
from sanic_routing import Route

from ..exceptions import ConfigurationError
from ..handling.handlers import wrap, wrap_websocket
from ..handling.plan import NO_PLAN, PLANS, Plan
from ..handling.request import handle_errors_after_rollback, scoped_class
from .annotations import hints_of, without_none
from .dependencies import bridge, register, registry_of
from .injectables import Injectables
from .planner import Planner

_OPERATIONS: Callable[[], Any] = OperationStore


def install(app: Sanic[Any, Any]) -> None:
    """Prepare an app: register what is injected, wrap every handler, and scope its requests.

    Raises:
        ConfigurationError: a handler asks for what nobody can give.
    """
    injectables = Injectables(app)
    registry = registry_of(app)
    if registry is not None:
        for injected, constructor in injectables.constructors():
            register(app, injected, constructor)
    app.request_class = scoped_class(app)
    handle_errors_after_rollback(app)
    planner = Planner(injectables, registry or {})
    planner.check_dependencies()
    for route in app.router.routes:
        _wrap_any(route, planner)
    _wrap_later_routes(app, planner)


def bridge_dependencies(app: Sanic[Any, Any]) -> None:
    """Let the app's own dependencies use the plain sessions that they ask for."""
    sessions = set(Injectables(app).sessions)
    for constructor in (registry_of(app) or {}).values():
        if _reaches(constructor, sessions):
            bridge(constructor)


def _reaches(constructor: Constructor, sessions: set[type]) -> bool:
    return any(
        wanted in sessions or _reaches(nested, sessions)
        for wanted, nested in constructor.injections.values()
    )


def _wrap_any(route: Route, planner: Planner) -> None:
    (_wrap_websocket if route.extra.websocket else _wrap_route)(route, planner)


def _wrap_later_routes(app: Sanic[Any, Any], planner: Planner) -> None:
    """See to the routes that ``app.amend()`` adds, with which the router is finalized again."""
    router: Any = app.router
    finalize = type(router).finalize

    def finalize_and_wrap(*args: Any, **kwargs: Any) -> None:
        finalize(router, *args, **kwargs)
        for route in router.routes:
            handler = route.handler.args[0] if route.extra.websocket else route.handler
            if not hasattr(handler, PLANS):
                _wrap_any(route, planner)

    router.finalize = finalize_and_wrap


def _wrap_route(route: Route, planner: Planner) -> None:
    handler = _original(route.handler)
    view_class = getattr(handler, "view_class", None)
    plans: dict[str | None, Plan]
    if view_class is None:
        plans = {None: planner.plan(handler, route.name)}
    else:
        plans = {
            method.upper(): planner.plan(member, f"{route.name} ({method.upper()})", handler)
            for method, member in inspect.getmembers(view_class, inspect.isroutine)
            if method.upper() in route.methods or method == "get"
        }
        plans.setdefault("HEAD", plans.get("GET", NO_PLAN))
    wrapped = wrap(handler, plans)
    if view_class is None:
        wrapped.__annotations__ = _rest(handler, plans[None])
    operations: dict[Any, Any] = _OPERATIONS()
    for documented in (handler, getattr(handler, "__func__", None)):
        if documented in operations:
            operations[wrapped] = operations[documented]
    route.handler = wrapped


def _rest(handler: Callable[..., Any], plan: Plan) -> dict[str, Any]:
    """Return the annotations that are left for sanic-ext to satisfy, or to complain of."""
    hints = hints_of(handler) or getattr(handler, "__annotations__", {})
    return {name: hint for name, hint in hints.items() if name not in plan.providers}


def _wrap_websocket(route: Route, planner: Planner) -> None:
    partial = cast("functools.partial[Any]", route.handler)
    inner = _original(partial.args[0])
    plan = planner.plan(inner, route.name)
    for parameter, annotation in hints_of(inner).items():
        if session := planner.kept_session(annotation):
            wanted = without_none(annotation)
            kept = "" if wanted is session else f", and with it for '{session.__name__}'"
            told = f"'{parameter}: {wanted.__name__}'{kept}"
            raise ConfigurationError(
                f"The websocket handler '{route.name}' asks for {told}, "
                "which would hold a transaction for as long as the socket is open. Ask for "
                "'db: Database' and open 'async with db.session() as session' for each message.",
                entry="session-of-a-websocket",
            )
    wrapped = wrap_websocket(inner, plan)
    wrapped.__annotations__ = _rest(inner, plan)
    handler = functools.partial(partial.func, wrapped, *partial.args[1:], **partial.keywords)
    handler.__dict__.update(partial.__dict__)
    route.handler = handler


def _original(handler: Any) -> Callable[..., Any]:
    wrapped = getattr(handler, PLANS, None)
    original: Callable[..., Any] = handler if wrapped is None else wrapped.original
    return original
