"""The blueprint: registers the commands of a database's migrations with an app."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, Self

from sanic import Blueprint, Sanic

from ...blueprint import DatabaseBlueprint, db_bp
from ...exceptions import ConfigurationError, SanicDBError
from ...registry import databases_of
from .environment import Options
from .runner import Migrations

P = ParamSpec("P")

COMMANDS = (
    "init",
    "revision",
    "merge",
    "upgrade",
    "downgrade",
    "current",
    "history",
    "check",
    "stamp",
)


@dataclass(frozen=True)
class _Plan:
    """What was given to the blueprint; shared by its copies."""

    database: str
    directory: Path
    lock_timeout: float
    options: Options

    def __deepcopy__(self, memo: object) -> Self:
        return self


class MigrationsBlueprint(Blueprint):
    """Gives an app the commands of Alembic for one of its databases.

    ``sanic <app> exec db-upgrade`` and the like; those of a blueprint ``reports`` begin with its
    name. Register it after the database. It knows for ``REQUIRE_HEAD``, and for the health check,
    which migrations the database lacks.

    Args:
        database: the blueprint of the database.
        directory: the folder of the migrations, by default ``migrations/<name of the database>``.
        lock_timeout: seconds to wait while another server migrates the database.
        **options: arguments of Alembic's ``EnvironmentContext.configure()``, such as
            ``include_schemas``; ``target_metadata`` is by default the blueprint's metadata.
    """

    __slots__ = ("_plan",)

    def __init__(
        self,
        database: DatabaseBlueprint = db_bp,
        directory: str | Path | None = None,
        *,
        lock_timeout: float = 600,
        **options: Any,
    ) -> None:
        super().__init__(f"{database.name}_migrations")
        self._plan = _Plan(
            database.name,
            Path(directory or f"migrations/{database.name}"),
            lock_timeout,
            {"target_metadata": database.metadata, **options},
        )

    def register(self, app: Sanic[Any, Any], options: dict[str, Any]) -> None:
        """Register the commands with an app; called by ``app.blueprint``.

        Raises:
            ConfigurationError: the app does not have the database, or has its migrations already.
        """
        plan = self._plan
        database = databases_of(app).get(plan.database)
        if database is None:
            raise ConfigurationError(
                f"Register the blueprint '{plan.database}' with the app '{app.name}' before its "
                "migrations.",
                entry="migrations-before-their-database",
            )
        if database.find_pending is not None:
            raise ConfigurationError(
                f"The migrations of '{plan.database}' are registered with the app '{app.name}' "
                "already.",
                entry="migrations-registered-twice",
            )
        migrations = Migrations(database, plan.directory, plan.lock_timeout, plan.options)
        database.find_pending = migrations.find_pending
        for name in COMMANDS:
            app.command(_ended_readably(getattr(migrations, name)), name=f"{plan.database}-{name}")
        register: Callable[..., None] = super().register
        register(app, options)


def _ended_readably(function: Callable[P, Awaitable[None]]) -> Callable[P, Awaitable[None]]:
    """A failure is a message and the exit status 1, and no traceback."""

    @wraps(function)
    async def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            await function(*args, **kwargs)
        except SanicDBError as error:
            raise SystemExit(str(error)) from None

    return run
