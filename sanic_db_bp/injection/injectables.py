"""What the handlers of an app may ask this package for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from sanic import Request, Sanic
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..database import Database
from ..exceptions import ConfigurationError
from ..handling.plan import Provider
from ..handling.request import scope_of
from ..registry import databases_of, default_database
from ..sessions import AsyncReadSession, ReadSession
from ..unit_of_work import SessionForm
from .annotations import without_none
from .dependencies import registered_by

ANONYMOUS = {Session, AsyncSession, ReadSession, AsyncReadSession}
"""The classes that do not tell which database is meant: they stand for the default one."""


class Injectables:
    """What the handlers of an app may ask this package for.

    Args:
        app: the app, with its databases registered.
    """

    def __init__(self, app: Sanic[Any, Any]) -> None:
        self.app = app
        # What the app has told sanic-ext by itself holds, for handlers as for dependencies.
        self._theirs = registered_by(app)
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
            return lambda request: getattr(request.unit(database), form)
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
