"""Sanic, hand-written by somebody who knows SQLAlchemy's insides: the fastest that we found.

A plain `Session` runs in one greenlet a request; what only reads does so on an engine of its own
that never begins a transaction. The statements are made once.
"""

from typing import Any

from sanic import HTTPResponse, Request, Sanic, html, json
from sqlalchemy import Engine, bindparam, select
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from benchmarks.models import TWENTY, Fortune, Item, ItemJSON, Note, World, WorldJSON

from . import Options
from .pages import any_key, any_keys, any_number, fortunes_page
from .sanic_app import sanic_app

ITEM = select(Item).where(Item.id == bindparam("key"))
WORLD = select(World).where(World.id == bindparam("key"))
FORTUNES = select(Fortune)


def create_app(options: Options) -> Sanic[Any, Any]:
    app = sanic_app(options)
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
    pool: dict[str, Any] = {"pool_size": options.pool_size, "max_overflow": 0}
    app.ctx.engine = create_async_engine(options.url, **pool)
    app.ctx.read_engine = create_async_engine(
        options.url, isolation_level="AUTOCOMMIT", skip_autocommit_rollback=True, **pool
    )


async def disconnect(app: Sanic[Any, Any]) -> None:
    await app.ctx.engine.dispose()
    await app.ctx.read_engine.dispose()


def engine_of(request: Request) -> Engine:
    engine: Engine = request.app.ctx.engine.sync_engine
    return engine


def read_engine_of(request: Request) -> Engine:
    engine: Engine = request.app.ctx.read_engine.sync_engine
    return engine


async def item(request: Request, item_id: int) -> HTTPResponse:
    return json(await greenlet_spawn(read_item, read_engine_of(request), item_id))


def read_item(engine: Engine, item_id: int) -> ItemJSON:
    with Session(engine) as session:
        return session.scalars(ITEM, {"key": item_id}).one().to_json()


async def twenty(request: Request) -> HTTPResponse:
    return json(await greenlet_spawn(read_twenty, read_engine_of(request)))


def read_twenty(engine: Engine) -> list[ItemJSON]:
    with Session(engine) as session:
        return [session.scalars(ITEM, {"key": key}).one().to_json() for key in TWENTY]


async def add_note(request: Request) -> HTTPResponse:
    await greenlet_spawn(write_note, engine_of(request), request.json["text"])
    return json(request.json, status=201)


def write_note(engine: Engine, text: str) -> None:
    with Session(engine, expire_on_commit=False) as session:
        session.add(Note(text=text))
        session.commit()


async def world(request: Request) -> HTTPResponse:
    return json((await greenlet_spawn(read_worlds, read_engine_of(request), [any_key()]))[0])


async def worlds(request: Request) -> HTTPResponse:
    return json(await greenlet_spawn(read_worlds, read_engine_of(request), any_keys()))


def read_worlds(engine: Engine, keys: list[int]) -> list[WorldJSON]:
    with Session(engine) as session:
        return [session.scalars(WORLD, {"key": key}).one().to_json() for key in keys]


async def fortunes(request: Request) -> HTTPResponse:
    return html(await greenlet_spawn(read_fortunes, read_engine_of(request)))


def read_fortunes(engine: Engine) -> str:
    with Session(engine) as session:
        return fortunes_page(session.scalars(FORTUNES))


async def update(request: Request) -> HTTPResponse:
    return json(await greenlet_spawn(update_worlds, engine_of(request), any_keys()))


def update_worlds(engine: Engine, keys: list[int]) -> list[WorldJSON]:
    with Session(engine, expire_on_commit=False) as session:
        worlds = [session.scalars(WORLD, {"key": key}).one() for key in keys]
        for world in worlds:
            world.random_number = any_number()
        session.commit()
        return [world.to_json() for world in worlds]
