"""What a handler did is committed before the answer, or not at all."""

from collections.abc import Callable
from typing import Any

import pytest
from sanic import HTTPResponse, Request, json, text
from sanic.exceptions import NotFound, SanicException
from sanic.response import BaseHTTPResponse
from sqlalchemy import select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from tests.databases import on_postgresql, on_servers
from tests.handlers.helpers import OutOfStock
from tests.serving import serving
from tests.shop import (
    Item,
    Observer,
    Shop,
    checked_out,
    connection_id,
    doom,
    errors,
    raw_client,
    settled,
)


class Observed(HTTPResponse):
    """A response that looks at the database when its first byte is about to be sent."""

    seen: Any = None
    look: Callable[[], Any]

    async def send(self, data: Any = None, end_stream: bool | None = None) -> None:
        if self.seen is None:
            type(self).seen = self.look()
        await super().send(data, end_stream)


def observed(app: Shop, observer: Observer) -> type[Observed]:
    """Give a class of responses that notes what is stored, and how many connections are out."""

    class Here(Observed):
        def look(self) -> Any:
            return observer.names(), checked_out(app)

    return Here


async def test_commit_comes_before_the_first_byte(app: Shop, observer: Observer) -> None:
    """When the answer is sent the row is stored and the connection is back in the pool."""
    response_class = observed(app, observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        return response_class("stored", 201)

    async with serving(app) as client:
        response = await client.post("/")
        assert (response.status_code, response.text) == (201, "stored")
        assert response_class.seen == (["apple"], 0)


async def test_commit_comes_before_the_response_middleware(app: Shop, observer: Observer) -> None:
    """Response middleware sees the row that the handler has stored."""
    seen: list[Any] = []

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        return text("stored")

    @app.middleware("response")
    async def look(request: Request, response: BaseHTTPResponse) -> None:
        seen.append((observer.names(), checked_out(app)))

    async with serving(app) as client:
        await client.post("/")
        assert seen == [(["apple"], 0)]


async def test_a_transaction_that_was_cut_off_is_no_success(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Such as by a disposal that waits no longer: the client reads that nothing is stored."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        await app.ctx.db.dispose(within=0)
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        assert "COMMIT failed: SessionFinished: This session" in errors(caplog)[0].getMessage()
        assert observer.names() == []


async def test_no_connection_is_held_before_the_first_statement(app: Shop) -> None:
    """A handler that has a session and has not used it holds no connection."""
    held: list[int] = []

    @app.get("/")
    async def idle(request: Request, session: AsyncSession) -> HTTPResponse:
        held.append(checked_out(app))
        await session.scalars(select(Item))
        held.append(checked_out(app))
        return text("ok")

    async with serving(app) as client:
        await client.get("/")
        assert held == [0, 1]
        assert checked_out(app) == 0


@pytest.mark.parametrize("status", [400, 503])
async def test_a_bad_status_rolls_back(app: Shop, observer: Observer, status: int) -> None:
    """An answer of 400 or more stores nothing, and the next request is fine."""

    @app.post("/<status:int>")
    async def add(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        return text("answered", status)

    async with serving(app) as client:
        response = await client.post(f"/{status}")
        assert (response.status_code, response.text) == (status, "answered")
        assert observer.names() == []
        await settled(app, observer)
        assert (await client.post("/201")).status_code == 201
        assert observer.names() == ["apple"]


@pytest.mark.parametrize("status", [200, 204, 301, 399])
@on_postgresql
async def test_every_other_status_commits(app: Shop, observer: Observer, status: int) -> None:
    """An answer below 400 stores what the handler did."""

    @app.post("/<status:int>")
    async def add(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        return HTTPResponse(status=status)

    async with serving(app) as client:
        assert (await client.post(f"/{status}")).status_code == status
        assert observer.names() == ["apple"]


@pytest.mark.filterwarnings("ignore:coroutine")
@on_postgresql
async def test_no_answer_rolls_back(app: Shop, observer: Observer) -> None:
    """A handler that forgets to return an answer stores nothing, as the client gets a 500."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> None:
        session.add(Item(name="apple"))
        await session.flush()

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        assert observer.names() == []
        await settled(app, observer)


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("oops"), 500), (NotFound("no apple"), 404), (SanicException("tea", 418), 418)],
)
@on_postgresql
async def test_an_exception_rolls_back(
    app: Shop, observer: Observer, error: Exception, status: int
) -> None:
    """Nothing is stored, and Sanic answers as it does without a database."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        raise error

    async with serving(app) as client:
        assert (await client.post("/")).status_code == status
        assert observer.names() == []
        await settled(app, observer)


async def test_the_users_exception_handler_answers(app: Shop, observer: Observer) -> None:
    """The user's handler for an exception runs after the ROLLBACK, and its answer is sent."""
    seen: list[Any] = []

    @app.post("/")
    async def add(request: Request, session: Session) -> HTTPResponse:
        session.add(Item(name="apple"))
        session.flush()
        raise OutOfStock("apple")

    @app.exception(OutOfStock)
    async def out_of_stock(request: Request, error: OutOfStock) -> HTTPResponse:
        seen.append((observer.names(), checked_out(app)))
        return json({"missing": str(error)}, 409)

    async with serving(app) as client:
        response = await client.post("/")
        assert (response.status_code, response.json()) == (409, {"missing": "apple"})
        assert seen == [([], 0)]


async def test_an_exception_handler_may_use_the_session(app: Shop, observer: Observer) -> None:
    """An exception handler has a unit of work of its own, kept by a good status or a commit."""

    @app.post("/<status:int>/<commits:int>")
    async def add(
        request: Request, status: int, commits: int, session: AsyncSession
    ) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        raise OutOfStock(status, commits)

    @app.exception(OutOfStock)
    async def note(request: Request, error: OutOfStock) -> HTTPResponse:
        status, commits = error.args
        request.ctx.session.add(Item(name=f"note {status}"))
        await request.ctx.session.flush()
        if commits:
            await request.ctx.session.commit()
        return text("noted", status)

    async with serving(app) as client, raw_client(client) as stayer:
        for status, commits in ((409, 0), (409, 1), (200, 0)):
            stayer.send(f"POST /{status}/{commits} HTTP/1.1\nContent-Length: 0")
            assert await stayer.answer() == (status, b"noted")
            await settled(app, observer, within=0.2)
            assert observer.names() == ["note 409", "note 200"][: commits + 2 * (status == 200)]


async def test_an_exception_handler_that_raises_leaves_nothing(
    app: Shop, observer: Observer
) -> None:
    """What a failing exception handler did is rolled back."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        raise OutOfStock

    @app.exception(OutOfStock)
    async def note(request: Request, error: OutOfStock) -> HTTPResponse:
        request.ctx.session.add(Item(name="a note"))
        await request.ctx.session.flush()
        raise ValueError("again")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        assert observer.names() == []
        await settled(app, observer)


async def test_commit_failure_reaches_the_client(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets an error, nothing is stored, and one line is logged; the next is fine."""

    @app.post("/<name>")
    async def add(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name=name))
        await session.flush()
        if name == "doomed":
            await doom(session, observer)
        return text("stored", 201)

    async with serving(app) as client:
        response = await client.post("/doomed")
        assert response.status_code >= 500
        assert "stored" not in response.text
        assert observer.names() == []
        await settled(app, observer)
        [line] = errors(caplog)
        assert "POST /doomed" in line.getMessage()
        assert "COMMIT failed" in line.getMessage()
        assert line.exc_info is None
        assert "\n" not in line.getMessage()
        if observer.kind == "sqlite":
            assert line.getMessage().endswith(": IntegrityError: FOREIGN KEY constraint failed")
        for name in ("apple", "pear", "plum"):
            assert (await client.post(f"/{name}")).status_code == 201
        assert observer.names() == ["apple", "pear", "plum"]


@on_postgresql
async def test_a_connection_killed_before_the_commit(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets an error when the server has ended the connection, and one line tells."""

    @app.post("/<name>")
    async def add(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name=name))
        await session.flush()
        if name == "doomed":
            observer.kill(await connection_id(session))
        return text("stored", 201)

    async with serving(app) as client:
        assert (await client.post("/doomed")).status_code >= 500
        assert len(errors(caplog)) == 1
        assert errors(caplog)[0].exc_info is None
        await settled(app, observer)
        assert (await client.post("/apple")).status_code == 201
        assert observer.names() == ["apple"]


@on_servers
async def test_a_connection_killed_in_the_handler(app: Shop, observer: Observer) -> None:
    """A statement on a lost connection is answered with 503, and the next request is fine."""

    @app.post("/<name>")
    async def add(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name=name))
        await session.flush()
        if name == "doomed":
            observer.kill(await connection_id(session))
            await session.scalars(select(Item))
        return text("stored", 201)

    async with serving(app) as client:
        response = await client.post("/doomed")
        assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
        await settled(app, observer)
        assert (await client.post("/apple")).status_code == 201
        assert observer.names() == ["apple"]


@on_postgresql
async def test_the_users_exception_handler_sees_a_commit_failure(
    app: Shop, observer: Observer
) -> None:
    """The error of a COMMIT is an exception like any other of the handler's."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        await doom(session, observer)
        return text("stored", 201)

    @app.exception(IntegrityError)
    async def conflict(request: Request, error: IntegrityError) -> HTTPResponse:
        return text("conflict", 409)

    async with serving(app) as client:
        response = await client.post("/")
        assert (response.status_code, response.text) == (409, "conflict")


async def test_a_constraint_broken_at_the_commit(app: Shop, observer: Observer) -> None:
    """What the COMMIT flushes may be refused, and the client gets the error."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        session.add(Item(name="apple"))
        return text("stored", 201)

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        assert observer.names() == []
        await settled(app, observer)
