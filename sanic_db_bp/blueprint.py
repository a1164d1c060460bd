"""The blueprint: registers a database with an app, opens it at the start, closes it at the end."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from inspect import isawaitable, isclass
from keyword import iskeyword
from typing import Any, Self, cast

from sanic import Blueprint, Request, Sanic
from sanic.config import Config
from sanic.exceptions import ServiceUnavailable
from sanic.response import BaseHTTPResponse
from sqlalchemy import MetaData
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .context import current_origin
from .database import Database
from .exceptions import ConfigurationError, DatabaseUnavailable
from .injection import bridge_dependencies, install
from .registry import DEFAULT_NAME, databases_of, observers_of
from .sessions import AsyncReadSession, ReadSession
from .settings import DatabaseSettings
from .shutdown import end_cancelled_tasks
from .startup import require_head, tell_budget

logger = logging.getLogger("sanic.root.db")

OPEN_PRIORITY = 1000
"""Before the app's own listeners, which may use the database."""

INSTALL_PRIORITY = -999
"""After the app's own listeners, and before sanic-ext reads the signatures at -1000."""

BRIDGE_PRIORITY = -1002
"""After sanic-ext has linked the dependencies at -1001."""

SECRET_SETTINGS = ("url", "read_url", "password", "connect_args", "engine_options")


@dataclass(frozen=True)
class _Options:
    """What was given to a blueprint in code; shared by its copies."""

    settings: DatabaseSettings | None
    values: dict[str, Any]
    classes: dict[str, Any]
    metadata: MetaData | None

    def __deepcopy__(self, memo: object) -> Self:
        return self


class DatabaseBlueprint(Blueprint):
    """One line gives an app a database: ``app.blueprint(DatabaseBlueprint())``.

    The engine is built in ``before_server_start`` of each worker and disposed in
    ``after_server_stop`` ("Blueprints" and "Listeners" in Sanic's guide). The same object may be
    registered on several apps.

    Args:
        name: the name of the database: it is found at ``app.ctx.<name>``, its settings in the
            environment begin with ``SANIC_<NAME>_`` and in ``app.config`` with ``<NAME>_``.
        metadata: the tables, for ``CREATE_TABLES``.
        settings: the settings, in place of the environment.
        session_class: the class that handlers ask for, a subclass of ``sqlalchemy.orm.Session``;
            each database beside the first needs its own classes.
        async_session_class: the same of ``sqlalchemy.ext.asyncio.AsyncSession``.
        read_session_class: the same of :class:`ReadSession`.
        async_read_session_class: the same of :class:`AsyncReadSession`.
        **values: single settings by their name in lower case, which win over all else.

    Raises:
        ConfigurationError: a value is not the name of a setting, or a class is none of sessions.
    """

    __slots__ = ("_options",)

    def __init__(
        self,
        name: str = DEFAULT_NAME,
        *,
        metadata: MetaData | None = None,
        settings: DatabaseSettings | None = None,
        session_class: type[Session] = Session,
        async_session_class: type[AsyncSession] = AsyncSession,
        read_session_class: type[ReadSession] = ReadSession,
        async_read_session_class: type[AsyncReadSession] = AsyncReadSession,
        **values: Any,
    ) -> None:
        super().__init__(name)
        _check_names(values, settings)
        classes = {
            "session_class": session_class,
            "async_session_class": async_session_class,
            "read_session_class": read_session_class,
            "async_read_session_class": async_read_session_class,
        }
        _check_classes(classes)
        self._options = _Options(settings, values, classes, metadata)
        self.listener("before_server_start", priority=OPEN_PRIORITY)(self._open)
        self.listener("before_server_start", priority=INSTALL_PRIORITY)(self._install)
        self.listener("before_server_start", priority=BRIDGE_PRIORITY)(self._bridge_dependencies)
        self.listener("before_server_stop")(self._end_cancelled_tasks)
        self.listener("after_server_stop", priority=OPEN_PRIORITY)(self._close)

    @property
    def metadata(self) -> MetaData | None:
        """The tables, if they were given to the blueprint."""
        return self._options.metadata

    def register(self, app: Sanic[Any, Any], options: dict[str, Any]) -> None:
        """Register the database with an app; called by ``app.blueprint``.

        Raises:
            ConfigurationError: the app has the database already, or its name cannot be used.
        """
        if not self._has_grown(app):
            raise ConfigurationError(
                f"The blueprint '{self.name}' is registered with the app '{app.name}' already. "
                "Register it once; a second database is a blueprint with another name.",
                entry="registered-twice",
            )
        if self.name not in databases_of(app):
            self._add_database(app)
        register: Callable[..., None] = super().register
        register(app, options)

    def _add_database(self, app: Sanic[Any, Any]) -> None:
        if not self.name.isidentifier() or iskeyword(self.name):
            raise ConfigurationError(
                f"'{self.name}' cannot be the name of a database: app.ctx.{self.name} is no "
                "Python. Give it one of letters, digits and underscores.",
                entry="database-name",
            )
        if hasattr(app.ctx, self.name):
            raise ConfigurationError(
                f"app.ctx.{self.name} is something else already, and the database '{self.name}' "
                "belongs there. Give the blueprint another name.",
                entry="name-in-use",
            )
        code_config: dict[str, Any] = {}
        suffix = "" if self.name == DEFAULT_NAME else f"-{self.name}"
        database = Database(
            lambda: self._settings(app, code_config),
            name=self.name,
            default_url=f"sqlite:///{app.name}{suffix}.db",
            origin=current_origin,
            observers=observers_of(app),
            **self._options.classes,
        )
        databases_of(app)[self.name] = database
        setattr(app.ctx, self.name, database)
        _take_config(app.config, self.name, code_config)

    def _has_grown(self, app: Sanic[Any, Any]) -> bool:
        """Whether Sanic registers again because a route or listener was added meanwhile."""
        sizes: dict[str, int] = app.ctx.__dict__.setdefault("_sanic_db_bp_sizes", {})
        before = sizes.get(self.name)
        sizes[self.name] = sum(
            len(futures)
            for futures in (
                self._future_routes,
                self._future_statics,
                self._future_middleware,
                self._future_exceptions,
                self._future_listeners,
                self._future_signals,
            )
        )
        return before != sizes[self.name]

    def _settings(self, app: Sanic[Any, Any], code_config: dict[str, Any]) -> DatabaseSettings:
        if self._options.settings is not None:
            return self._options.settings
        _take_config(app.config, self.name, code_config)
        values = {**code_config, **self._options.values}
        return DatabaseSettings.load(f"SANIC_{self.name.upper()}_", **values)

    def _database(self, app: Sanic[Any, Any]) -> Database:
        return databases_of(app)[self.name]

    async def _open(self, app: Sanic[Any, Any]) -> None:
        database = self._database(app)
        database.workers = _workers(app)
        logger.info("database %s: %s", self.name, database.url)
        _answer_unavailable(app)
        try:
            await database.wait_until_up()
            await require_head(database)
            if database.settings.create_tables and self._options.metadata is not None:
                await database.create_missing_tables(self._options.metadata)
            if self._is_last(app) and _in_first_worker():
                await tell_budget(databases_of(app).values())
        except BaseException:
            await database.dispose(within=0)
            raise

    async def _install(self, app: Sanic[Any, Any]) -> None:
        install(app)

    async def _bridge_dependencies(self, app: Sanic[Any, Any]) -> None:
        bridge_dependencies(app)

    async def _end_cancelled_tasks(self, app: Sanic[Any, Any]) -> None:
        if self._is_last(app):
            await end_cancelled_tasks(app, databases_of(app).values())

    def _is_last(self, app: Sanic[Any, Any]) -> bool:
        return next(reversed(databases_of(app))) == self.name

    async def _close(self, app: Sanic[Any, Any]) -> None:
        await self._database(app).dispose()


