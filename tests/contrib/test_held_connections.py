"""A connection that is held for long is reported while it is held."""

import asyncio
import gc
import logging
import weakref
from typing import Any

import pytest
from sanic import HTTPResponse, Request, empty
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp.contrib import held_connections
from tests.databases import on_sqlite
from tests.serving import serving
from tests.shop import Shop, eventually, make_app

LIMIT = 0.05


def holding_app(database_url: str, limit: float = LIMIT) -> tuple[Shop, asyncio.Event]:
    """Make an app whose handlers hold a connection until they are let go."""
    app = make_app(database_url, create_tables=False)
    held_connections.install(app, limit=limit)
    let_go = asyncio.Event()

    @app.get("/asyncio")
    async def asynchronous(request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(text("SELECT 1"))  # asyncio
        await let_go.wait()
        return empty()

    @app.get("/plain")
    async def plain(request: Request, session: Session) -> HTTPResponse:
        session.execute(text("SELECT 1"))  # plain
        await let_go.wait()
        return empty()

    @app.get("/ended")
    async def ended(request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(text("SELECT 1"))
        await session.commit()
        await let_go.wait()
        return empty()

    return app, let_go


def line_of(mark: str) -> int:
    """Find the line of this file that ends with a comment."""
    with open(__file__) as lines:
        return next(i for i, line in enumerate(lines, 1) if line.endswith(f"# {mark}\n"))


def warnings(caplog: pytest.LogCaptureFixture) -> list[Any]:
    return [record for record in caplog.records if "has been held" in record.getMessage()]


@pytest.mark.parametrize(("path", "function"), [("asyncio", "asynchronous"), ("plain", "plain")])
async def test_it_names_the_handler_and_the_line(
    database_url: str, caplog: pytest.LogCaptureFixture, path: str, function: str
) -> None:
    """The warning comes while the connection is held, once, and leads to the first statement."""
    app, let_go = holding_app(database_url)
    async with serving(app) as client:
        # On a busy machine the start itself may take that long.
        caplog.clear()
        request = asyncio.create_task(
            client.get(f"/{path}", headers={"X-Request-ID": "request-17"})
        )
        await eventually(lambda: warnings(caplog), within=10)
        await asyncio.sleep(2 * LIMIT)
        assert not request.done()
        let_go.set()
        await request
    (warning,) = warnings(caplog)
    assert warning.levelno == logging.WARNING
    assert warning.getMessage() == (
        f"a connection of 'db' has been held for 0.05 s by GET /{path} ({app.name}.{function}), "
        f"request request-17, since {__file__}:{line_of(path)} in {function}"
    )
    assert warning.request_id == "request-17"


async def test_blocks_outside_of_requests_are_named_by_their_line(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """There is no route to name; each new hold is reported anew."""
    app, _ = holding_app(database_url)
    async with serving(app):
        # On a busy machine the start itself may take that long.
        caplog.clear()
        for number in (1, 2):
            async with app.ctx.db.session() as session:
                await session.execute(text("SELECT 1"))  # block
                await eventually(lambda: len(warnings(caplog)) == number, within=10)  # noqa: B023
    for warning in warnings(caplog):
        assert f"for 0.05 s since {__file__}:{line_of('block')} in test_" in warning.getMessage()


async def test_a_connection_that_came_back_in_time_is_not_reported(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """What counts is the transaction, not the handler."""
    app, let_go = holding_app(database_url, limit=1)
    async with serving(app) as client:
        caplog.clear()
        request = asyncio.create_task(client.get("/ended"))
        await asyncio.sleep(1.5)
        let_go.set()
        await request
    assert not warnings(caplog)


@on_sqlite
async def test_the_timer_keeps_no_request_alive(database_url: str) -> None:
    """A body of many megabytes is free when its request is over, however long the limit is."""
    app, let_go = holding_app(database_url, limit=3600)
    let_go.set()
    requests: list[weakref.ref[Request]] = []

    @app.on_request
    async def remember(request: Request) -> None:
        requests.append(weakref.ref(request))

    # A loop that has no earlier timer forgets cancelled ones at once.
    earlier = asyncio.get_running_loop().call_later(60, gc.collect)
    async with serving(app) as client:
        await client.get("/asyncio", headers={"Connection": "close"})
        await asyncio.sleep(0.1)
        gc.collect()
        assert [request() for request in requests] == [None]
    earlier.cancel()
