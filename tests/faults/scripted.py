"""A real server whose handlers do what a test says, one step after the other.

Its event loop runs only while the test waits for something: between two steps everything stands
still, and an interleaving is what the test says it is.
"""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack
from dataclasses import dataclass
from inspect import isawaitable
from typing import Any, TypeVar

import httpx
from sanic import HTTPResponse, Request
from sanic.response import ResponseStream
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from sanic_db_bp import current_session
from tests.proxy import proxied
from tests.serving import serving
from tests.shop import Observer, Shop, checked_out, eventually, make_app

T = TypeVar("T")

PATIENCE = 10.0
"""Seconds after which something that must happen is taken not to."""


class BrokenHandler(Exception):
    """What a handler raises if its script says so."""


@dataclass
class Stage:
    """Where a step is played: the session in the form that the handler asked for."""

    session: Any
    savepoints: list[Any]

    @property
    def async_session(self) -> AsyncSession:
        """The asyncio form, whatever the handler asked for."""
        return current_session(AsyncSession)

    async def call(self, method: Callable[..., Any], *args: Any) -> Any:
        """Call a method of either form of the session."""
        result = method(*args)
        return await result if isawaitable(result) else result


Step = Callable[[Stage], Awaitable[HTTPResponse | None]]


class Script:
    """What one request does: it waits for its next step, until one says how it ends."""

    def __init__(self) -> None:
        self._steps: asyncio.Queue[tuple[Step, asyncio.Future[None]]] = asyncio.Queue()
        self._savepoints: list[Any] = []
        self.reached = asyncio.Event()

    def do(self, step: Step) -> asyncio.Future[None]:
        """Give the next step; the future tells when it is done."""
        done = asyncio.get_running_loop().create_future()
        self._steps.put_nowait((step, done))
        return done

    async def play(self, session: Any) -> HTTPResponse:
        """Play the steps, in a handler or in a dependency of it."""
        self.reached.set()
        stage = Stage(session, self._savepoints)
        while True:
            step, done = await self._steps.get()
            try:
                ending = await step(stage)
            except BrokenHandler:
                done.set_result(None)
                raise
            except Exception as error:
                done.set_exception(error)
                raise
            if not done.cancelled():
                done.set_result(None)
            if ending is not None:
                return ending


@dataclass(frozen=True)
class Answer:
    """What a client was told."""

    status: int
    complete: bool

    @property
    def is_success(self) -> bool:
        """Whether the client may rely on what it asked for."""
        return self.complete and self.status < 400


class Client:
    """A client with one connection, which it keeps for its next request."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.answer: asyncio.Task[Answer] | None = None

    def post(self, path: str) -> None:
        """Send a request and begin to read the answer."""
        self._writer.write(f"POST {path} HTTP/1.1\r\nHost: shop\r\n\r\n".encode())
        self.answer = asyncio.create_task(self._read())

    def leave(self) -> None:
        """Close the connection."""
        if self.answer is not None:
            self.answer.cancel()
        self._writer.close()

    async def _read(self) -> Answer:
        head = (await self._reader.readuntil(b"\r\n\r\n")).decode().lower().splitlines()
        status = int(head[0].split()[1])
        fields = dict(line.split(": ", 1) for line in head[1:] if line)
        try:
            if fields.get("transfer-encoding") == "chunked":
                while size := int(await self._reader.readuntil(b"\r\n"), 16):
                    await self._reader.readexactly(size + 2)
                await self._reader.readexactly(2)
            else:
                await self._reader.readexactly(int(fields.get("content-length", 0)))
        except asyncio.IncompleteReadError:
            return Answer(status, complete=False)
        return Answer(status, complete=True)


class PoolEvents:
    """Checks that a connection which leaves the pool comes back exactly once."""

    def __init__(self, app: Shop) -> None:
        self.wrong: list[str] = []
        self._out: set[object] = set()
        pool = app.ctx.db.engine.sync_engine.pool

        @event.listens_for(pool, "checkout")
        def left(_connection: object, record: object, _proxy: object) -> None:
            self._note(record in self._out, "was given out twice")
            self._out.add(record)

        @event.listens_for(pool, "checkin")
        def came_back(_connection: object, record: object) -> None:
            self._note(record not in self._out, "came back twice")
            self._out.discard(record)

    @property
    def all_are_back(self) -> bool:
        """Whether none is out."""
        return not self._out

    def _note(self, wrong: bool, what: str) -> None:
        if wrong:
            self.wrong.append(f"a connection {what}")


class Prepared:
    """A dependency that plays the first part of a script."""

    def __init__(self, script: Script) -> None:
        self.script = script


def add_routes(app: Shop, scripts: dict[int, Script]) -> None:
    """Add a route for each form in which a handler may have its session."""

    @app.post("/plain/<number:int>")
    async def plain(_: Request, number: int, session: Session) -> HTTPResponse:
        return await scripts[number].play(session)

    @app.post("/async/<number:int>")
    async def asynchronous(_: Request, number: int, session: AsyncSession) -> HTTPResponse:
        return await scripts[number].play(session)

    @app.post("/context/<number:int>")
    async def context(request: Request, number: int) -> HTTPResponse:
        return await scripts[number].play(request.ctx.session)

    async def prepare(request: Request, session: Session) -> Prepared:
        script = scripts[int(request.match_info["number"])]
        await script.play(session)
        return Prepared(script)

    @app.before_server_start
    async def add_dependency(app: Shop) -> None:
        app.ext.add_dependency(Prepared, prepare)

    @app.post("/dependency/<number:int>")
    async def dependency(
        _: Request, number: int, prepared: Prepared, session: AsyncSession
    ) -> HTTPResponse:
        return await prepared.script.play(session)

    @app.post("/respond/<number:int>")
    async def respond(request: Request, number: int, session: Session) -> None:
        response = await request.respond()
        await response.send("begun")
        await scripts[number].play(session)
        await response.eof()

    @app.post("/stream/<number:int>")
    async def stream(_: Request, number: int, session: AsyncSession) -> ResponseStream:
        async def write(response: Any) -> None:
            await response.write("begun")
            await scripts[number].play(session)

        return ResponseStream(write)


class Gate:
    """A query that lasts until the test lets it end."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._begun = threading.Event()
        self._open = threading.Event()

    def close(self) -> None:
        """Let the next query last."""
        self._begun.clear()
        self._open.clear()
        if self._observer.kind != "sqlite":
            self._observer.scalar(_LOCKS[self._observer.kind][0])

    def open(self) -> None:
        """Let it end."""
        self._open.set()
        if self._observer.kind != "sqlite":
            self._observer.scalar(_LOCKS[self._observer.kind][1])

    async def pass_through(self, stage: Stage) -> None:
        """Run the query."""
        session = stage.async_session
        if self._observer.kind == "sqlite":
            raw: Any = await (await session.connection()).get_raw_connection()
            await raw.driver_connection.create_function("gate", 0, self._wait)
        await session.execute(text(_QUERIES[self._observer.kind]))

    def _wait(self) -> int:
        self._begun.set()
        time.sleep(0.005)
        return int(not self._open.is_set())

    async def reached(self) -> None:
        """Wait until the database works at the query."""
        await eventually(self._is_reached, within=PATIENCE)

    def _is_reached(self) -> bool:
        if self._observer.kind == "sqlite":
            return self._begun.is_set()
        return bool(self._observer.scalar(_LOCKS[self._observer.kind][2]))


