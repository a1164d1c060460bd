"""This package: `session: Session`."""

from typing import Any

from sanic import HTTPResponse, Request, Sanic, html, json
from sqlalchemy import select
from sqlalchemy.orm import Session

from benchmarks.models import TWENTY, Fortune, Item, Note, World
from sanic_db_bp import DatabaseBlueprint

from . import Options
from .pages import any_key, any_keys, any_number, fortunes_page
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
    app.add_route(add_note, "/notes", methods=["POST"])
    app.add_route(update, "/updates")
    return app


async def item(request: Request, item_id: int, session: Session) -> HTTPResponse:
    return json(session.get_one(Item, item_id).to_json())


async def twenty(request: Request, session: Session) -> HTTPResponse:
    return json([session.get_one(Item, key).to_json() for key in TWENTY])


async def world(request: Request, session: Session) -> HTTPResponse:
    return json(session.get_one(World, any_key()).to_json())


async def worlds(request: Request, session: Session) -> HTTPResponse:
    return json([session.get_one(World, key).to_json() for key in any_keys()])


async def fortunes(request: Request, session: Session) -> HTTPResponse:
    return html(fortunes_page(session.scalars(select(Fortune))))


async def unused(request: Request, session: Session) -> HTTPResponse:
    return json({"message": "Hello"})


async def add_note(request: Request, session: Session) -> HTTPResponse:
    session.add(Note(text=request.json["text"]))
    return json(request.json, status=201)


async def update(request: Request, session: Session) -> HTTPResponse:
    worlds = [session.get_one(World, key) for key in any_keys()]
    for world in worlds:
        world.random_number = any_number()
    return json([world.to_json() for world in worlds])
