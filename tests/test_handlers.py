"""What a handler did is committed before the answer, or not at all."""

import asyncio
import functools
import logging
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from sanic import HTTPResponse, Request, json, text
from sanic.exceptions import NotFound, SanicException
from sanic.response import BaseHTTPResponse
from sanic.views import HTTPMethodView
from sqlalchemy import select, update
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import (
    ConcurrentSessionUse,
    DatabaseUnavailable,
    SessionFinished,
    current_session,
    on_commit,
    transactional,
)
from tests.databases import on_postgresql, on_servers, on_sqlite
from tests.proxy import proxied
from tests.serving import serving
from tests.shop import (
    Item,
    Observer,
    Shop,
    SlowQuery,
    asgi_serving,
    checked_out,
    connection_id,
    doom,
    eventually,
    make_app,
    raw_client,
    settled,
    without_garbage_collector,
)


@pytest.fixture(autouse=True)
def _no_garbage_collector() -> Iterator[None]:
    with without_garbage_collector():
        yield


@pytest.fixture
def app(database_url: str) -> Shop:
    """An app with the shop's tables."""
    return make_app(database_url)


@pytest.fixture
def observer(database_url: str) -> Observer:
    """Another client of the app's database."""
    return Observer(database_url)


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Give what was logged as an error or worse."""
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


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


# --- the handler returns ---------------------------------------------------------------------


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


# --- the handler raises ----------------------------------------------------------------------


class OutOfStock(Exception):
    pass


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


# --- the COMMIT fails ------------------------------------------------------------------------


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


# --- the client leaves, the time is over -----------------------------------------------------


async def test_a_client_that_leaves_in_a_query(app: Shop, observer: Observer) -> None:
    """Nothing is stored and the connection is out of the pool no longer."""
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        await query.run(session)
        return text("stored")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await query.begun()
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


async def test_a_client_that_leaves_between_two_statements(app: Shop, observer: Observer) -> None:
    """What the handler did before is rolled back, and the connection stays good."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        reached.set()
        await asyncio.sleep(5)
        return text("stored")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 2)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


async def test_a_client_that_leaves_a_plain_session(app: Shop, observer: Observer) -> None:
    """A handler with a plain session that catches the cancellation stores nothing either."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: Session) -> HTTPResponse:
        session.add(Item(name="apple"))
        session.flush()
        reached.set()
        try:
            await asyncio.sleep(5)
        finally:
            session.add(Item(name="pear"))
        return text("stored")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 2)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


async def test_a_client_that_leaves_during_the_commit(
    database_url: str, observer: Observer
) -> None:
    """A COMMIT runs to its end, and its connection goes back to the pool."""
    async with proxied(database_url) as proxy:
        app = make_app(proxy.url)
        tasks: list[asyncio.Task[Any] | None] = []

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="apple"))
            await session.flush()
            await proxy.watch(session)
            proxy.hold_commits()
            tasks.append(asyncio.current_task())
            return text("stored")

        async with serving(app) as client, raw_client(client) as leaver:
            leaver.send("POST / HTTP/1.1\nContent-Length: 0")
            await proxy.held()
            leaver.leave()
            await eventually(lambda: tasks[0] is not None and tasks[0].cancelling())
            proxy.release()
            await settled(app, observer)
            assert observer.names() == ["apple"]
            assert app.ctx.db.pool_status()["idle"] == 1


@on_servers
async def test_a_commit_without_an_answer_is_given_up(
    database_url: str, observer: Observer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A COMMIT that hangs after its client has left holds its place for a bounded time."""
    monkeypatch.setattr("sanic_db_bp.engine.FINISH_WITHIN", 0.1)
    async with proxied(database_url) as proxy:
        app = make_app(proxy.url)

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="apple"))
            await session.flush()
            proxy.hold_commits()
            return text("stored")

        # asyncpg takes two seconds of its own to find the line dead.
        async with serving(app) as client, raw_client(client) as leaver:
            leaver.send("POST / HTTP/1.1\nContent-Length: 0")
            await proxy.held()
            leaver.leave()
            await settled(app, observer, within=4)
            proxy.release()


async def test_response_timeout_in_a_query(app: Shop, observer: Observer) -> None:
    """The client gets 503, nothing is stored, and the server works at the query no longer."""
    app.config.RESPONSE_TIMEOUT = 0.3
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        await query.run(session)
        return text("stored")

    async with serving(app) as client:
        response = await client.post("/")
        assert response.status_code == 503
        await settled(app, observer)
        if observer.kind != "sqlite":
            await eventually(lambda: observer.slow_queries() == 0)
        assert observer.names() == []


async def test_response_timeout_between_two_statements(app: Shop, observer: Observer) -> None:
    """The client gets 503 and nothing is stored."""
    app.config.RESPONSE_TIMEOUT = 0.2

    @app.post("/")
    async def add(request: Request, session: Session) -> HTTPResponse:
        session.add(Item(name="apple"))
        session.flush()
        await asyncio.sleep(5)
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 503
        await settled(app, observer)
        assert observer.names() == []


