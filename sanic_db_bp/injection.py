"""The injected types, and the wrapped handlers; the only module that knows sanic-ext."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from inspect import isclass
from types import UnionType
from typing import Any, Union, cast, get_args, get_origin, get_type_hints

from sanic import Request, Sanic
from sanic_ext.extensions.injection.constructor import Constructor, gather_args
from sanic_ext.extensions.openapi.builders import OperationStore
from sanic_routing import Route
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from .bridge import bridged
from .database import Database
from .exceptions import ConfigurationError
from .handling.handlers import wrap, wrap_websocket
from .handling.plan import AS_SET, NO_PLAN, PLANS, Plan, Provider, Transaction
from .handling.request import handle_errors_after_rollback, scope_of, scoped_class
from .registry import databases_of, default_database
from .sessions import AsyncReadSession, ReadSession
from .unit_of_work import SessionForm

UNIONS = (Union, UnionType)

_OPERATIONS: Callable[[], Any] = OperationStore

ANONYMOUS = {Session, AsyncSession, ReadSession, AsyncReadSession}
"""The classes that do not tell which database is meant: they stand for the default one."""

OURS, BRIDGED = "__sanic_db_bp__", "__sanic_db_bp_bridged__"
"""The marks of constructors that this package has registered, and that it runs in the bridge; the
latter is the original."""


class Injectables:
    """What the handlers of an app may ask this package for.

    Args:
        app: the app, with its databases registered.
    """

    def __init__(self, app: Sanic[Any, Any]) -> None:
        self.app = app
        # What the app has told sanic-ext by itself holds, for handlers as for dependencies.
        self._theirs = {
            injected
            for injected, constructor in (_registry_of(app) or {}).items()
            if not _is_ours(constructor)
        }
        self.sessions: dict[type, tuple[Database, SessionForm]] = {}
        for database in databases_of(app).values():
            for form, session_class in database.classes.items():
                if database is default_database(app) or session_class not in ANONYMOUS:
                    self._add(session_class, database, form)
        objects: dict[type, Callable[[Database], object]] = {
            Database: lambda database: database,
            AsyncEngine: lambda database: database.engine,
        }
        self.objects = {key: make for key, make in objects.items() if key not in self._theirs}

    def _add(self, session_class: type, database: Database, form: SessionForm) -> None:
        if session_class in self._theirs:
            return
        if session_class in self.sessions:
            other = self.sessions[session_class][0].name
            raise ConfigurationError(
                f"The databases '{other}' and '{database.name}' both inject "
                f"{session_class.__name__}: give one of them a subclass, "
                f"DatabaseBlueprint('{database.name}', session_class=..., "
                "async_session_class=...).",
                entry="same-session-class",
            )
        self.sessions[session_class] = database, form

    def provider(self, annotation: Any) -> Provider | None:
        """Return what makes the argument for an annotation, or None if it is none of ours."""
        wanted = without_none(annotation)
        if wanted in self.sessions:
            database, form = self.sessions[wanted]
            return lambda scope: getattr(scope.unit(database), form)
        if wanted in self.objects:
            return lambda _: self.object(wanted)
        return None

    def object(self, object_class: type) -> object:
        """Return the runtime object of the default database."""
        database = default_database(self.app)
        assert database is not None
        return self.objects[object_class](database)

    def databases(self, session_classes: set[type]) -> list[Database]:
        """Return the databases of some session classes; of none, the default one."""
        default = default_database(self.app)
        assert default is not None
        return [self.sessions[each][0] for each in session_classes] or [default]

    def unknown(self, wanted: Any, parameter: str, place: str) -> ConfigurationError:
        """Return the error that no database has such a session."""
        kind = getattr(wanted, "__name__", wanted)
        if not self.sessions:
            return ConfigurationError(
                f"The {place} asks for '{parameter}: {kind}', and the app "
                f"'{self.app.name}' has no database: register it with app.blueprint(db_bp).",
                entry="no-database",
            )
        known = ", ".join(sorted(cls.__name__ for cls in self.sessions))
        return ConfigurationError(
            f"The {place} asks for '{parameter}: {kind}', and no database of the app "
            f"'{self.app.name}' has such a session. There are: {known}. Register the blueprint of "
            "its database, DatabaseBlueprint('<name>', session_class=..., "
            "async_session_class=...).",
            entry="unknown-session",
        )

    def constructors(self) -> Iterator[tuple[type, Callable[..., Any]]]:
        """Yield each type and the constructor with which sanic-ext makes it for dependencies."""
        for session_class in self.sessions:
            yield session_class, self._session_constructor(session_class)
        for object_class in self.objects:
            yield object_class, self._object_constructor(object_class)

    def _session_constructor(self, session_class: type) -> Callable[..., Any]:
        database, form = self.sessions[session_class]

        def construct(request: Request) -> Any:
            return getattr(scope_of(request).unit(database), form)

        return construct

    def _object_constructor(self, object_class: type) -> Callable[..., Any]:
        def construct() -> Any:
            return self.object(object_class)

        return construct


def install(app: Sanic[Any, Any]) -> None:
    """Prepare an app: register what is injected, wrap every handler, and scope its requests.

    Raises:
        ConfigurationError: a handler asks for what nobody can give.
    """
    injectables = Injectables(app)
    registry = _registry_of(app)
    if registry is not None:
        _register(app, injectables, registry)
    app.request_class = scoped_class(app)
    handle_errors_after_rollback(app)
    planner = _Planner(injectables, registry or {})
    for route in app.router.routes:
        _wrap_any(route, planner)
    _wrap_later_routes(app, planner)


def _wrap_any(route: Route, planner: _Planner) -> None:
    (_wrap_websocket if route.extra.websocket else _wrap_route)(route, planner)


def _wrap_later_routes(app: Sanic[Any, Any], planner: _Planner) -> None:
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


def _register(
    app: Sanic[Any, Any], injectables: Injectables, registry: Mapping[type, Constructor]
) -> None:
    """Tell sanic-ext the types, for the app's own dependencies; what the app has said stays."""
    for injected, constructor in injectables.constructors():
        if injected not in registry:
            setattr(constructor, OURS, True)
            app.ext.add_dependency(injected, constructor)


