"""Which handler wants what, by its annotations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from inspect import isclass
from typing import Any, cast, get_args, get_origin

from sanic import Request
from sanic_ext.extensions.injection.constructor import Constructor, gather_args
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ..database import Database
from ..handling.plan import AS_SET, Plan, Transaction
from .annotations import UNIONS, hints_of, without_none
from .dependencies import original_of
from .injectables import Injectables


class Planner:
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
                self._check(annotation, parameter, f"handler '{name}'")
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

    def check_dependencies(self) -> None:
        """Refuse a dependency that asks for a session which no database has.

        Raises:
            ConfigurationError: there is one; sanic-ext would not say what is missing.
        """
        for constructor in self.registry.values():
            function = original_of(constructor)
            name = getattr(function, "__name__", function)
            for parameter, annotation in hints_of(function).items():
                self._check(annotation, parameter, f"dependency '{name}'")

    def _check(self, annotation: Any, parameter: str, place: str) -> None:
        members = get_args(annotation) if get_origin(annotation) in UNIONS else (annotation,)
        wanted = [member for member in members if member is not type(None)]
        known = len(wanted) == 1 and wanted[0] in self.registry
        if not known and any(_is_session_or_database(member) for member in wanted):
            told = wanted[0] if len(wanted) == 1 else annotation
            raise self.injectables.unknown(told, parameter, place)

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
                constructor = original_of(self.registry[current])
                if isclass(constructor):
                    left += [without_none(each) for each in hints_of(constructor).values()]
        return None


def _is_session_or_database(wanted: Any) -> bool:
    return isclass(wanted) and issubclass(wanted, (Session, AsyncSession, Database))


def _transaction_of(*handlers: Any) -> Transaction:
    """Return what the first of some callables, or what it wraps, was marked with."""
    for handler in handlers:
        while handler is not None:
            if hasattr(handler, "__transaction__"):
                transaction: Transaction = handler.__transaction__
                return transaction
            handler = getattr(handler, "func", None) or getattr(handler, "__wrapped__", None)
    return AS_SET
