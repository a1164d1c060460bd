"""A streaming handler's session lives to the end of the stream, and its COMMIT comes before it."""

import asyncio
from typing import Any

import httpx
import pytest
from sanic import HTTPResponse, Request, text
from sanic.response import BaseHTTPResponse, ResponseStream
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import SessionFinished, on_commit, transactional
from tests.databases import on_postgresql
from tests.handlers.streams import Write, add_stream, respond, return_stream
from tests.serving import serving
from tests.shop import (
    Item,
    Observer,
    Shop,
    SlowQuery,
    checked_out,
    doom,
    errors,
    raw_client,
    settled,
)


async def succeeds(client: httpx.AsyncClient, path: str) -> bool:
    """Tell whether a client takes the answer for a success."""
    try:
        return (await client.post(path)).is_success
    except httpx.RemoteProtocolError:
        return False


async def test_the_session_lives_to_the_end(app: Shop, observer: Observer, way: Any) -> None:
    """One transaction lasts for the whole stream and is committed before its last chunk."""
    seen: list[Any] = []

    async def work(session: AsyncSession, write: Write) -> None:
        for name in ("apple", "pear"):
            session.add(Item(name=name))
            await session.flush()
            await write(name)
            seen.append((observer.names(), checked_out(app)))

    add_stream(app, way, work)
    async with serving(app) as client:
        async with client.stream("POST", "/") as response:
            body = b"".join([chunk async for chunk in response.aiter_raw()])
            assert observer.names() == ["apple", "pear"]
            assert checked_out(app) == 0
        assert (response.status_code, body) == (200, b"applepear")
        assert seen == [([], 1), ([], 1)]
        await settled(app, observer)


@on_postgresql
async def test_two_streams_on_one_connection(app: Shop, observer: Observer, way: Any) -> None:
    """A connection of a client stays usable after a stream."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name=f"item {len(observer.names())}"))
        await write("ok")

    add_stream(app, way, work)
    async with serving(app) as client:
        for _ in range(3):
            assert (await client.post("/")).text == "ok"
        assert len(observer.names()) == 3
        assert checked_out(app) == 0


@on_postgresql
async def test_a_plain_session_in_a_stream(app: Shop, observer: Observer) -> None:
    """A stream may use a plain session between its chunks."""

    @app.post("/respond")
    async def respond(request: Request, session: Session) -> None:
        response = await request.respond()
        for name in session.scalars(select(Item.name)):
            await response.send(name + " ")
        session.add(Item(name="apple"))
        await response.eof()

    @app.post("/return")
    async def return_stream(request: Request, session: Session) -> ResponseStream:
        async def stream(response: Any) -> None:
            for name in session.scalars(select(Item.name)):
                await response.write(name + " ")
            session.add(Item(name="pear"))

        return ResponseStream(stream)

    async with serving(app) as client:
        assert (await client.post("/respond")).text == ""
        assert (await client.post("/return")).text == "apple "
        assert observer.names() == ["apple", "pear"]
        await settled(app, observer)


@on_postgresql
async def test_a_stream_over_the_session_of_the_request(
    app: Shop, observer: Observer, way: Any
) -> None:
    """A handler that asks for nothing and uses request.ctx.session streams alike."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("ok")

    @app.post("/")
    async def stream(request: Request) -> Any:
        return await way(request, request.ctx.session, work, 200)

    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        assert observer.names() == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_commit_failure_over_the_session_of_the_request(
    app: Shop, observer: Observer, way: Any
) -> None:
    """The body ends too early for a handler that uses request.ctx.session too."""

    async def work(session: AsyncSession, write: Write) -> None:
        await write("begun")
        await doom(session, observer)

    @app.post("/")
    async def stream(request: Request) -> Any:
        return await way(request, request.ctx.session, work, 200)

    async with serving(app) as client:
        assert not await succeeds(client, "/")
        await settled(app, observer)


@on_postgresql
@pytest.mark.parametrize("fails", [False, True])
async def test_a_stream_without_a_session(app: Shop, way: Any, fails: bool) -> None:
    """A stream that touches no database ends as in Sanic, which completes a failed one too."""

    async def work(session: AsyncSession, write: Write) -> None:
        await write("ok")
        if fails:
            raise ValueError("broken")

    @app.post("/")
    async def stream(request: Request) -> Any:
        return await way(request, None, work, 200)

    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"


