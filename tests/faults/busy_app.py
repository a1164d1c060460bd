"""The app under test, with handlers that need much of the pool, or one row after another."""

from __future__ import annotations

import asyncio
from functools import partial

from sanic import HTTPResponse, Request, json
from sanic.exceptions import SanicException
from sqlalchemy import select, text, update
from sqlalchemy.orm import Session

from sanic_db_bp import Database, ReadSession, on_commit
from tests.faults.app import app
from tests.shop import Item

LOCKED_FOR = 0.02
"""Seconds that a writer holds the lock of the row, or of SQLite's whole file."""


@app.get("/ping")
async def ping(_: Request, session: ReadSession) -> HTTPResponse:
    return json(session.scalar(select(1)))


@app.post("/several/<name>")
async def several(
    _: Request, name: str, session: Session, read_session: ReadSession
) -> HTTPResponse:
    """Write and read at once, and write again once it is committed."""
    session.add(Item(name=f"{name}/1"))
    session.flush()
    on_commit(partial(_store, f"{name}/2"))
    return json(read_session.scalar(text("SELECT count(*) FROM item")))


async def _store(name: str) -> None:
    async with app.ctx.db.session() as session:
        session.add(Item(name=name))


@app.post("/two/<name>")
async def two(_: Request, name: str, session: Session, db: Database) -> HTTPResponse:
    """Hold one connection and ask for another."""
    session.add(Item(name=f"{name}/1"))
    session.flush()
    async with db.session() as other:
        other.add(Item(name=f"{name}/2"))
    return json({"name": name})


@app.post("/count/<name>")
async def count(_: Request, name: str, session: Session) -> HTTPResponse:
    """Read a number, take some time, and write the next."""
    stock = session.scalars(select(Item.stock).where(Item.name == name).with_for_update()).one()
    await asyncio.sleep(LOCKED_FOR)
    session.execute(update(Item).where(Item.name == name).values(stock=stock + 1))
    return json(stock + 1)


@app.post("/fail/<name>")
async def fail(_: Request, name: str, session: Session) -> HTTPResponse:
    """Write, and then fail."""
    session.add(Item(name=f"{name}/1"))
    session.flush()
    raise SanicException(name, 409, quiet=True)


@app.post("/restart")
async def restart(_: Request) -> HTTPResponse:
    """Have this worker started again."""
    app.m.restart()
    return json(None)
