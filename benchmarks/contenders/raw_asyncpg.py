"""Sanic with asyncpg alone: the limit for whatever builds on that driver."""

from typing import Any

import asyncpg
from sanic import HTTPResponse, Request, Sanic, html, json
from sqlalchemy import make_url

from benchmarks.models import TWENTY

from . import Options
from .pages import any_key, any_keys, any_number, fortunes_page_of_rows
from .sanic_app import sanic_app

ITEM = "SELECT id, name FROM item WHERE id = $1"
WORLD = 'SELECT id, random_number AS "randomNumber" FROM world WHERE id = $1'


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
    dsn = make_url(options.url).set(drivername="postgresql").render_as_string(hide_password=False)
    app.ctx.pool = await asyncpg.create_pool(dsn, min_size=1, max_size=options.pool_size)


async def disconnect(app: Sanic[Any, Any]) -> None:
    await app.ctx.pool.close()


async def item(request: Request, item_id: int) -> HTTPResponse:
    return json(dict(await request.app.ctx.pool.fetchrow(ITEM, item_id)))


async def twenty(request: Request) -> HTTPResponse:
    async with request.app.ctx.pool.acquire() as connection:
        return json([dict(await connection.fetchrow(ITEM, key)) for key in TWENTY])


async def add_note(request: Request) -> HTTPResponse:
    statement = "INSERT INTO note (text) VALUES ($1) RETURNING id"
    await request.app.ctx.pool.fetchval(statement, request.json["text"])
    return json(request.json, status=201)


async def world(request: Request) -> HTTPResponse:
    return json(dict(await request.app.ctx.pool.fetchrow(WORLD, any_key())))


async def worlds(request: Request) -> HTTPResponse:
    async with request.app.ctx.pool.acquire() as connection:
        return json([dict(await connection.fetchrow(WORLD, key)) for key in any_keys()])


async def fortunes(request: Request) -> HTTPResponse:
    rows = await request.app.ctx.pool.fetch("SELECT id, message FROM fortune")
    return html(fortunes_page_of_rows([(row["id"], row["message"]) for row in rows]))


async def update(request: Request) -> HTTPResponse:
    statement = "UPDATE world SET random_number = $2 WHERE id = $1"
    async with request.app.ctx.pool.acquire() as connection, connection.transaction():
        worlds = [dict(await connection.fetchrow(WORLD, key)) for key in any_keys()]
        for world in worlds:
            world["randomNumber"] = any_number()
        changes = [(world["id"], world["randomNumber"]) for world in worlds]
        await connection.executemany(statement, changes)
    return json(worlds)
