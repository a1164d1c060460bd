"""The app: everything put together."""

from contextlib import suppress
from functools import partial
from json import dumps
from typing import Any

from sanic import Sanic
from sqlalchemy.exc import IntegrityError

from sanic_db_bp import DatabaseBlueprint
from sanic_db_bp.contrib import errors
from sanic_db_bp.contrib.health import HealthBlueprint
from sanic_db_bp.contrib.migrations import MigrationsBlueprint

from . import data, live, observe, routes
from .models import Base, Country


def create_app() -> Sanic[Any, Any]:
    """Use the database of `SANIC_DB_URL` or, if that is not set, the file `countries.db`."""
    app = Sanic("countries", dumps=partial(dumps, ensure_ascii=False))
    app.config.FALLBACK_ERROR_FORMAT = "json"
    app.ctx.sockets = set()
    db = DatabaseBlueprint("db", metadata=Base.metadata, create_tables=True)
    app.blueprint(db)
    app.blueprint(MigrationsBlueprint(db))
    app.blueprint(HealthBlueprint())
    app.blueprint(routes.bp)
    app.blueprint(live.bp)
    app.ext.add_dependency(Country, routes.get_country)
    errors.install(app)
    app.error_handler.add(errors.RowNotFound, routes.not_found)
    observe.install(app)
    app.before_server_start(load_data)
    app.after_server_start(start_sweeping)
    app.command(counts)
    return app


async def load_data(app: Sanic[Any, Any]) -> None:
    """Once for the whole server: of two workers the slower one is refused by the primary key."""
    with suppress(IntegrityError):
        await app.ctx.db.run_sync(data.load)


async def start_sweeping(app: Sanic[Any, Any]) -> None:
    app.add_task(live.sweep(app), name="sweep")


async def counts() -> None:
    """Print how many rows each table holds."""
    for table, rows in (await data.count_rows()).items():
        print(f"{table:12} {rows:6}")
