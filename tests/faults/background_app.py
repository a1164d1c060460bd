"""The app under test, with tasks in the background."""

from __future__ import annotations

import asyncio

from sanic import HTTPResponse, Request, json

from tests.faults.app import app
from tests.shop import Item
from tests.slow_sql import sleep_for


@app.post("/background/<name>")
async def background(request: Request, name: str) -> HTTPResponse:
    """Leave a transaction to a task that goes on for long, in a query or between two."""
    app.add_task(_write_slowly(name, in_query=bool(request.args.get("query"))), name="background")
    return json({"name": name})


async def _write_slowly(name: str, *, in_query: bool) -> None:
    async with app.ctx.db.session() as session:
        session.add(Item(name=f"{name}/1"))
        await session.flush()
        if in_query:
            await session.execute(sleep_for(app.ctx.db, 30))
        else:
            await asyncio.sleep(30)
