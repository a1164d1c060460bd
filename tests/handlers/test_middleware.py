"""What comes before and after the handler shares its transaction, or has one of its own."""

import asyncio
import gc

import pytest
from sanic import HTTPResponse, Request, text
from sanic.response import BaseHTTPResponse
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp.handling.scope import Scope
from tests.databases import on_postgresql
from tests.handlers.helpers import OutOfStock, use_session
from tests.serving import serving
from tests.shop import Item, Observer, Shop, raw_client, settled


async def test_middleware_and_handler_share_a_transaction(app: Shop, observer: Observer) -> None:
    """What request middleware did is committed, or rolled back, with the handler's work."""

    @app.on_request
    async def before(request: Request) -> None:
        await use_session(request)

    @app.post("/<status:int>")
    async def add(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        assert session is request.ctx.session
        session.add(Item(name="handler"))
        return text("answered", status)

    async with serving(app) as client:
        await client.post("/400")
        assert observer.names() == []
        await client.post("/200")
        assert observer.names() == ["middleware", "handler"]
        await settled(app, observer)


async def test_a_handler_without_a_session_commits_what_middleware_did(
    app: Shop, observer: Observer
) -> None:
    """A handler that asks for nothing still decides over the middleware's work."""

    @app.on_request
    async def before(request: Request) -> None:
        await use_session(request)

    @app.post("/<status:int>")
    async def answer(request: Request, status: int) -> HTTPResponse:
        if status == 500:
            raise ValueError
        return text("answered", status)

    async with serving(app) as client:
        await client.post("/400")
        await client.post("/500")
        assert observer.names() == []
        await client.post("/200")
        assert observer.names() == ["middleware"]
        await settled(app, observer)


@pytest.mark.parametrize("status", [200, 403])
@on_postgresql
async def test_request_middleware_that_answers_first(
    app: Shop, observer: Observer, status: int
) -> None:
    """Its work is rolled back, while the connection of the client stays open."""

    @app.on_request
    async def guard(request: Request) -> HTTPResponse:
        await use_session(request)
        return text("stop", status)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert await stayer.answer() == (status, b"stop")
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_request_middleware_that_raises(app: Shop, observer: Observer) -> None:
    """Its work is rolled back, while the connection of the client stays open."""

    @app.on_request
    async def guard(request: Request) -> None:
        await use_session(request)
        raise OutOfStock

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        status, _ = await stayer.answer()
        assert status == 500
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_a_client_that_leaves_in_request_middleware(app: Shop, observer: Observer) -> None:
    """The middleware's work is rolled back though the handler is never reached."""
    reached = asyncio.Event()

    @app.on_request
    async def slow(request: Request) -> None:
        await use_session(request)
        reached.set()
        await asyncio.sleep(5)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 2)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


@pytest.mark.parametrize("asks", [True, False])
@on_postgresql
async def test_response_middleware_may_use_the_session(
    app: Shop, observer: Observer, asks: bool
) -> None:
    """Response middleware has a unit of work of its own, finished before the next request."""

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        await use_session(request, "after")

    if asks:

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="handler"))
            return text("stored")
    else:

        @app.post("/")
        async def note(request: Request) -> HTTPResponse:
            await use_session(request, "handler")
            return text("stored")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert await stayer.answer() == (200, b"stored")
        await settled(app, observer, within=0.2)
        assert observer.names() == ["handler", "after"]


@pytest.mark.parametrize("path", ["/", "/fails", "/given", "/given/fails"])
async def test_response_middleware_is_the_first_to_use_the_session(
    app: Shop, observer: Observer, path: str
) -> None:
    """Nothing is left behind where the handler itself has touched no session, given one or not."""

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        await use_session(request, "after")

    @app.post("/")
    async def answer(request: Request) -> HTTPResponse:
        return text("ok")

    @app.post("/fails")
    async def fail(request: Request) -> HTTPResponse:
        raise OutOfStock

    @app.post("/given")
    async def answer_with(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("ok")

    @app.post("/given/fails")
    async def fail_with(request: Request, session: Session) -> HTTPResponse:
        raise OutOfStock

    fails = path.endswith("fails")
    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send(f"POST {path} HTTP/1.1\nContent-Length: 0")
        status, _ = await stayer.answer()
        assert status == (500 if fails else 200)
        await settled(app, observer, within=0.2)
        assert observer.names() == ([] if fails else ["after"])


@on_postgresql
async def test_a_connection_that_stays_keeps_nothing_of_its_requests(app: Shop) -> None:
    """Whether a middleware or the handler answers."""

    @app.on_request
    async def before(request: Request) -> HTTPResponse | None:
        await request.ctx.session.execute(select(Item))
        return text("middleware") if request.args else None

    @app.get("/")
    async def answer(request: Request) -> HTTPResponse:
        return text("handler")

    def kept() -> int:
        gc.collect()
        return sum(type(each) is Scope for each in gc.get_objects())

    others = kept()
    async with serving(app) as client:
        for path, name in 2 * (("/", "handler"), ("/?first=1", "middleware")):
            for _ in range(3):
                assert (await client.get(path)).text == name
            assert kept() <= others + 1


@on_postgresql
async def test_one_response_object_answers_many_requests(app: Shop, observer: Observer) -> None:
    """Those too in which nobody uses a session."""
    always = text("answered")

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        if name := request.args.get("name"):
            await use_session(request, name)

    @app.post("/")
    async def answer(request: Request) -> HTTPResponse:
        return always

    async with serving(app) as client:
        for path in ("/?name=apple", "/", "/?name=pear"):
            assert (await client.post(path)).text == "answered"
        assert observer.names() == ["apple", "pear"]
        await settled(app, observer)


async def test_response_middleware_that_raises(app: Shop, observer: Observer) -> None:
    """What response middleware did before it raised leaves no connection behind."""

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        await use_session(request, "after")
        raise ValueError("broken")

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="handler"))
        return text("stored")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        await stayer.answer()
        await settled(app, observer, within=0.2)
        assert "handler" in observer.names()


async def test_a_client_that_leaves_in_response_middleware(app: Shop, observer: Observer) -> None:
    """What the handler did is stored, and the middleware's connection goes back."""
    reached = asyncio.Event()

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        await use_session(request, "after")
        reached.set()
        await asyncio.sleep(5)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="handler"))
        return text("stored")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 2)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == ["handler"]


async def test_a_client_that_leaves_in_an_exception_handler(app: Shop, observer: Observer) -> None:
    """What the exception handler did is rolled back, and its connection goes back."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        raise OutOfStock

    @app.exception(OutOfStock)
    async def note(request: Request, error: OutOfStock) -> HTTPResponse:
        await use_session(request, "note")
        reached.set()
        await asyncio.sleep(5)
        return text("noted")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 2)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/no", 404), ("PUT", "/", 405)])
@pytest.mark.parametrize("when", ["request", "response"])
@on_postgresql
async def test_no_route_or_method(
    app: Shop, observer: Observer, method: str, path: str, status: int, when: str
) -> None:
    """Middleware that used the session leaves nothing behind where there is no handler."""

    @app.middleware(when)
    async def note(request: Request, *_: HTTPResponse) -> None:
        await use_session(request)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send(f"{method} {path} HTTP/1.1\nContent-Length: 0")
        assert (await stayer.answer())[0] == status
        await settled(app, observer, within=0.2)
        assert observer.names() == []
