"""Sanic, hand-written, for those who want `AsyncSession`: its fastest form for what only reads."""

from typing import Any

from sanic import HTTPResponse, Request, Sanic, json
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from benchmarks.models import TWENTY, Item

from . import Options
from .sanic_app import sanic_app


def create_app(options: Options) -> Sanic[Any, Any]:
    app = sanic_app(options)
    app.ctx.options = options
    app.before_server_start(connect)
    app.after_server_stop(disconnect)
    app.add_route(item, "/items/<item_id:int>")
    app.add_route(twenty, "/twenty")
    return app


async def connect(app: Sanic[Any, Any]) -> None:
    options: Options = app.ctx.options
    app.ctx.read_engine = create_async_engine(
        options.url,
        isolation_level="AUTOCOMMIT",
        skip_autocommit_rollback=True,
        pool_size=options.pool_size,
        max_overflow=0,
    )


async def disconnect(app: Sanic[Any, Any]) -> None:
    await app.ctx.read_engine.dispose()


async def item(request: Request, item_id: int) -> HTTPResponse:
    async with AsyncSession(request.app.ctx.read_engine) as session:
        return json((await session.get_one(Item, item_id)).to_json())


async def twenty(request: Request) -> HTTPResponse:
    async with AsyncSession(request.app.ctx.read_engine) as session:
        return json([(await session.get_one(Item, key)).to_json() for key in TWENTY])
