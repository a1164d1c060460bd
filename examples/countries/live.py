"""What lasts longer than a request: a stream, a websocket and a background task."""

import asyncio
import csv
from datetime import UTC, datetime, timedelta
from io import StringIO
from typing import Any

from sanic import Blueprint, Request, Sanic, Websocket
from sanic.log import logger
from sqlalchemy import delete, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import joinedload

from sanic_db_bp import Database, current_session

from .models import Country, Note, Subdivision

KEEP_NOTES = timedelta(days=30)

bp = Blueprint("live")


@bp.get("/countries/<code:str>/subdivisions.csv")
async def export_subdivisions(
    request: Request, code: str, country: Country, session: AsyncSession
) -> None:
    """Rows go out while they come in; the session lives to the end of the stream."""
    response = await request.respond(content_type="text/csv; charset=utf-8")
    query = select(Subdivision.code, Subdivision.type, Subdivision.name)
    query = query.where(Subdivision.country == country).order_by(Subdivision.code)
    rows = await session.stream(query)
    async for chunk in rows.partitions(100):
        lines = StringIO()
        csv.writer(lines).writerows(chunk)
        await response.send(lines.getvalue())
    await response.eof()


async def search(request: Request, ws: Websocket, db: Database) -> None:
    """Answer each message in a session of its own: between them no connection is held."""
    request.app.ctx.sockets.add(ws)
    try:
        while (text := await ws.recv()) is not None:
            async with db.session():
                found = await find_names(str(text))
            await ws.send("\n".join(found))
    finally:
        request.app.ctx.sockets.remove(ws)


bp.add_websocket_route(search, "/search")


async def find_names(text: str) -> list[str]:
    """What is named like this, asked in the session of the block or request around the call."""
    query = select(Subdivision).where(Subdivision.name.icontains(text, autoescape=True))
    query = query.options(joinedload(Subdivision.country)).order_by(Subdivision.code).limit(10)
    subdivisions = await current_session(AsyncSession).scalars(query)
    return [f"{subdivision.name}, {subdivision.country.name}" for subdivision in subdivisions]


def announce(app: Sanic[Any, Any], note: dict[str, Any]) -> None:
    """Called after the COMMIT, so nobody hears of a note that was never kept."""
    for ws in app.ctx.sockets:
        app.add_task(ws.send(f"{note['country']}: {note['text']}"))


async def sweep(app: Sanic[Any, Any]) -> None:
    """The background task: once an hour it deletes old notes, each time in its own session."""
    while True:
        async with app.ctx.db.session() as session:
            old = delete(Note).where(Note.created_at < datetime.now(UTC) - KEEP_NOTES)
            result = await session.execute(old)
        logger.info("Deleted %d old notes", result.rowcount)
        await asyncio.sleep(3600)