async def test_a_cancellation_that_the_handler_survives(app: Shop, observer: Observer) -> None:
    """A timeout of the handler's own round a query leaves the session usable."""
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        try:
            async with asyncio.timeout(0.1):
                await asyncio.sleep(5)
        except TimeoutError:
            session.add(Item(name="pear"))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple", "pear"]
        assert query is not None


# --- what comes before and after the handler -------------------------------------------------


async def use_session(request: Request, name: str = "middleware") -> None:
    """Use the session of a request as middleware does."""
    request.ctx.session.add(Item(name=name))
    await request.ctx.session.flush()


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


@pytest.mark.parametrize("path", ["/", "/fails"])
async def test_response_middleware_is_the_first_to_use_the_session(
    app: Shop, observer: Observer, path: str
) -> None:
    """Nothing is left behind where the handler itself has touched no session."""

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        await use_session(request, "after")

    @app.post("/")
    async def answer(request: Request) -> HTTPResponse:
        return text("ok")

    @app.post("/fails")
    async def fail(request: Request) -> HTTPResponse:
        raise OutOfStock

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send(f"POST {path} HTTP/1.1\nContent-Length: 0")
        status, _ = await stayer.answer()
        assert status == (200 if path == "/" else 500)
        await settled(app, observer, within=0.2)
        assert observer.names() == (["after"] if path == "/" else [])


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


# --- dependencies ----------------------------------------------------------------------------


class Buyer:
    def __init__(self, name: str) -> None:
        self.name = name


class Basket:
    def __init__(self, buyer: Buyer) -> None:
        self.buyer = buyer


async def get_buyer(request: Request, session: AsyncSession) -> Buyer:
    """Find the buyer, with a note of it."""
    session.add(Item(name="buyer"))
    await session.flush()
    return Buyer("Ann")


async def get_basket(request: Request, buyer: Buyer) -> Basket:
    """Refuse every basket."""
    raise OutOfStock(buyer.name)


async def test_a_dependency_shares_the_handlers_transaction(app: Shop, observer: Observer) -> None:
    """What a dependency did is committed, or rolled back, with the handler's work."""
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/<status:int>")
    async def buy(
        request: Request, status: int, buyer: Buyer, session: AsyncSession
    ) -> HTTPResponse:
        session.add(Item(name="handler"))
        return text(buyer.name, status)

    @app.post("/plain/<status:int>")
    async def buy_plain(request: Request, status: int, buyer: Buyer) -> HTTPResponse:
        return text(buyer.name, status)

    async with serving(app) as client:
        await client.post("/400")
        await client.post("/plain/400")
        assert observer.names() == []
        assert (await client.post("/200")).text == "Ann"
        assert observer.names() == ["buyer", "handler"]
        await settled(app, observer)


