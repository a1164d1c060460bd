"""An exception handler has a transaction of its own, which its answer decides over."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from sanic import HTTPResponse, Request, text
from sanic.exceptions import NotFound
from sanic.response import ResponseStream
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.databases import on_postgresql
from tests.handlers.helpers import OutOfStock, use_session
from tests.serving import serving
from tests.shop import Item, Observer, Shop, asgi_serving, checked_out, doom, errors, settled

Answer = Callable[[Request, int], Awaitable[Any]]


@pytest.mark.parametrize("asgi", [False, True], ids=["native", "asgi"])
async def test_its_commit_failure_reaches_the_client(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture, asgi: bool
) -> None:
    """The client gets an error in place of its answer, and one line is logged."""

    @app.post("/")
    async def add(request: Request) -> HTTPResponse:
        raise OutOfStock

    @app.exception(OutOfStock)
    async def note(request: Request, error: OutOfStock) -> HTTPResponse:
        await use_session(request, "a note")
        await doom(request.ctx.session, observer)
        return text("noted")

    if asgi:
        async with asgi_serving(app) as server:
            assert (await server.request("POST", "/")).status == 500
            await settled(app, observer)
    else:
        async with serving(app) as client:
            assert (await client.post("/")).status_code == 500
            await settled(app, observer)
    assert observer.names() == []
    [line] = errors(caplog)
    assert "COMMIT failed" in line.getMessage()


async def _return(request: Request, status: int) -> HTTPResponse:
    await use_session(request, "note")
    return text("noted", status)


async def _respond(request: Request, status: int) -> None:
    response = await request.respond(status=status)
    await use_session(request, "note")
    await response.send("not")
    await response.send("ed")


async def _respond_after_use(request: Request, status: int) -> None:
    await use_session(request, "note")
    response = await request.respond(status=status)
    await response.send("noted", end_stream=True)


async def _stream(request: Request, status: int) -> ResponseStream:
    session = request.ctx.session

    async def send(response: Any) -> None:
        await response.write("not")
        session.add(Item(name="note"))
        await session.flush()
        await response.write("ed")

    return ResponseStream(send, status)


@pytest.mark.parametrize("status", [200, 409])
@pytest.mark.parametrize("answer", [_return, _respond, _respond_after_use, _stream])
@pytest.mark.parametrize("uses", [True, False], ids=["used", "unused"])
@on_postgresql
async def test_however_it_answers(
    app: Shop, observer: Observer, status: int, answer: Answer, uses: bool
) -> None:
    """What it wrote is kept if its status is good, also where it streams."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        if uses:
            await use_session(request, "handler")
        raise OutOfStock

    @app.exception(OutOfStock)
    async def note(request: Request, error: OutOfStock) -> Any:
        return await answer(request, status)

    async with serving(app) as client:
        response = await client.post("/")
        assert (response.status_code, response.text) == (status, "noted")
        assert checked_out(app) == 0
        assert observer.names() == (["note"] if status == 200 else [])


@pytest.mark.parametrize("status", [200, 409])
@pytest.mark.parametrize("path", ["/", "/nowhere"])
async def test_where_the_handler_was_not_reached(
    app: Shop, observer: Observer, status: int, path: str
) -> None:
    """What middleware did before the error is rolled back, and what it did itself is kept."""
    seen: list[Any] = []

    @app.on_request
    async def guard(request: Request) -> None:
        await use_session(request)
        if request.path == "/":
            raise OutOfStock

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    @app.exception(OutOfStock, NotFound)
    async def note(request: Request, error: Exception) -> HTTPResponse:
        seen.append(checked_out(app))
        await use_session(request, "note")
        return text("noted", status)

    async with serving(app) as client:
        assert (await client.post(path)).status_code == status
        assert observer.names() == (["note"] if status == 200 else [])
        assert seen == [0]
        await settled(app, observer)


@on_postgresql
async def test_after_a_failed_statement_of_middleware(app: Shop, observer: Observer) -> None:
    """The transaction that the error has broken is not the exception handler's."""

    @app.on_request
    async def guard(request: Request) -> None:
        connection = await request.ctx.session.connection()
        await connection.exec_driver_sql("SELECT nonsense")

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    @app.exception(DBAPIError)
    async def note(request: Request, error: Exception) -> HTTPResponse:
        await use_session(request, "note")
        return text("noted")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["note"]