@on_postgresql
async def test_a_stream_that_first_uses_the_session_on_its_way(
    app: Shop, observer: Observer
) -> None:
    """A stream may come to the session of the request when it has begun."""

    @app.post("/respond/<end:int>")
    async def respond(request: Request, end: int) -> None:
        response = await request.respond()
        await response.send("first")
        request.ctx.session.add(Item(name=f"apple {end}"))
        await request.ctx.session.flush()
        if end:
            await response.eof()

    @app.post("/return")
    async def return_stream(request: Request) -> ResponseStream:
        async def stream(response: Any) -> None:
            await response.write("first")
            request.ctx.session.add(Item(name="pear"))
            await request.ctx.session.flush()

        return ResponseStream(stream)

    async with serving(app) as client:
        for path in ("/respond/0", "/respond/1", "/return"):
            assert (await client.post(path)).text == "first"
            await settled(app, observer)
        assert observer.names() == ["apple 0", "apple 1", "pear"]


@on_postgresql
async def test_a_bad_status_rolls_back(app: Shop, observer: Observer, way: Any) -> None:
    """A stream with a status of 400 or more stores nothing."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("no")

    add_stream(app, way, work, 409)
    async with serving(app) as client:
        response = await client.post("/")
        assert (response.status_code, response.text) == (409, "no")
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_a_failure_within_the_stream(app: Shop, observer: Observer, way: Any) -> None:
    """The body visibly ends too early, and nothing is stored."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("begun")
        raise ValueError("broken")

    add_stream(app, way, work)
    async with serving(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/")
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_a_failure_before_the_first_chunk(app: Shop, observer: Observer, way: Any) -> None:
    """A stream that fails before it has sent anything never looks like a success."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        raise ValueError("broken")

    add_stream(app, way, work)
    async with serving(app) as client:
        assert not await succeeds(client, "/")
        assert observer.names() == []
        await settled(app, observer)


async def test_commit_failure_at_the_end(
    app: Shop, observer: Observer, way: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """The last chunk is not sent, one line is logged, and the next stream is fine."""
    doomed = True

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("begun")
        if doomed:
            await doom(session, observer)

    add_stream(app, way, work)
    async with serving(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/")
        assert observer.names() == []
        await settled(app, observer)
        [line] = errors(caplog)
        assert "POST /" in line.getMessage()
        assert "COMMIT failed" in line.getMessage()
        assert line.exc_info is None
        doomed = False
        assert (await client.post("/")).text == "begun"
        assert observer.names() == ["apple"]


@on_postgresql
async def test_commit_failure_before_the_first_chunk(
    app: Shop, observer: Observer, way: Any
) -> None:
    """A stream that sends nothing and cannot be committed never looks like a success."""

    async def work(session: AsyncSession, write: Write) -> None:
        await doom(session, observer)

    add_stream(app, way, work)
    async with serving(app) as client:
        assert not await succeeds(client, "/")
        await settled(app, observer)


@on_postgresql
async def test_commit_failure_of_a_stream_of_known_length(
    app: Shop, observer: Observer, way: Any
) -> None:
    """A stream with a Content-Length does not look complete either if it is not stored."""

    @app.post("/")
    async def stream(request: Request, session: AsyncSession) -> None:
        response = await request.respond(headers={"content-length": "5"})
        await doom(session, observer)
        await response.send("hello")
        if way is not respond:
            await response.eof()

    @app.post("/returned")
    async def returned(request: Request, session: AsyncSession) -> ResponseStream:
        async def run(response: Any) -> None:
            await doom(session, observer)
            await response.write("hello")

        return ResponseStream(run, headers={"content-length": "5"})

    async with serving(app) as client:
        path = "/returned" if way is return_stream else "/"
        assert not await succeeds(client, path)
        await settled(app, observer)


async def test_a_stream_of_known_length(app: Shop, observer: Observer) -> None:
    """A stream with a Content-Length is stored when its last byte arrives."""

    @app.post("/")
    async def stream(request: Request, session: AsyncSession) -> None:
        response = await request.respond(headers={"content-length": "5"})
        session.add(Item(name="apple"))
        await response.send("hello")

    async with serving(app) as client, client.stream("POST", "/") as response:
        assert await response.aread() == b"hello"
        assert observer.names() == ["apple"]
        await settled(app, observer)


async def _leave(app: Shop, observer: Observer, way: Any, doing: str) -> None:
    query = SlowQuery(observer)
    reached = asyncio.Event()

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("begun")
        reached.set()
        if doing == "a query":
            await query.run(session)
        elif doing == "python":
            await asyncio.sleep(5)
        for _ in range(100):
            await write("x" * 100_000)
            await asyncio.sleep(0.01)

    add_stream(app, way, work)
    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 5)
        if doing == "a query":
            await query.begun()
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []


@pytest.mark.parametrize("doing", ["a query", "python", "sending"])
async def test_a_client_that_leaves_within_the_stream(
    app: Shop, observer: Observer, doing: str
) -> None:
    """Nothing is stored and no connection is left behind, whatever the stream is doing."""
    await _leave(app, observer, respond, doing)


@on_postgresql
async def test_a_client_that_leaves_within_a_stream_of_any_kind(
    app: Shop, observer: Observer, way: Any
) -> None:
    """Nothing is stored and no connection is left behind, whatever kind the stream is."""
    await _leave(app, observer, way, "python")


@on_postgresql
async def test_a_client_that_does_not_read(app: Shop, observer: Observer, way: Any) -> None:
    """A client that takes nothing off its socket holds a connection until RESPONSE_TIMEOUT."""
    app.config.RESPONSE_TIMEOUT = 0.3
    reached = asyncio.Event()

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        reached.set()
        for _ in range(1000):
            await write("x" * 1_000_000)

    add_stream(app, way, work)
    async with serving(app) as client, raw_client(client) as idler:
        idler.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 5)
        await settled(app, observer, within=1.5)
        assert observer.names() == []


@on_postgresql
async def test_the_session_is_finished_after_the_end(app: Shop, observer: Observer) -> None:
    """After the last chunk the stream's session refuses to go on."""
    outcomes: list[str] = []

    @app.post("/")
    async def stream(request: Request, session: AsyncSession) -> None:
        response = await request.respond()
        session.add(Item(name="apple"))
        await response.send("ok")
        await response.eof()
        try:
            await session.scalars(select(Item))
        except SessionFinished as error:
            outcomes.append(str(error))

    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        await settled(app, observer)
        assert len(outcomes) == 1
        assert "async with app.ctx.db.session()" in outcomes[0]
        assert observer.names() == ["apple"]


@on_postgresql
async def test_an_exception_after_the_end(app: Shop, observer: Observer) -> None:
    """What was committed at the last chunk stays, whatever the handler does then."""

    @app.post("/")
    async def stream(request: Request, session: AsyncSession) -> None:
        response = await request.respond()
        session.add(Item(name="apple"))
        await response.send("ok")
        await response.eof()
        raise ValueError("too late")

    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        assert observer.names() == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_a_response_given_to_respond(app: Shop, observer: Observer) -> None:
    """An ordinary response sent by way of respond() is committed before it is sent."""

    @app.post("/<status:int>")
    async def answer(request: Request, status: int, session: AsyncSession) -> None:
        session.add(Item(name=f"apple {status}"))
        await session.flush()
        response = await request.respond(text("answered", status))
        await response.send(end_stream=True)

    @app.post("/returned")
    async def returned(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="pear"))
        response = await request.respond(text("answered"))
        assert isinstance(response, HTTPResponse)
        return response

    async with serving(app) as client:
        assert (await client.post("/404")).status_code == 404
        assert observer.names() == []
        assert (await client.post("/200")).text == "answered"
        assert (await client.post("/returned")).text == "answered"
        assert observer.names() == ["apple 200", "pear"]
        await settled(app, observer)


