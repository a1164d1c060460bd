"""Sanic, hand-written as most people write it: a session and a transaction in the handler."""

from typing import Any

from sanic import HTTPResponse, Request, Sanic, html, json
from sqlalchemy import select
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.models import TWENTY, Fortune, Item, Note, World

from . import Options
from .pages import any_key, any_keys, any_number, fortunes_page
from .sanic_app import sanic_app


def create_app(options: Options) -> Sanic[Any, Any]:
    app = sanic_app(options, more=item)
    app.ctx.options = options
    app.before_server_start(connect)
    app.after_server_stop(disconnect)
    app.add_route(item, "/items/<item_id:int>")
    app.add_route(twenty, "/twenty")
    app.add_route(add_note, "/notes", methods=["POST"])
    app.add_route(world, "/db")
    app.add_route(worlds, "/queries")
    app.add_route(fortunes, "/fortunes")
    app.add_route(update, "/updates")
    return app


async def connect(app: Sanic[Any, Any]) -> None:
    options: Options = app.ctx.options
    app.ctx.engine = create_async_engine(options.url, pool_size=options.pool_size, max_overflow=0)
    app.ctx.sessions = async_sessionmaker(app.ctx.engine, expire_on_commit=False)


async def disconnect(app: Sanic[Any, Any]) -> None:
    await app.ctx.engine.dispose()


async def item(request: Request, item_id: int) -> HTTPResponse:
    async with request.app.ctx.sessions.begin() as session:
        item = await session.get_one(Item, item_id)
        return json(item.to_json())


async def twenty(request: Request) -> HTTPResponse:
    async with request.app.ctx.sessions.begin() as session:
        return json([(await session.get_one(Item, key)).to_json() for key in TWENTY])


async def add_note(request: Request) -> HTTPResponse:
    async with request.app.ctx.sessions.begin() as session:
        session.add(Note(text=request.json["text"]))
    return json(request.json, status=201)


async def world(request: Request) -> HTTPResponse:
    async with request.app.ctx.sessions.begin() as session:
        return json((await session.get_one(World, any_key())).to_json())


async def worlds(request: Request) -> HTTPResponse:
    async with request.app.ctx.sessions.begin() as session:
        return json([(await session.get_one(World, key)).to_json() for key in any_keys()])


async def fortunes(request: Request) -> HTTPResponse:
    async with request.app.ctx.sessions.begin() as session:
        return html(fortunes_page(await session.scalars(select(Fortune))))


async def update(request: Request) -> HTTPResponse:
    async with request.app.ctx.sessions.begin() as session:
        worlds = [await session.get_one(World, key) for key in any_keys()]
        for world in worlds:
            world.random_number = any_number()
    return json([world.to_json() for world in worlds])