def bridge_dependencies(app: Sanic[Any, Any]) -> None:
    """Let the app's own dependencies use the plain sessions that they ask for."""
    sessions = set(Injectables(app).sessions)
    for constructor in (_registry_of(app) or {}).values():
        if _reaches(constructor, sessions) and not hasattr(constructor.func, BRIDGED):
            constructor.func = _bridged_constructor(constructor.func)


def _reaches(constructor: Constructor, sessions: set[type]) -> bool:
    return any(
        wanted in sessions or _reaches(nested, sessions)
        for wanted, nested in constructor.injections.values()
    )


def _bridged_constructor(function: Callable[..., Any]) -> Callable[..., Any]:
    async def call(arguments: dict[str, Any]) -> Any:
        made = function(**arguments)
        return await made if inspect.isawaitable(made) else made

    async def construct(**arguments: Any) -> Any:
        return await bridged(call(arguments))

    construct.__name__ = getattr(function, "__name__", repr(function))
    construct.__annotations__ = hints_of(function)
    setattr(construct, BRIDGED, function)
    return construct


def _is_ours(constructor: Constructor) -> bool:
    return hasattr(constructor.func, OURS)


def _registry_of(app: Sanic[Any, Any]) -> dict[type, Constructor] | None:
    """Return sanic-ext's dependencies, if the app uses it; there is no public way to list them."""
    registry = getattr(getattr(app, "_ext", None), "_injection_registry", None)
    return None if registry is None else registry._registry


