"""The app under test: every kind of handler, with the faults that a request can ask for."""

from __future__ import annotations

import asyncio
import gc
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from sanic import HTTPResponse, Request, Sanic, json
from sanic.response import ResponseStream
from sanic.views import HTTPMethodView
from sqlalchemy import event, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import DatabaseBlueprint, on_commit, transactional
from tests.shop import Base, Item, Observer, Part
from tests.slow_sql import sleep_for, teach_to_sleep

HEARTBEAT = 0.02
BEATS = 3000

app: Sanic[Any, Any] = Sanic("faults")
app.blueprint(DatabaseBlueprint(metadata=Base.metadata))
app.config.update_config({"SLOW_COMMIT": 0.0, "BODY_TIMEOUT": 60})
app.config.load_environment_vars()
app.ctx.commits = []
app.ctx.beats = []


# What a request does, the same for every kind of handler.


def begin(request: Request, session: Session) -> None:
    """Write the first of two rows, and stay in a query for ``?query=`` seconds."""
    name = request.match_info["name"]
    on_commit(partial(app.ctx.commits.append, name))
    session.add(Item(name=f"{name}/1"))
    session.flush()
    if seconds := float(request.args.get("query", 0)):
        session.execute(sleep_for(app.ctx.db, seconds))


async def pause(request: Request) -> None:
    """Stay in Python for ``?pause=`` seconds."""
    await asyncio.sleep(float(request.args.get("pause", 0)))


def end(request: Request, session: Session) -> None:
    """Write the second row, and do what ``?doom=`` says, after which the COMMIT fails."""
    session.add(Item(name=f"{request.match_info['name']}/2"))
    session.flush()
    if doom := request.args.get("doom"):
        DOOMS[doom](session)


def _break_constraint(session: Session) -> None:
    session.add(Part(item_id=-1))
    session.flush()


def _kill_connection(session: Session) -> None:
    observer = Observer(str(os.environ["SANIC_DB_URL"]))
    mysql = observer.kind == "mysql"
    asked = "SELECT connection_id()" if mysql else "SELECT pg_backend_pid()"
    observer.kill(int(session.execute(text(asked)).scalar_one()))


def _fill_disk(session: Session) -> None:
    pages = session.execute(text("PRAGMA page_count")).scalar_one()
    session.execute(text(f"PRAGMA max_page_count = {pages}"))
    # It is written by the flush of the COMMIT.
    session.add(Item(name="x" * 1_000_000))


DOOMS: dict[str, Callable[[Session], None]] = {
    "constraint": _break_constraint,
    "killed": _kill_connection,
    "full": _fill_disk,
}


async def work(request: Request, session: AsyncSession) -> None:
    """Do it all on an asyncio session."""
    await session.run_sync(partial(begin, request))
    await pause(request)
    await session.run_sync(partial(end, request))


async def plain_work(request: Request, session: Session) -> None:
    """Do it all on a plain session."""
    begin(request, session)
    await pause(request)
    end(request, session)


# The kinds of handlers.


@app.post("/write/session/<name>")
async def write_session(request: Request, name: str, session: Session) -> HTTPResponse:
    await plain_work(request, session)
    return json({"name": name})


@app.post("/write/def/<name>")
def write_def(request: Request, name: str, session: Session) -> HTTPResponse:
    begin(request, session)
    end(request, session)
    return json({"name": name})