async def test_a_second_dependency_that_raises(app: Shop, observer: Observer) -> None:
    """What the first dependency did is rolled back, while the client's connection stays open."""
    app.ext.add_dependency(Buyer, get_buyer)
    app.ext.add_dependency(Basket, get_basket)

    @app.post("/")
    async def buy(
        request: Request, buyer: Buyer, basket: Basket, session: AsyncSession
    ) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert (await stayer.answer())[0] == 500
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_a_body_too_large(app: Shop, observer: Observer) -> None:
    """A dependency's work is rolled back when the body is refused after it."""
    app.config.REQUEST_MAX_SIZE = 100
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/")
    async def buy(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 200", b"x" * 200)
        assert (await stayer.answer())[0] == 413
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_a_body_that_is_cut_off(app: Shop, observer: Observer) -> None:
    """A dependency's work is rolled back when the client leaves within the body."""
    app.ext.add_dependency(Buyer, get_buyer)
    called = []

    @app.post("/")
    async def buy(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        called.append(request.body)
        return text("never")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 200", b"x" * 100)
        await eventually(lambda: checked_out(app) == 1, within=5)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []
        assert called == []


async def test_a_body_that_stops(app: Shop, observer: Observer) -> None:
    """A client that sends no more of its body holds the connection until REQUEST_TIMEOUT."""
    app.config.RESPONSE_TIMEOUT = 0.3
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/")
    async def buy(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 200", b"x" * 100)
        await eventually(lambda: checked_out(app) == 1, within=5)
        await settled(app, observer)
        assert observer.names() == []


# --- the session after its end, and in two tasks ---------------------------------------------


async def test_a_background_task_cannot_use_the_session(app: Shop, observer: Observer) -> None:
    """The error names the way to open another session, and nothing is reopened."""
    outcomes: list[BaseException] = []
    done = asyncio.Event()

    async def later(request: Request, session: AsyncSession, answered: asyncio.Event) -> None:
        await answered.wait()
        for use in (
            lambda: session.scalars(select(Item)),
            lambda: request.ctx.session.scalars(select(Item)),
            lambda: current_session(AsyncSession).scalars(select(Item)),
            lambda: session.commit(),
        ):
            try:
                await use()
            except SessionFinished as error:
                outcomes.append(error)
        try:
            session.add(Item(name="late"))
        except SessionFinished as error:
            outcomes.append(error)
        done.set()

    answered = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        app.add_task(later(request, session, answered))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        answered.set()
        await asyncio.wait_for(done.wait(), 2)
        assert len(outcomes) == 5
        assert all("async with app.ctx.db.session()" in str(error) for error in outcomes)
        assert observer.names() == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_a_background_task_that_is_the_first_to_use_the_session(app: Shop) -> None:
    """A task that outlives its request gets no session of it, even if the request used none."""
    outcomes: list[BaseException] = []
    answered, done = asyncio.Event(), asyncio.Event()

    async def later(request: Request) -> None:
        await answered.wait()
        for find in (lambda: request.ctx.session, lambda: current_session(AsyncSession)):
            try:
                await find().scalars(select(Item))
            except SessionFinished as error:
                outcomes.append(error)
        done.set()

    @app.post("/")
    async def answer(request: Request) -> HTTPResponse:
        app.add_task(later(request))
        return text("ok")

    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        answered.set()
        await asyncio.wait_for(done.wait(), 2)
        assert len(outcomes) == 2
        assert checked_out(app) == 0


async def test_two_tasks_at_once(app: Shop, observer: Observer) -> None:
    """Using one session in two tasks at once is a clear error, and the request ends clean."""
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        slow = asyncio.create_task(query.run(session))
        await query.begun()
        with pytest.raises(ConcurrentSessionUse, match=r"async with app\.ctx\.db\.session\(\)"):
            await session.scalars(select(Item))
        slow.cancel()
        await asyncio.wait({slow})
        return text("refused", 400)

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 400
        await settled(app, observer)
        assert observer.names() == []


async def test_gather_on_one_session(app: Shop, observer: Observer) -> None:
    """A gather of two queries fails with the clear error, and nothing of the request is kept."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        await asyncio.gather(session.scalars(select(Item)), session.scalars(select(Item)))
        return text("stored")

    @app.exception(ConcurrentSessionUse)
    async def explain(request: Request, error: ConcurrentSessionUse) -> HTTPResponse:
        return text(str(error), 500)

    async with serving(app) as client:
        response = await client.post("/")
        assert response.status_code == 500
        assert "at the same time" in response.text
        await settled(app, observer)
        assert observer.names() == []


async def test_a_task_that_still_uses_the_session_at_the_end(app: Shop, observer: Observer) -> None:
    """A handler that returns while its task is in a query gets the error in place of success."""
    query = SlowQuery(observer)
    tasks = []

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        tasks.append(asyncio.create_task(query.run(session)))
        await query.begun()
        asyncio.get_running_loop().call_later(0.2, tasks[0].cancel)
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        await settled(app, observer)
        assert observer.names() == []
        assert tasks[0].cancelled()


async def test_wait_for(app: Shop, observer: Observer) -> None:
    """A query inside asyncio.wait_for, a task of its own on Python 3.11, works."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await asyncio.wait_for(session.flush(), 2)
        found = await asyncio.wait_for(session.scalars(select(Item.name)), 2)
        return json(list(found))

    async with serving(app) as client:
        assert (await client.post("/")).json() == ["apple"]
        assert observer.names() == ["apple"]


# --- @transactional --------------------------------------------------------------------------


async def test_commit_false_rolls_back(app: Shop, observer: Observer) -> None:
    """With commit=False only what the handler commits itself is stored."""

    @app.post("/")
    @transactional(commit=False)
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="kept"))
        await session.commit()
        session.add(Item(name="dropped"))
        await session.flush()
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["kept"]
        await settled(app, observer)


@on_postgresql
async def test_commit_manual(database_url: str, observer: Observer) -> None:
    """Where COMMIT is manual a handler commits itself, or says that it wants a commit."""
    app = make_app(database_url, commit="manual")

    @app.post("/forgotten")
    async def forgotten(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="forgotten"))
        return text("ok")

    @app.post("/manual")
    async def manual(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="manual"))
        await session.commit()
        return text("ok")

    @app.post("/wanted")
    @transactional(commit=True)
    async def wanted(request: Request, session: Session) -> HTTPResponse:
        session.add(Item(name="wanted"))
        return text("ok")

    async with serving(app) as client:
        for path in ("/forgotten", "/manual", "/wanted"):
            assert (await client.post(path)).status_code == 200
        assert observer.names() == ["manual", "wanted"]
        await settled(app, observer)


ISOLATION_QUERY = {"postgresql": "SHOW transaction_isolation", "mysql": "SELECT @@tx_isolation"}


@on_servers
async def test_isolation(app: Shop, observer: Observer) -> None:
    """A handler has the isolation level it asks for, and the next has the usual one again."""
    asked = ISOLATION_QUERY[observer.kind]

    @app.get("/usual")
    async def usual(request: Request, session: AsyncSession) -> HTTPResponse:
        return text(str(await session.scalar(sql(asked))))

    @app.get("/serializable")
    @transactional(isolation="SERIALIZABLE")
    async def serializable(request: Request, session: Session) -> HTTPResponse:
        return text(str(session.scalar(sql(asked))))

    async with serving(app) as client:
        before = (await client.get("/usual")).text
        assert (await client.get("/serializable")).text.upper() == "SERIALIZABLE"
        assert (await client.get("/usual")).text == before != "SERIALIZABLE"