class _Planner:
    """Makes the plans of handlers from their annotations."""

    def __init__(self, injectables: Injectables, registry: Mapping[type, Constructor]) -> None:
        self.injectables = injectables
        self.registry = registry

    def plan(self, handler: Callable[..., Any], name: str, view: Any = None) -> Plan:
        """Return the plan for a handler.

        Args:
            handler: a function, or a method of a class-based view.
            name: what to call it in an error.
            view: the view of the method, which its class may have decorated as a whole.

        Raises:
            ConfigurationError: it asks for what nobody can give.
        """
        hints = hints_of(handler, f"the handler '{name}'")
        providers = {}
        for parameter, annotation in hints.items():
            provider = self.injectables.provider(annotation)
            if provider is not None:
                providers[parameter] = provider
            else:
                self._check(annotation, parameter, name)
        wanted = {without_none(annotation) for annotation in hints.values()}
        own = wanted & self.injectables.sessions.keys()
        all_sessions = own | self._sessions_behind(wanted)
        theirs = {
            parameter: (annotation, self.registry[annotation])
            for parameter, annotation in hints.items()
            if parameter not in providers and annotation in self.registry
        }
        injected = frozenset((*providers, *theirs))
        transaction = _transaction_of(handler, view)
        if transaction.isolation is not None:
            for database in self.injectables.databases(all_sessions):
                database.check_isolation_level(transaction.isolation, f"handler '{name}'")

        async def dependencies(request: Request, kwargs: dict[str, Any]) -> dict[str, Any]:
            path = {name: value for name, value in kwargs.items() if name not in injected}
            gathered: dict[str, Any] = await gather_args(theirs, request, **path)
            return gathered

        return Plan(
            providers=providers,
            uses_sessions=bool(all_sessions),
            plain=self._is_plain(own or all_sessions),
            transaction=transaction,
            dependencies=dependencies if theirs else None,
            dependency_names=frozenset(theirs),
        )

    def _check(self, annotation: Any, parameter: str, name: str) -> None:
        members = get_args(annotation) if get_origin(annotation) in UNIONS else (annotation,)
        wanted = [member for member in members if member is not type(None)]
        known = len(wanted) == 1 and wanted[0] in self.registry
        if not known and any(_is_session_or_database(member) for member in wanted):
            told = wanted[0] if len(wanted) == 1 else annotation
            raise self.injectables.unknown(told, parameter, f"handler '{name}'")

    def _is_plain(self, sessions: set[type]) -> bool:
        return bool(sessions) and not any(issubclass(cls, AsyncSession) for cls in sessions)

    def _sessions_behind(self, wanted: set[Any]) -> set[type]:
        found: set[type] = set()
        seen: set[Any] = set()
        left = list(wanted)
        while left:
            current = left.pop()
            if current in self.injectables.sessions:
                found.add(current)
            elif current in self.registry and current not in seen:
                seen.add(current)
                behind = hints_of(self.registry[current].func)
                left += [without_none(annotation) for annotation in behind.values()]
        return found

    def kept_session(self, annotation: Any) -> type | None:
        """Return the session that an argument is, or keeps.

        A function that makes a dependency may use its session and let it go; a class that takes
        one keeps it.
        """
        left, seen = [without_none(annotation)], set()
        while left:
            current = left.pop()
            if current in self.injectables.sessions:
                return cast(type, current)
            if current in self.registry and current not in seen:
                seen.add(current)
                constructor: Any = self.registry[current].func
                constructor = getattr(constructor, BRIDGED, constructor)
                if isclass(constructor):
                    left += [without_none(each) for each in hints_of(constructor).values()]
        return None


def _is_session_or_database(wanted: Any) -> bool:
    return isclass(wanted) and issubclass(wanted, (Session, AsyncSession, Database))


def _wrap_route(route: Route, planner: _Planner) -> None:
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


def _wrap_websocket(route: Route, planner: _Planner) -> None:
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


def _transaction_of(*handlers: Any) -> Transaction:
    """Return what the first of some callables, or what it wraps, was marked with."""
    for handler in handlers:
        while handler is not None:
            if hasattr(handler, "__transaction__"):
                transaction: Transaction = handler.__transaction__
                return transaction
            handler = getattr(handler, "func", None) or getattr(handler, "__wrapped__", None)
    return AS_SET


def hints_of(function: Any, name: str | None = None) -> dict[str, Any]:
    """Return the types of a callable's parameters, without those that are bound already.

    Args:
        function: a function, method, class, callable object or ``functools.partial`` of one.
        name: what to call it in an error; without it, what cannot be resolved is left out.

    Raises:
        ConfigurationError: an annotation that names a session or a database cannot be resolved.
    """
    left = _unbound(function) if isinstance(function, functools.partial) else None
    while isinstance(function, functools.partial):
        function = function.func
    target = function
    if isclass(function):
        target = function.__init__
    elif not inspect.isroutine(function) and "__annotations__" not in getattr(
        function, "__dict__", {}
    ):
        target = type(function).__call__
    try:
        hints = get_type_hints(target)
    except (NameError, TypeError) as error:
        if name is not None:
            _explain(target, name, error)
        return {}
    hints.pop("return", None)
    return hints if left is None else {name: hints[name] for name in left & hints.keys()}


def _unbound(partial: functools.partial[Any]) -> set[str]:
    parameters = inspect.signature(partial).parameters.values()
    return {each.name for each in parameters if each.name not in partial.keywords}


def _explain(target: Any, name: str, error: Exception) -> None:
    annotations = getattr(target, "__annotations__", {})
    if any("Session" in str(text) or "Database" in str(text) for text in annotations.values()):
        raise ConfigurationError(
            f"The annotations of {name} cannot be resolved: {error}. What is "
            "injected must be imported where the app runs, not under TYPE_CHECKING alone.",
            entry="unresolved-annotations",
        ) from error


def without_none(annotation: Any) -> Any:
    """Return X for ``X | None``, anything else as it is."""
    if get_origin(annotation) in UNIONS:
        rest = [argument for argument in get_args(annotation) if argument is not type(None)]
        if len(rest) == 1:
            return rest[0]
    return annotation