@on_postgresql
async def test_a_head_request_of_a_stream(app: Shop, observer: Observer, way: Any) -> None:
    """HEAD runs the stream without its body, and leaves nothing behind."""
    app.config.HTTP_AUTO_HEAD = True

    async def work(session: AsyncSession, write: Write) -> None:
        for name in await session.scalars(select(Item.name)):
            await write(name)

    @app.get("/")
    async def stream(request: Request, session: AsyncSession) -> Any:
        return await way(request, session, work, 200)

    async with serving(app) as client:
        assert (await client.head("/")).status_code == 200
        await settled(app, observer)


@on_postgresql
async def test_response_middleware_that_replaces_the_stream(app: Shop, observer: Observer) -> None:
    """A stream that never runs leaves nothing behind; what the handler did is rolled back."""

    @app.post("/")
    async def stream(request: Request, session: AsyncSession) -> ResponseStream:
        session.add(Item(name="apple"))
        await session.flush()

        async def run(response: Any) -> None:
            await response.write("never")

        return ResponseStream(run)

    @app.middleware("response")
    async def replace(request: Request, response: BaseHTTPResponse) -> HTTPResponse:
        return text("replaced")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert await stayer.answer() == (200, b"replaced")
        await settled(app, observer, within=0.2)
        assert observer.names() == []