@on_sqlite
async def test_isolation_of_a_file(app: Shop) -> None:
    """SQLite is always serializable, and may be asked for it."""

    @app.get("/")
    @transactional(isolation="SERIALIZABLE")
    async def serializable(request: Request, session: Session) -> HTTPResponse:
        return json(list(session.scalars(select(Item.name))))

    async with serving(app) as client:
        assert (await client.get("/")).json() == []


class Rival:
    """Makes a handler's transaction fail because of another, so often."""

    def __init__(self, observer: Observer, times: int = 1) -> None:
        self._observer = observer
        self.times = times
        self.isolation = "REPEATABLE READ" if observer.kind != "sqlite" else "SERIALIZABLE"

    async def race(self, session: AsyncSession) -> None:
        """Sell an apple; raises while the rival wins."""
        wins = self.times > 0
        self.times -= wins
        sell = update(Item).where(Item.name == "apple").values(stock=Item.stock - 1)
        match self._observer.kind:
            case "postgresql":
                await session.scalars(select(Item.stock))
                if wins:
                    self._observer.run("UPDATE item SET stock = stock - 10 WHERE name = 'apple'")
                await session.execute(sell)
            case "mysql":
                await session.execute(sql("SET innodb_lock_wait_timeout = 0"))
                with self._observer.transaction() as rival:
                    if wins:
                        rival.execute(sell)
                    await session.execute(sell)
            case _:
                if wins:
                    with self._observer.transaction():
                        await session.execute(sell)
                await session.execute(sell)


def racing_app(database_url: str) -> Shop:
    """Make an app that does not wait long for a lock."""
    sqlite = database_url.startswith("sqlite")
    return make_app(database_url, connect_args={"timeout": 0.05} if sqlite else {})


async def stock_apples(app: Shop) -> None:
    """Store some apples."""
    async with app.ctx.db.session() as session:
        session.add(Item(name="apple", stock=100))


async def test_retries_after_a_lost_race(database_url: str, observer: Observer) -> None:
    """The handler runs again with a clean session, and what it did before is gone."""
    app = racing_app(database_url)
    rival = Rival(observer, times=2)
    runs: list[tuple[AsyncSession, int]] = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append((session, len(session.new)))
        session.add(Item(name=f"sale {len(runs)}"))
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        response = await client.post("/")
        assert (response.status_code, response.text) == (200, "sold")
        assert observer.names() == ["apple", "sale 3"]
        assert [new for _, new in runs] == [0, 0, 0]
        assert len({id(session) for session, _ in runs}) == 3
        await settled(app, observer)


async def test_retries_are_given_up(database_url: str, observer: Observer) -> None:
    """After the last run the client gets the error."""
    app = racing_app(database_url)
    rival = Rival(observer, times=10)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 3
        await settled(app, observer)


async def test_a_plain_session_retries_too(database_url: str, observer: Observer) -> None:
    """A handler that asks for a plain session, and is no coroutine, runs again as well."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs: list[Session] = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(request: Request, session: Session) -> HTTPResponse:
        runs.append(session)
        await rival.race(current_session(AsyncSession))
        session.add(Item(name="sale"))
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 200
        assert len(runs) == 2
        assert runs[0] is not runs[1]
        assert observer.names() == ["apple", "sale"]


async def test_without_retries_a_lost_race_is_an_error(
    database_url: str, observer: Observer
) -> None:
    """A handler that does not ask for it runs once."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        await settled(app, observer)


@on_postgresql
async def test_another_error_is_not_retried(app: Shop, observer: Observer) -> None:
    """A broken constraint would break again, so the handler runs once."""
    runs = []

    @app.post("/")
    @transactional(retries=3)
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        session.add_all([Item(name="apple"), Item(name="apple")])
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        await settled(app, observer)


@on_servers
async def test_dependencies_are_done_again(database_url: str, observer: Observer) -> None:
    """What a dependency did in the transaction that was rolled back is done again."""
    app = racing_app(database_url)
    rival = Rival(observer)
    app.ext.add_dependency(Buyer, get_buyer)
    buyers = []

    @app.post("/<name>")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(
        request: Request, name: str, buyer: Buyer, session: AsyncSession
    ) -> HTTPResponse:
        buyers.append(buyer)
        await rival.race(session)
        return text(f"{name} sold to {buyer.name}")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/apple")).text == "apple sold to Ann"
        assert len(buyers) == 2
        assert buyers[0] is not buyers[1]
        assert observer.names() == ["apple", "buyer"]


