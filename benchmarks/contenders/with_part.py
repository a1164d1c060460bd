"""This package's `session: Session` with one of the optional parts, or with none in use."""

from collections.abc import Callable
from functools import partial
from typing import Any

from sanic import Sanic

from sanic_db_bp.contrib import (
    errors,
    held_connections,
    n_plus_one,
    opentelemetry,
    prometheus,
    server_timing,
    sql_comments,
)

from . import Options, session

App = Sanic[Any, Any]


def imported(app: App) -> None:
    """Leave all of them off."""


def slow_log(app: App) -> None:
    app.config.DB_SLOW_QUERY_MS = 1000


INSTALL: dict[str, Callable[[App], object]] = {
    "imported": imported,
    "slow_log": slow_log,
    "errors": errors.install,
    "held_connections": held_connections.install,
    "n_plus_one": partial(n_plus_one.install, always=True),
    "server_timing": server_timing.install,
    "sql_comments": sql_comments.install,
    "prometheus": prometheus.install,
    "opentelemetry": opentelemetry.install,
}


def create_app(options: Options) -> App:
    assert options.part is not None
    app = session.create_app(options)
    INSTALL[options.part](app)
    return app