@app.post("/write/async/<name>")
async def write_async(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
    await work(request, session)
    return json({"name": name})


@app.post("/write/context/<name>")
async def write_context(request: Request, name: str) -> HTTPResponse:
    await work(request, request.ctx.session)
    return json({"name": name})


class View(HTTPMethodView):
    async def post(self, request: Request, name: str, session: Session) -> HTTPResponse:
        await plain_work(request, session)
        return json({"name": name})


app.add_route(View.as_view(), "/write/view/<name>")


@app.post("/write/transactional/<name>")
@transactional(isolation="SERIALIZABLE", retries=2)
async def write_transactional(request: Request, name: str, session: Session) -> HTTPResponse:
    await plain_work(request, session)
    return json({"name": name})


WRITERS = ("session", "def", "async", "context", "view", "transactional")


Send = Callable[[str], Awaitable[None]]


async def stream(request: Request, send: Send, session: AsyncSession) -> None:
    """Send ``?chunks=`` pieces of 1 KiB while the work is done."""
    await session.run_sync(partial(begin, request))
    for _ in range(int(request.args.get("chunks", 2))):
        await send("x" * 1024)
        await pause(request)
    await session.run_sync(partial(end, request))
    await send("end")


@app.post("/stream/respond/<name>")
async def stream_respond(request: Request, name: str, session: AsyncSession) -> None:
    response = await request.respond()
    await stream(request, response.send, session)
    await response.eof()


@app.post("/stream/returned/<name>")
async def stream_returned(request: Request, name: str, session: AsyncSession) -> ResponseStream:
    async def run(response: Any) -> None:
        await stream(request, response.write, session)

    return ResponseStream(run)


STREAMS = ("respond", "returned")


@app.get("/read/<name>")
async def read(request: Request, name: str, session: Session) -> HTTPResponse:
    count = text("SELECT count(*) FROM item WHERE name LIKE :names")
    return json({"rows": session.execute(count, {"names": f"{name}/%"}).scalar_one()})


# How the process is.


@app.get("/status")
def status(_: Request) -> HTTPResponse:
    """Tell what this process holds; the beats are told once."""
    beats, app.ctx.beats = app.ctx.beats, app.ctx.beats[-1:]
    gaps = [after - before for before, after in pairwise(beats)]
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    reading = app.ctx.db.read_pool_status()
    return json(
        {
            **app.ctx.db.pool_status(),
            "read_idle": 0 if reading is None else reading["idle"],
            "pid": os.getpid(),
            "live": len(app.ctx.db.live_units),
            "tasks": len(asyncio.all_tasks()),
            "fds": len(os.listdir("/proc/self/fd")),
            "rss": pages * os.sysconf("SC_PAGE_SIZE"),
            "longest_gap": max(gaps, default=0.0),
        }
    )


@app.get("/requests")
async def requests(request: Request) -> HTTPResponse:
    """Tell the paths of the other requests that are alive, without those that are garbage."""
    gc.collect()
    alive = [each for each in gc.get_objects() if isinstance(each, Request)]
    return json([each.path for each in alive if each is not request])


@app.get("/commits")
async def commits(_: Request) -> HTTPResponse:
    """Tell for which names ``on_commit`` was called."""
    return json(app.ctx.commits)


@app.post("/garbage/<wanted>")
async def garbage(_: Request, wanted: str) -> HTTPResponse:
    """Switch the garbage collector ``on`` or ``off``."""
    gc.collect()
    (gc.enable if wanted == "on" else gc.disable)()
    return json({"enabled": gc.isenabled()})


@app.exception(DBAPIError)
def own_answer(request: Request, error: DBAPIError) -> HTTPResponse:
    """Answer ``?own`` with a status that is no other's."""
    if "own" in request.args:
        return json({"own": type(error).__name__}, 418)
    default: HTTPResponse = request.app.error_handler.default(request, error)
    return default


@app.post("/room")
async def make_room(_: Request, session: Session) -> HTTPResponse:
    """End the ``full`` disk."""
    session.execute(text("PRAGMA max_page_count = 1000000000"))
    return json({})


@app.listener("before_server_start", priority=2000)
async def slow_down(app: Sanic[Any, Any]) -> None:
    """Teach SQLite to sleep: in queries, and for ``SLOW_COMMIT`` seconds in each COMMIT."""
    teach_to_sleep(app.ctx.db.engine)
    if app.ctx.db.backend.name == "sqlite" and app.config.SLOW_COMMIT:
        event.listen(app.ctx.db.engine.sync_engine, "connect", _slow_commits)


def _slow_commits(dbapi_connection: Any, _record: object) -> None:
    def trace(statement: str) -> None:
        if statement == "COMMIT":
            time.sleep(app.config.SLOW_COMMIT)

    dbapi_connection.run_async(lambda connection: connection.set_trace_callback(trace))


@app.after_server_start
async def started(_: Sanic[Any, Any]) -> None:
    beat()
    print("ready to serve", flush=True)


def beat() -> None:
    """Note the time again and again: a long gap is an event loop that was blocked."""
    app.ctx.beats = [*app.ctx.beats[-BEATS:], time.monotonic()]
    asyncio.get_running_loop().call_later(HEARTBEAT, beat)
