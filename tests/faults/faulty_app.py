"""The app with the ways past its handlers, and with handlers that misuse their sessions."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from sanic import HTTPResponse, Request, json
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import SanicDBError, current_session
from tests.faults.app import app
from tests.shop import Item
from tests.slow_sql import sleep_for

__all__ = ["app"]


class Refused(Exception):
    """What middleware and dependencies raise."""

    quiet = True


# Requests that never reach their handler.


@app.on_request
async def meddle(request: Request) -> HTTPResponse | None:
    """Use the session as the header says, then answer, raise, or let the request pass."""
    fault = request.headers.get("x-middleware")
    if fault is None:
        return None
    request.ctx.session.add(Item(name=request.headers["x-name"]))
    await request.ctx.session.flush()
    if fault == "answers":
        return json({}, 202)
    if fault == "raises":
        raise Refused
    return None


class Uses:
    """A dependency that has used the session."""


class Raises:
    """A dependency that never comes to be."""


async def use_session(request: Request, session: AsyncSession) -> Uses:
    session.add(Item(name=request.headers["x-name"]))
    await session.flush()
    return Uses()


async def refuse(request: Request) -> Raises:
    raise Refused


@app.post("/unreached/dependency")
async def unreached_dependency(_: Request, first: Uses, second: Raises) -> HTTPResponse:
    return json({})


@app.post("/unreached/body")
async def unreached_body(_: Request, first: Uses) -> HTTPResponse:
    return json({})


@app.listener("before_server_start")
async def add_dependencies(_: Any) -> None:
    app.ext.add_dependency(Uses, use_session)
    app.ext.add_dependency(Raises, refuse)


@app.post("/fresh")
async def fresh(_: Request) -> HTTPResponse:
    """Have the next request open a connection of its own."""
    await app.ctx.db.engine.dispose()
    return json({})


@app.post("/upload/<name>")
async def upload(request: Request, name: str, session: Session) -> HTTPResponse:
    session.add(Item(name=name, stock=len(request.body)))
    return json({"bytes": len(request.body)})


# Handlers that misuse their sessions.


async def in_a_thread(session: AsyncSession) -> None:
    await asyncio.to_thread(session.sync_session.scalars, select(Item))


async def in_a_task(session: AsyncSession) -> None:
    async def use() -> None:
        session.sync_session.scalars(select(Item))

    await asyncio.create_task(use())


async def in_two_tasks(session: AsyncSession) -> None:
    slow = asyncio.create_task(session.execute(sleep_for(app.ctx.db, 0.2)))
    await asyncio.sleep(0.05)
    try:
        await session.scalars(select(Item))
    finally:
        await slow


async def in_gather(session: AsyncSession) -> None:
    queries = (session.scalars(select(Item)) for _ in range(2))
    for outcome in await asyncio.gather(*queries, return_exceptions=True):
        if isinstance(outcome, BaseException):
            raise outcome


MISUSES: dict[str, Callable[[AsyncSession], Awaitable[None]]] = {
    "thread": in_a_thread,
    "task": in_a_task,
    "two": in_two_tasks,
    "gather": in_gather,
}


@app.post("/misuse/<how>/<name>")
async def misuse(request: Request, how: str, name: str, session: AsyncSession) -> HTTPResponse:
    """Misuse the session, tell the error, and go on, or let it end the request (``?raise``)."""
    session.add(Item(name=name))
    await session.flush()
    try:
        await MISUSES[how](session)
    except SanicDBError as error:
        if "raise" in request.args:
            raise
        return json({"error": type(error).__name__, "text": str(error)})
    return json({})


@app.post("/late/<name>")
async def late(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
    """Leave a task behind that uses the session after the end."""
    session.add(Item(name=name))
    app.ctx.late = asyncio.create_task(use_late(request, session))
    return json({})


async def use_late(request: Request, session: AsyncSession) -> list[str]:
    await asyncio.sleep(0.1)
    errors = []
    for use in (
        lambda: session.scalars(select(Item)),
        lambda: request.ctx.session.scalars(select(Item)),
        lambda: current_session(AsyncSession).scalars(select(Item)),
        lambda: session.commit(),
    ):
        try:
            await use()
        except SanicDBError as error:
            errors.append(f"{type(error).__name__}: {error}")
    return errors


@app.get("/late")
async def late_errors(_: Request) -> HTTPResponse:
    """Tell what the task met that was left behind."""
    return json(await app.ctx.late)