_QUERIES = {
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE gate()) "
    "SELECT count(*) FROM n",
    "postgresql": "SELECT pg_advisory_lock(1), pg_advisory_unlock(1)",
    "mysql": "SELECT GET_LOCK(concat(database(), 'gate'), 30), "
    "RELEASE_LOCK(concat(database(), 'gate'))",
}
_LOCKS = {
    "postgresql": (
        "SELECT pg_advisory_lock(1)",
        "SELECT pg_advisory_unlock(1)",
        "SELECT count(*) FROM pg_locks JOIN pg_database d ON d.oid = database "
        "WHERE locktype = 'advisory' AND NOT granted AND datname = current_database()",
    ),
    "mysql": (
        "SELECT GET_LOCK(concat(database(), 'gate'), 0)",
        "SELECT RELEASE_LOCK(concat(database(), 'gate'))",
        "SELECT count(*) FROM information_schema.processlist WHERE db = database() "
        "AND info LIKE 'SELECT GET_LOCK%%' AND id <> connection_id()",
    ),
}


class ScriptedServer:
    """The server, its database, and all that the test wants to see of them."""

    def __init__(self, database_url: str, *, pool_size: int) -> None:
        self._runner = asyncio.Runner()
        self.observer = Observer(database_url, poolclass=StaticPool)
        self.gate = Gate(self.observer)
        self.scripts: dict[int, Script] = {}
        self.called: list[int] = []
        self.wrong: list[str] = []
        self.programs = 0
        self._stack = AsyncExitStack()
        self.run(self._start(database_url, pool_size))

    async def _start(self, database_url: str, pool_size: int) -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: self.wrong.append(str(context))
        )
        async with AsyncExitStack() as stack:
            self.proxy = await stack.enter_async_context(proxied(database_url))
            self.app = make_app(self.proxy.url, pool_size=pool_size, pool_timeout=60)
            add_routes(self.app, self.scripts)
            self._http: httpx.AsyncClient = await stack.enter_async_context(serving(self.app))
            self.pool_events = PoolEvents(self.app)
            self._stack = stack.pop_all()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Let the server go on until something has happened."""
        return self._runner.run(_in_time(coroutine))

    def close(self) -> None:
        """Stop the server."""
        self.proxy.release()
        self.run(self._stack.aclose())
        self._runner.close()
        self.observer.close()

    async def connect(self) -> Client:
        """Make a client."""
        url = self._http.base_url
        client = Client(*await asyncio.open_connection(url.host, url.port))
        self._stack.callback(client.leave)
        return client

    @property
    def checked_out(self) -> int:
        """How many connections are out of the pool."""
        return checked_out(self.app)

    @property
    def waiting(self) -> int:
        """How many requests wait for a connection."""
        pool: Any = self.app.ctx.db.engine.pool
        return sum(not waiter.done() for waiter in pool._pool._waiting)


async def _in_time(coroutine: Coroutine[Any, Any, T]) -> T:
    async with asyncio.timeout(PATIENCE):
        return await coroutine
