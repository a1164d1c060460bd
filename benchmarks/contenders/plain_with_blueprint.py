"""Sanic with this package's blueprint, on routes that ask for nothing of it."""

from typing import Any

from sanic import Sanic

from sanic_db_bp import DatabaseBlueprint

from . import Options
from .sanic_app import sanic_app


def create_app(options: Options) -> Sanic[Any, Any]:
    app = sanic_app(options)
    app.blueprint(DatabaseBlueprint(url=options.url, pool_size=options.pool_size))
    return app