def _workers(app: Sanic[Any, Any]) -> int:
    """How many processes serve the app."""
    if not hasattr(app, "multiplexer"):
        return max(1, app.state.workers)
    # A worker that was spawned does not know app.state.workers.
    return sum(worker.get("server", False) for worker in app.m.workers.values())


def _in_first_worker() -> bool:
    return "-Server-0-" in os.environ.get("SANIC_WORKER_NAME", "-Server-0-")


def _check_names(values: dict[str, Any], settings: DatabaseSettings | None) -> None:
    unknown = sorted(values.keys() - DatabaseSettings.model_fields.keys())
    if unknown:
        raise ConfigurationError(
            f"{', '.join(unknown)}: no such setting. There are: "
            f"{', '.join(DatabaseSettings.model_fields)}.",
            entry="no-such-setting",
        )
    if values and settings is not None:
        raise ConfigurationError(
            "Give the blueprint either settings=DatabaseSettings(...) or single values, not both.",
            entry="settings-given-twice",
        )


def _check_classes(classes: dict[str, Any]) -> None:
    bases: dict[str, type] = {
        "session_class": Session,
        "async_session_class": AsyncSession,
        "read_session_class": ReadSession,
        "async_read_session_class": AsyncReadSession,
    }
    for argument, base in bases.items():
        given = classes[argument]
        if not (isclass(given) and issubclass(given, base)):
            raise ConfigurationError(
                f"{argument} is to be a subclass of {base.__module__.partition('.')[0]}'s "
                f"{base.__name__}, and {getattr(given, '__name__', type(given).__name__)} is none.",
                entry="not-a-session-class",
            )


def _take_config(config: Config, name: str, taken: dict[str, Any]) -> None:
    """Take the settings that code has put into ``app.config``, and the secrets out of it.

    Sanic puts the environment there too, cast to other types; that is left aside, as the settings
    read the environment themselves.
    """
    from_environment = Config()
    for setting in DatabaseSettings.model_fields:
        key = f"{name}_{setting}".upper()
        if key not in config:
            continue
        if key not in from_environment or config[key] != from_environment[key]:
            taken[setting] = config[key]
        if setting in SECRET_SETTINGS:
            del config[key]


def _answer_unavailable(app: Sanic[Any, Any]) -> None:
    """Answer 503 while the database is away, unless the app has an answer of its own."""
    if (DatabaseUnavailable, None) not in app.error_handler.cached_handlers:
        app.error_handler.add(DatabaseUnavailable, _unavailable)


async def _unavailable(request: Request, error: DatabaseUnavailable) -> BaseHTTPResponse:
    logger.error("503 for %s %s: %s", request.method, request.path, error.message)
    answer = ServiceUnavailable(
        "The database is unavailable.", quiet=True, headers={"Retry-After": "1"}
    )
    respond: Callable[..., Any] = request.app.error_handler.response
    response = respond(request, answer)
    return cast(BaseHTTPResponse, await response if isawaitable(response) else response)


db_bp = DatabaseBlueprint()
"""The blueprint of the database named ``db``."""
