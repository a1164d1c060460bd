"""The databases of an app, by the names of their blueprints."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

from sanic import Sanic

if TYPE_CHECKING:
    from .database import Database
    from .observers import Observer

DEFAULT_NAME = "db"


def databases_of(app: Sanic[Any, Any]) -> dict[str, Database]:
    """Return the databases of an app by the names of their blueprints."""
    databases = getattr(app.ctx, "_sanic_db_bp", None)
    if databases is None:
        databases = app.ctx._sanic_db_bp = {}
    return cast("dict[str, Database]", databases)


def observers_of(app: Sanic[Any, Any]) -> list[Observer]:
    """Return who observes the databases of an app, those that are registered later too."""
    observers = getattr(app.ctx, "_sanic_db_bp_observers", None)
    if observers is None:
        observers = app.ctx._sanic_db_bp_observers = []
    return cast("list[Observer]", observers)


def default_database(app: Sanic[Any, Any]) -> Database | None:
    """Return the database named ``db``, or else the first that was registered."""
    databases = databases_of(app)
    return databases.get(DEFAULT_NAME) or next(iter(databases.values()), None)
