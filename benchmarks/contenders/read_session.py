"""This package: `session: ReadSession`."""

from typing import Any

from sanic import HTTPResponse, Request, Sanic, html, json
from sqlalchemy import select

from benchmarks.models import TWENTY, Fortune, Item, World
from sanic_db_bp import DatabaseBlueprint, ReadSession

from . import Options
from .pages import any_key, any_keys, fortunes_page
from .sanic_app import sanic_app


def create_app(options: Options) -> Sanic[Any, Any]:
    app = sanic_app(options, more=item)
    app.blueprint(DatabaseBlueprint(url=options.url, pool_size=options.pool_size))
    app.add_route(item, "/items/<item_id:int>")
    app.add_route(twenty, "/twenty")
    app.add_route(world, "/db")
    app.add_route(worlds, "/queries")
    app.add_route(fortunes, "/fortunes")
    app.add_route(unused, "/unused")
    return app


async def item(request: Request, item_id: int, session: ReadSession) -> HTTPResponse:
    return json(session.get_one(Item, item_id).to_json())


async def twenty(request: Request, session: ReadSession) -> HTTPResponse:
    return json([session.get_one(Item, key).to_json() for key in TWENTY])


async def world(request: Request, session: ReadSession) -> HTTPResponse:
    return json(session.get_one(World, any_key()).to_json())


async def worlds(request: Request, session: ReadSession) -> HTTPResponse:
    return json([session.get_one(World, key).to_json() for key in any_keys()])


async def fortunes(request: Request, session: ReadSession) -> HTTPResponse:
    return html(fortunes_page(session.scalars(select(Fortune))))


async def unused(request: Request, session: ReadSession) -> HTTPResponse:
    return json({"message": "Hello"})