@on_postgresql
async def test_response_middleware_that_replaces_a_stream_without_a_session(app: Shop) -> None:
    """A stream that never runs and touches no database is replaced as in Sanic."""

    @app.post("/")
    async def stream(request: Request) -> ResponseStream:
        async def run(response: Any) -> None:
            await response.write("never")

        return ResponseStream(run)

    @app.middleware("response")
    async def replace(request: Request, response: BaseHTTPResponse) -> HTTPResponse:
        return text("replaced")

    async with serving(app) as client:
        assert (await client.post("/")).text == "replaced"


async def test_a_returned_stream_that_ends_itself(app: Shop, observer: Observer) -> None:
    """Its COMMIT fails before the last chunk: the client sees that it is incomplete."""

    @app.post("/")
    async def stream(request: Request, session: AsyncSession) -> ResponseStream:
        async def run(response: Any) -> None:
            session.add(Item(name="apple"))
            await session.flush()
            await doom(session, observer)
            await response.write("first")
            await response.eof()

        return ResponseStream(run)

    async with serving(app) as client:
        assert not await succeeds(client, "/")
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_a_failing_stream_without_a_session(
    app: Shop, caplog: pytest.LogCaptureFixture
) -> None:
    """It ends as in Sanic, and the log has its own error."""

    @app.post("/")
    async def stream(request: Request) -> ResponseStream:
        async def run(response: Any) -> None:
            await response.write("first")
            raise LookupError("lost")

        return ResponseStream(run)

    async with serving(app) as client:
        assert (await client.post("/")).text == "first"
    error = errors(caplog)[0]
    assert error.exc_info is not None
    assert isinstance(error.exc_info[1], LookupError)


@on_postgresql
async def test_response_middleware_of_a_stream_may_use_the_session(
    app: Shop, observer: Observer, way: Any
) -> None:
    """Response middleware runs before the stream's end, and shares its transaction."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await write("ok")

    @app.middleware("response")
    async def note(request: Request, response: BaseHTTPResponse) -> None:
        request.ctx.session.add(Item(name="middleware"))
        await request.ctx.session.flush()

    add_stream(app, way, work)
    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        assert sorted(observer.names()) == ["apple", "middleware"]
        await settled(app, observer)


@on_postgresql
async def test_transactional_streams(app: Shop, observer: Observer, way: Any) -> None:
    """commit=False holds for a stream too."""

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        await session.flush()
        await write("ok")

    @app.post("/")
    @transactional(commit=False)
    async def stream(request: Request, session: AsyncSession) -> Any:
        return await way(request, session, work, 200)

    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        assert observer.names() == []
        await settled(app, observer)


@on_postgresql
async def test_on_commit_in_a_stream(app: Shop, observer: Observer, way: Any) -> None:
    """A callback runs once, after the stream's COMMIT."""
    calls: list[list[str]] = []

    async def work(session: AsyncSession, write: Write) -> None:
        session.add(Item(name="apple"))
        on_commit(lambda: calls.append(observer.names()))
        await write("ok")

    add_stream(app, way, work)
    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        assert calls == [["apple"]]