@on_servers
async def test_a_dependency_that_fails_in_another_run(
    database_url: str, observer: Observer
) -> None:
    """The client gets the dependency's error, and nothing is left behind."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs: list[AsyncSession] = []

    async def get_buyer_once(request: Request, session: AsyncSession) -> Buyer:
        runs.append(session)
        buyer = await get_buyer(request, session)
        if len(runs) == 2:
            raise OutOfStock
        return buyer

    app.ext.add_dependency(Buyer, get_buyer_once)

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        await rival.race(session)
        return text("sold")

    async with serving(app) as client, raw_client(client) as stayer:
        await stock_apples(app)
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert (await stayer.answer())[0] == 500
        await settled(app, observer, within=0.2)
        assert len(runs) == 2
        assert observer.names() == ["apple"]


@on_postgresql
async def test_a_dependency_that_fails_for_head(app: Shop, observer: Observer) -> None:
    """The HEAD of a class-based view leaves nothing behind if a dependency of it fails."""

    async def refuse(request: Request, session: AsyncSession) -> Buyer:
        await get_buyer(request, session)
        raise OutOfStock

    app.ext.add_dependency(Buyer, refuse)

    class Shelf(HTTPMethodView):
        async def get(self, request: Request, buyer: Buyer) -> HTTPResponse:
            return text(buyer.name)

    app.add_route(Shelf.as_view(), "/")
    async with serving(app) as client:
        assert (await client.head("/")).status_code == 500
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_no_retry_once_a_byte_was_sent(database_url: str, observer: Observer) -> None:
    """A handler that has begun its answer never runs again."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=3)
    async def sell(request: Request, session: AsyncSession) -> None:
        runs.append(session)
        response = await request.respond()
        await response.send("selling")
        await rival.race(session)

    async with serving(app) as client, raw_client(client) as reader:
        await stock_apples(app)
        reader.send("POST / HTTP/1.1\nContent-Length: 0")
        received = await asyncio.wait_for(reader.reader.read(), 5)
        assert b"selling" in received
        assert not received.endswith(b"0\r\n\r\n")
        assert len(runs) == 1
        await settled(app, observer)


async def test_no_retry_after_a_commit_of_the_handler(
    database_url: str, observer: Observer
) -> None:
    """A handler that has committed in between never runs again, as that would do it twice."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=3)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        session.add(Item(name="half"))
        await session.commit()
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        assert observer.names() == ["apple", "half"]
        await settled(app, observer)


@on_servers
async def test_no_retry_if_middleware_took_part(database_url: str, observer: Observer) -> None:
    """What middleware did in the transaction cannot be done again, so the handler runs once."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.on_request
    async def before(request: Request) -> None:
        await use_session(request)

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=3)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        assert observer.names() == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_a_serialization_failure_at_the_commit(app: Shop, observer: Observer) -> None:
    """A COMMIT that finds a serialization failure makes the handler run again."""
    runs = []

    @app.post("/")
    @transactional(isolation="SERIALIZABLE", retries=1)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await session.scalars(select(Item))
        session.add(Item(name=f"sale {len(runs)}"))
        await session.flush()
        if len(runs) == 1:
            # Each has read what the other writes: they cannot both be first.
            with observer.transaction("SERIALIZABLE") as other:
                other.execute(select(Item)).all()
                other.exec_driver_sql("INSERT INTO item (name, stock) VALUES ('rival', 0)")
                other.commit()
        return text("sold")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert len(runs) == 2
        assert observer.names() == ["rival", "sale 2"]
        await settled(app, observer)


@on_servers
async def test_a_deadlock_is_retried(app: Shop, observer: Observer) -> None:
    """The victim of a deadlock runs again."""
    runs = []

    def rival(locked: Callable[[], object], go_on: Callable[[], object]) -> None:
        with observer.transaction() as other:
            # MariaDB takes the transaction that has changed less for its victim.
            for number in range(5):
                other.exec_driver_sql(
                    f"INSERT INTO item (name, stock) VALUES ('rival {number}', 0)"
                )
            other.exec_driver_sql("UPDATE item SET stock = 1 WHERE name = 'pear'")
            locked()
            other.exec_driver_sql("UPDATE item SET stock = 1 WHERE name = 'apple'")
            go_on()

    async def stock(session: AsyncSession, name: str) -> None:
        await session.execute(update(Item).where(Item.name == name).values(stock=2))

    async def collide(session: AsyncSession) -> None:
        loop = asyncio.get_running_loop()
        locked = asyncio.Event()
        if observer.kind == "postgresql":
            await session.execute(sql("SET LOCAL deadlock_timeout = '100ms'"))
        await stock(session, "apple")
        other = asyncio.create_task(
            asyncio.to_thread(rival, lambda: loop.call_soon_threadsafe(locked.set), lambda: None)
        )
        try:
            await locked.wait()
            await stock(session, "pear")
        finally:
            rivals.append(other)

    rivals: list[asyncio.Task[None]] = []

    @app.post("/")
    @transactional(retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        if len(runs) == 1:
            await collide(session)
        await stock(session, "apple")
        await stock(session, "pear")
        return text("sold")

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add_all([Item(name="apple"), Item(name="pear")])
        assert (await client.post("/")).status_code == 200
        await asyncio.gather(*rivals)
        assert len(runs) == 2
        await settled(app, observer)


@on_postgresql
async def test_a_view_retries_by_method(database_url: str, observer: Observer) -> None:
    """Each method of a class-based view has a transaction of its own kind."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs: list[AsyncSession] = []

    class Shelf(HTTPMethodView):
        @transactional(isolation=rival.isolation, retries=1)
        async def post(self, request: Request, session: AsyncSession) -> HTTPResponse:
            runs.append(session)
            await rival.race(session)
            session.add(Item(name="sale"))
            return text("sold")

        @transactional(commit=False)
        async def put(self, request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="dropped"))
            await session.flush()
            return text("dropped")

    app.add_route(Shelf.as_view(), "/")
    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 200
        assert (await client.put("/")).status_code == 200
        assert len(runs) == 2
        assert observer.names() == ["apple", "sale"]
        await settled(app, observer)


@on_postgresql
async def test_no_retry_of_a_body_that_was_read_in_pieces(
    database_url: str, observer: Observer
) -> None:
    """A body that the handler has taken off the connection is not there a second time."""
    app = racing_app(database_url)
    rival = Rival(observer)
    sizes: list[int] = []

    @app.post("/", stream=True)
    @transactional(isolation=rival.isolation, retries=3)
    async def receive(request: Request, session: AsyncSession) -> HTTPResponse:
        stream: Any = request.stream
        sizes.append(sum([len(piece) async for piece in stream]))
        await rival.race(session)
        return text(str(sizes[-1]))

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/", content=b"x" * 10)).status_code == 500
        assert sizes == [10]
        await settled(app, observer)


@on_postgresql
async def test_isolation_holds_for_what_comes_before_the_handler(app: Shop) -> None:
    """Middleware and dependencies that use the session first have the handler's isolation."""
    levels: list[str] = []

    @app.on_request
    async def before(request: Request) -> None:
        asked = sql(ISOLATION_QUERY["postgresql"])
        levels.append(str(await request.ctx.session.scalar(asked)))

    @app.get("/")
    @transactional(isolation="SERIALIZABLE")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("ok")

    @app.get("/unmarked")
    async def unmarked(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("ok")

    async with serving(app) as client:
        await client.get("/")
        await client.get("/unmarked")
        assert levels == ["serializable", "read committed"]


# --- on_commit -------------------------------------------------------------------------------


async def test_on_commit_runs_after_the_commit(app: Shop, observer: Observer) -> None:
    """A callback sees the row, before the answer is sent; after a rollback there is no call."""
    calls: list[Any] = []

    async def call() -> None:
        calls.append((observer.names(), checked_out(app)))

    @app.post("/<status:int>")
    async def add(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        on_commit(call)
        on_commit(lambda: calls.append("plain"))
        session.add(Item(name="apple"))
        await session.flush()
        return text("answered", status)

    async with serving(app) as client:
        await client.post("/400")
        assert calls == []
        await client.post("/200")
        assert calls == [(["apple"], 0), "plain"]


async def test_on_commit_is_forgotten_when_the_commit_fails(app: Shop, observer: Observer) -> None:
    """A callback is not called if the transaction was not stored."""
    calls: list[int] = []

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        on_commit(lambda: calls.append(1))
        await doom(session, observer)
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code >= 500
        assert calls == []


async def test_on_commit_runs_once_after_retries(database_url: str, observer: Observer) -> None:
    """A callback of a run that was rolled back is forgotten."""
    app = racing_app(database_url)
    rival = Rival(observer, times=2)
    calls: list[int] = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        on_commit(lambda: calls.append(1))
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 200
        assert calls == [1]


@on_postgresql
async def test_an_error_in_on_commit_changes_nothing(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The client still reads of the success, and the error is logged."""

    def fail() -> None:
        raise ValueError("no mail")

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        on_commit(fail)
        session.add(Item(name="apple"))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple"]
        [line] = errors(caplog)
        assert "on_commit" in line.getMessage()
        assert line.exc_info is not None


# --- the database is busy or away ------------------------------------------------------------


async def test_an_exhausted_pool_is_answered_with_503(
    database_url: str, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that gets no connection in time is told to come again, in one line of the log."""
    app = make_app(database_url, pool_size=1, pool_timeout=0.1)
    release = asyncio.Event()
    reached = asyncio.Event()

    @app.post("/hold")
    async def hold(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        reached.set()
        await release.wait()
        return text("stored")

    @app.get("/")
    async def names(request: Request, session: AsyncSession) -> HTTPResponse:
        return json(list(await session.scalars(select(Item.name))))

    async with serving(app) as client:
        holder = asyncio.create_task(client.post("/hold"))
        await reached.wait()
        response = await client.get("/")
        assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
        [line] = errors(caplog)
        assert "POOL_TIMEOUT" in line.getMessage()
        assert "GET /" in line.getMessage()
        assert line.exc_info is None
        release.set()
        assert (await holder).status_code == 200
        assert (await client.get("/")).json() == ["apple"]
        await settled(app, observer)


@pytest.fixture
def secret_url(database_url: str) -> Iterator[str]:
    """The URL of the database with a password."""
    root = Observer(database_url)
    if root.kind == "postgresql":
        yield database_url.replace("postgres@", "postgres:s3cret-word@")
        return
    user = "shop_" + database_url.rpartition("/")[2][-16:]
    root.run(f"CREATE USER {user}@'%%' IDENTIFIED BY 's3cret-word'")
    root.run(f"GRANT ALL ON *.* TO {user}@'%%'")
    yield database_url.replace("root@", f"{user}:s3cret-word@")
    root.run(f"DROP USER {user}@'%%'")


@on_servers
async def test_a_database_that_is_away_is_answered_with_503(
    secret_url: str,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line a request, no credentials in any output, and all is well once it is back."""
    async with proxied(secret_url) as proxy:
        app = make_app(proxy.url)

        @app.post("/<name>")
        async def add(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name=name))
            return text("stored")

        @app.get("/")
        async def names(request: Request, session: Session) -> HTTPResponse:
            return json(list(session.scalars(select(Item.name))))

        async with serving(app) as client:
            assert (await client.post("/apple")).status_code == 200
            await proxy.down()
            answers = []
            for _ in range(3):
                caplog.clear()
                answer = await client.get("/")
                assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1")
                assert len(errors(caplog)) == 1
                assert errors(caplog)[0].exc_info is None
                answers.append(answer.text + caplog.text)
            answers.append((await client.post("/pear")).text + caplog.text)
            assert "s3cret-word" not in "".join(answers)
            await proxy.up()
            assert (await client.post("/plum")).status_code == 200
            assert observer.names() == ["apple", "plum"]
            await settled(app, observer)
    shown = capfd.readouterr()
    assert "s3cret-word" not in shown.out + shown.err


@on_servers
async def test_a_database_that_goes_away_before_the_commit(
    database_url: str, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets an error, and one line tells."""
    async with proxied(database_url) as proxy:
        app = make_app(proxy.url)

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="apple"))
            await session.flush()
            await proxy.down()
            return text("stored")

        async with serving(app) as client:
            assert (await client.post("/")).status_code >= 500
            assert len(errors(caplog)) == 1
            await settled(app, observer)
            assert observer.names() == []


@on_postgresql
async def test_an_exhausted_pool_in_a_dependency(database_url: str, observer: Observer) -> None:
    """A dependency that gets no connection is answered with 503 as well."""
    app = make_app(database_url, pool_size=1, pool_timeout=0.1)
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/")
    async def buy(request: Request, buyer: Buyer) -> HTTPResponse:
        return text(buyer.name)

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            await session.scalars(select(Item))
            response = await client.post("/")
            assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
        assert (await client.post("/")).text == "Ann"
        await settled(app, observer)


@on_postgresql
async def test_the_users_answer_to_an_unavailable_database(database_url: str) -> None:
    """An exception handler of the app for it wins over this package's own."""
    app = make_app(database_url, pool_size=1, pool_timeout=0.1)

    @app.get("/")
    async def names(request: Request, session: AsyncSession) -> HTTPResponse:
        return json(list(await session.scalars(select(Item.name))))

    @app.exception(DatabaseUnavailable)
    async def busy(request: Request, error: DatabaseUnavailable) -> HTTPResponse:
        return text(f"{error.database} is busy", 429)

    async with serving(app) as client, app.ctx.db.session() as session:
        await session.scalars(select(Item))
        response = await client.get("/")
        assert (response.status_code, response.text) == (429, "db is busy")


async def test_a_shutdown_rolls_back(app: Shop, observer: Observer) -> None:
    """A server that stops within a handler stores nothing of it and leaves no connection."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="half"))
        await session.flush()
        reached.set()
        await asyncio.sleep(5)
        return text("stored")

    async with serving(app, grace=0.1) as client, raw_client(client) as waiting:
        waiting.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 5)
    assert observer.names() == []
    assert observer.open_transactions() == 0


# --- handlers of every kind ------------------------------------------------------------------


def _plain(request: Request, status: int, session: Session) -> HTTPResponse:
    session.add(Item(name="apple"))
    session.flush()
    if status == 500:
        raise OutOfStock
    return text("answered", status)


async def _coroutine(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
    session.add(Item(name="apple"))
    await session.flush()
    if status == 500:
        raise OutOfStock
    return text("answered", status)


async def _coroutine_with_plain(request: Request, status: int, session: Session) -> HTTPResponse:
    return _plain(request, status, session)


async def _on_request(request: Request, status: int) -> HTTPResponse:
    return await _coroutine(request, status, request.ctx.session)


def _plain_on_current(request: Request, status: int) -> Awaitable[HTTPResponse]:
    return _on_request(request, status)


class _View(HTTPMethodView):
    def post(self, request: Request, status: int, session: Session) -> HTTPResponse:
        return _plain(request, status, session)

    async def put(self, request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        return await _coroutine(request, status, session)


class _Shelf:
    async def method(self, request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        return await _coroutine(request, status, session)

    def plain_method(self, request: Request, status: int, session: Session) -> HTTPResponse:
        return _plain(request, status, session)


class _Callable:
    __name__ = "callable_object"

    async def __call__(self, request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        return await _coroutine(request, status, session)


def _with_extra(request: Request, status: int, session: Session, extra: str) -> HTTPResponse:
    assert extra == "extra"
    return _plain(request, status, session)


def _decorated(handler: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(handler)
    async def around(*args: Any, **kwargs: Any) -> Any:
        return await handler(*args, **kwargs)

    return around


KINDS: dict[str, Any] = {
    "plain": _plain,
    "coroutine": _coroutine,
    "coroutine_with_plain": _coroutine_with_plain,
    "on_request": _on_request,
    "plain_on_request": _plain_on_current,
    "view": _View.as_view(),
    "partial": functools.partial(_with_extra, extra="extra"),
    "bound_method": _Shelf().method,
    "plain_bound_method": _Shelf().plain_method,
    "callable": _Callable(),
    "decorated": _decorated(_coroutine),
}


@pytest.mark.parametrize("kind", KINDS)
@on_postgresql
async def test_handlers_of_every_kind(app: Shop, observer: Observer, kind: str) -> None:
    """Whatever a handler is, it commits on success and rolls back on an error."""
    app.add_route(KINDS[kind], "/<status:int>", methods=["POST", "PUT"], name=kind)
    async with serving(app) as client:
        assert (await client.post("/500")).status_code == 500
        assert (await client.post("/400")).status_code == 400
        assert observer.names() == []
        assert (await client.put("/201")).status_code == 201
        assert observer.names() == ["apple"]
        await settled(app, observer)


# --- under ASGI ------------------------------------------------------------------------------


async def test_asgi_commits_before_the_first_message(app: Shop, observer: Observer) -> None:
    """Under an ASGI server too the row is stored when the answer begins."""
    seen: list[Any] = []

    @app.post("/<status:int>")
    async def add(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name=f"apple {status}"))
        await session.flush()
        return text("stored", status)

    async def look(message: dict[str, Any]) -> None:
        seen.append((observer.names(), checked_out(app)))

    async with asgi_serving(app) as server:
        assert (await server.request("POST", "/500")).status == 500
        assert observer.names() == []
        assert (await server.request("POST", "/200", send=look)).status == 200
        assert seen[0] == (["apple 200"], 0)


async def test_asgi_commit_failure_reaches_the_client(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """Under an ASGI server too a failed COMMIT is an error for the client."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        await doom(session, observer)
        return text("stored")

    async with asgi_serving(app) as server:
        answer = await server.request("POST", "/")
        assert answer.status >= 500
        assert len(errors(caplog)) == 1
        await settled(app, observer)


@pytest.mark.parametrize("asks", [True, False])
@on_postgresql
async def test_asgi_client_that_leaves_within_the_body(
    app: Shop, observer: Observer, asks: bool
) -> None:
    """A truncated body never leads to a commit, though Sanic runs the handler with it."""
    bodies: list[bytes] = []

    if asks:

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            bodies.append(request.body)
            session.add(Item(name="half"))
            await session.flush()
            return text("stored")
    else:

        @app.post("/")
        async def note(request: Request) -> HTTPResponse:
            bodies.append(request.body)
            await use_session(request, "half")
            return text("stored")

    async with asgi_serving(app) as server:
        answer = await server.request(
            "POST",
            "/",
            {"type": "http.request", "body": b"half", "more_body": True},
            headers={"content-length": "8"},
        )
        assert answer.status != 200
        assert observer.names() == []
        await settled(app, observer)
        answer = await server.request(
            "POST",
            "/",
            {"type": "http.request", "body": b"whole b", "more_body": True},
            {"type": "http.request", "body": b"y", "more_body": False},
            headers={"content-length": "8"},
        )
        assert answer.status == 200
        assert observer.names() == ["half"]


@on_postgresql
async def test_asgi_client_that_leaves_within_a_chunked_body(app: Shop, observer: Observer) -> None:
    """A body of unknown length that is cut off never leads to a commit either."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="half"))
        await session.flush()
        return text("stored")

    async with asgi_serving(app) as server:
        answer = await server.request(
            "POST",
            "/",
            {"type": "http.request", "body": b"half", "more_body": True},
            headers={"transfer-encoding": "chunked"},
        )
        assert answer.status != 200
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_asgi_middleware_that_answers_first(app: Shop, observer: Observer) -> None:
    """Under an ASGI server too the work of such middleware is rolled back."""

    @app.on_request
    async def guard(request: Request) -> HTTPResponse:
        await use_session(request)
        return text("stop")

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with asgi_serving(app) as server:
        assert (await server.request("POST", "/")).body == b"stop"
        await settled(app, observer, within=0.2)
        assert observer.names() == []


@on_postgresql
async def test_asgi_request_that_is_cancelled(app: Shop, observer: Observer) -> None:
    """An ASGI server that cancels a request leaves nothing behind."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="half"))
        await session.flush()
        reached.set()
        await asyncio.sleep(5)
        return text("stored")

    async with asgi_serving(app) as server:
        running = asyncio.create_task(server.request("POST", "/"))
        await asyncio.wait_for(reached.wait(), 2)
        running.cancel()
        await asyncio.wait({running})
        await settled(app, observer)
        assert observer.names() == []


@on_postgresql
@pytest.mark.parametrize("asks", [True, False])
async def test_asgi_request_that_is_cancelled_in_response_middleware(
    app: Shop, observer: Observer, asks: bool
) -> None:
    """What the handler did stays; the session of the middleware is ended though nobody answers."""
    reached = asyncio.Event()
    # Kept alive, or Python would end the session with it.
    kept: list[Request] = []

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        await use_session(request, "after")
        kept.append(request)
        reached.set()
        await asyncio.sleep(5)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="handler"))
        return text("stored")

    @app.get("/")
    async def answer(request: Request) -> HTTPResponse:
        return text("ok")

    async with asgi_serving(app) as server:
        running = asyncio.create_task(server.request("POST" if asks else "GET", "/"))
        await asyncio.wait_for(reached.wait(), 2)
        running.cancel()
        await asyncio.wait({running})
        await settled(app, observer)
        assert observer.names() == (["handler"] if asks else [])
