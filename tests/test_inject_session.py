"""Functions that are no handlers get sessions too: tasks, commands, helpers."""

import asyncio
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from inspect import iscoroutinefunction, signature
from pathlib import Path
from typing import Any

import pytest
from sanic import HTTPResponse, Request, Sanic, empty, json
from sqlalchemy import String, func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

import sanic_db_bp
from sanic_db_bp import (
    AsyncReadSession,
    ConfigurationError,
    Database,
    DatabaseBlueprint,
    ReadSession,
    current_session,
    inject_session,
    on_commit,
)
from tests.serving import serving
from tests.shop import eventually

App = Sanic[Any, Any]


class Base(DeclarativeBase):
    """The tables of these tests."""


class Note(Base):
    """A text."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(50))


class ReportsSession(Session):
    """The plain session of a second database."""


class ReportsAsyncSession(AsyncSession):
    """The asyncio session of a second database."""


@pytest.fixture
def make_app(tmp_path: Path) -> Callable[[str], App]:
    """Make an app with two databases."""

    def make(name: str) -> App:
        app: App = Sanic(name)
        options: dict[str, Any] = {"metadata": Base.metadata, "create_tables": True}
        app.blueprint(DatabaseBlueprint(url=f"sqlite:///{tmp_path / name}.db", **options))
        app.blueprint(
            DatabaseBlueprint(
                "reports",
                url=f"sqlite:///{tmp_path / name}-reports.db",
                session_class=ReportsSession,
                async_session_class=ReportsAsyncSession,
                **options,
            )
        )
        return app

    return make


@pytest.fixture
def app(make_app: Callable[[str], App]) -> App:
    """An app with two databases."""
    return make_app("app")


async def notes_of(database: Database) -> list[str]:
    """Return what was committed, as another connection sees it."""
    async with database.read_session() as session:
        return list(await session.scalars(select(Note.text).order_by(Note.id)))


@inject_session
async def add_async(value: str, session: AsyncSession, *, fail: bool = False) -> int:
    """Write with an asyncio session."""
    session.add(Note(text=value))
    await session.flush()
    if fail:
        raise RuntimeError("failed")
    return await session.scalar(select(func.count()).select_from(Note)) or 0


@inject_session
def add_plainly(value: str, session: Session, *, fail: bool = False) -> int:
    """Write with a plain session."""
    session.add(Note(text=value))
    session.flush()
    if fail:
        raise RuntimeError("failed")
    return session.scalar(select(func.count()).select_from(Note)) or 0


@inject_session
async def add_in_bridge(value: str, session: Session, *, fail: bool = False) -> int:
    """Write with a plain session in a coroutine function."""
    session.add(Note(text=value))
    session.flush()
    await asyncio.sleep(0)
    if fail:
        raise RuntimeError("failed")
    return session.scalar(select(func.count()).select_from(Note)) or 0


FUNCTIONS = [add_async, add_plainly, add_in_bridge]


@pytest.mark.parametrize("function", FUNCTIONS)
async def test_a_call_outside_of_requests_has_a_transaction_of_its_own(
    app: App, function: Callable[..., Any]
) -> None:
    """Committed when the function returns, rolled back when it raises."""
    async with serving(app):
        with pytest.raises(RuntimeError, match="failed"):
            await function("lost", fail=True)
        assert await notes_of(app.ctx.db) == []
        assert await function("kept") == 1
        assert await notes_of(app.ctx.db) == ["kept"]
        assert app.ctx.db.pool_status()["checked_out"] == 0


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("path", ["/injected", "/bare", "/context"])
async def test_a_call_in_a_request_joins_its_transaction(
    app: App, function: Callable[..., Any], path: str
) -> None:
    """What the function wrote is committed or rolled back with the request."""

    @app.post("/injected/<status:int>")
    async def injected(request: Request, status: int, session: Session) -> HTTPResponse:
        session.add(Note(text="handler"))
        session.flush()
        return json(await function("function"), status)

    @app.post("/bare/<status:int>")
    async def bare(request: Request, status: int) -> HTTPResponse:
        await add_async("handler")
        return json(await function("function"), status)

    @app.post("/context/<status:int>")
    async def context(request: Request, status: int) -> HTTPResponse:
        request.ctx.session.add(Note(text="handler"))
        return json(await function("function"), status)

    async with serving(app) as client:
        assert (await client.post(f"{path}/400")).json() == 2
        assert await notes_of(app.ctx.db) == []
        assert (await client.post(f"{path}/200")).json() == 2
        assert await notes_of(app.ctx.db) == ["handler", "function"]
        assert app.ctx.db.pool_status()["checked_out"] == 0


@pytest.mark.parametrize("function", FUNCTIONS)
async def test_a_call_in_a_block_joins_it(app: App, function: Callable[..., Any]) -> None:
    """In ``db.session()`` the function has the session of the block."""

    async def fail() -> None:
        async with app.ctx.db.session() as session:
            session.add(Note(text="block"))
            assert await function("lost") == 2
            raise RuntimeError("undone")

    async with serving(app):
        with pytest.raises(RuntimeError, match="undone"):
            await fail()
        assert await notes_of(app.ctx.db) == []
        async with app.ctx.db.session() as session:
            session.add(Note(text="block"))
            assert await function("kept") == 2
        assert await notes_of(app.ctx.db) == ["block", "kept"]


async def test_a_task_of_a_block_has_a_transaction_of_its_own(app: App) -> None:
    """What a child task wrote is kept although the block around it is rolled back."""

    async def fail() -> None:
        async with app.ctx.db.session() as session:
            await asyncio.create_task(_call(add_async, "task"))
            session.add(Note(text="block"))
            await session.flush()
            raise RuntimeError("undone")

    async with serving(app):
        with pytest.raises(RuntimeError, match="undone"):
            await fail()
        assert await notes_of(app.ctx.db) == ["task"]


async def _call(function: Callable[..., Any], value: str) -> Any:
    return await function(value)


async def test_a_call_after_the_answer_has_a_transaction_of_its_own(app: App) -> None:
    """A signal that comes when the connection is over joins nothing."""
    seen: list[int] = []

    async def log(**_: object) -> None:
        seen.append(await add_async("signal"))

    app.add_signal(log, "http.lifecycle.complete")

    @app.post("/used")
    async def used(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text="handler"))
        return empty()

    @app.post("/unused")
    async def unused(request: Request) -> HTTPResponse:
        return empty()

    async with serving(app) as client:
        for path in ("/used", "/unused"):
            answer = await client.post(path, headers={"connection": "close"})
            assert answer.status_code == 204
            await eventually(lambda: seen)
            seen.clear()
            assert app.ctx.db.pool_status()["checked_out"] == 0
        assert await notes_of(app.ctx.db) == ["handler", "signal", "signal"]


async def test_a_signal_before_the_answer_joins_it(app: App) -> None:
    """What it does is committed with a good answer, and rolled back with a bad one."""

    async def log(**_: object) -> None:
        await add_async("signal")

    app.add_signal(log, "http.lifecycle.response")

    @app.post("/<status:int>")
    async def handler(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text="handler"))
        return empty(status)

    async with serving(app) as client:
        for status in (400, 204):
            assert (await client.post(f"/{status}")).status_code == status
            assert app.ctx.db.pool_status()["checked_out"] == 0
        assert await notes_of(app.ctx.db) == ["handler", "signal"]


async def test_a_call_within_a_stream_joins_it(app: App) -> None:
    """The transaction of a stream goes on when its first bytes are out."""

    @app.post("/")
    async def handler(request: Request, session: AsyncSession) -> None:
        response = await request.respond()
        await response.send("first")
        await add_async("stream")
        assert await session.scalar(select(func.count()).select_from(Note)) == 1
        assert await notes_of(app.ctx.db) == []
        await response.eof()

    async with serving(app) as client:
        assert (await client.post("/")).text == "first"
        assert await notes_of(app.ctx.db) == ["stream"]


async def test_a_callback_of_on_commit_has_a_transaction_of_its_own(app: App) -> None:
    """That of the block or request is over when it runs."""

    @app.post("/injected")
    async def injected(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text="handler"))
        on_commit(lambda: add_async("callback"))
        return empty()

    @app.post("/bare")
    async def bare(request: Request) -> HTTPResponse:
        request.ctx.session.add(Note(text="handler"))
        on_commit(lambda: add_async("callback"))
        return empty()

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add(Note(text="block"))
            on_commit(lambda: add_async("callback"))
        assert await notes_of(app.ctx.db) == ["block", "callback"]
        for path in ("/injected", "/bare"):
            assert (await client.post(path)).status_code == 204
        notes = await notes_of(app.ctx.db)
        assert notes == ["block", "callback", "handler", "callback", "handler", "callback"]
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_nested_functions_share_one_session(app: App) -> None:
    """A decorated function that calls another one hands its transaction on."""
    sessions: list[Any] = []

    @inject_session
    async def inner(session: AsyncSession, plain: Session) -> None:
        sessions.append(session)
        assert session.sync_session is plain
        assert current_session(Session) is plain

    @inject_session
    async def outer(session: AsyncSession) -> None:
        sessions.append(session)
        session.add(Note(text="lost"))
        await inner()
        raise RuntimeError("undone")

    async with serving(app):
        with pytest.raises(RuntimeError, match="undone"):
            await outer()
        assert sessions[0] is sessions[1]
        assert await notes_of(app.ctx.db) == []


async def test_a_task_of_a_request_has_a_transaction_of_its_own(app: App) -> None:
    """A task outlives its request: it never joins, while the request lasts or afterwards."""
    tasks: list[asyncio.Task[int]] = []
    proceed = asyncio.Event()

    async def later(value: str) -> int:
        await proceed.wait()
        count: int = await add_async(value)
        return count

    @app.post("/<wait>")
    async def handler(request: Request, wait: str) -> HTTPResponse:
        task = asyncio.create_task(later(wait))
        tasks.append(task)
        if wait == "wait":
            proceed.set()
            await task
        return empty(400)

    async with serving(app) as client:
        assert (await client.post("/wait")).status_code == 400
        proceed.clear()
        assert (await client.post("/after")).status_code == 400
        proceed.set()
        assert await asyncio.gather(*tasks) == [1, 2]
        assert await notes_of(app.ctx.db) == ["wait", "after"]


async def test_background_tasks_of_the_app_have_transactions_of_their_own(app: App) -> None:
    """``app.add_task`` with the coroutine, or with the function that Sanic calls."""
    done = asyncio.Event()

    @inject_session
    async def seed(app: App, session: AsyncSession) -> None:
        assert isinstance(app, Sanic)
        session.add(Note(text="function"))

    @inject_session
    async def seed_again(session: AsyncSession) -> None:
        session.add(Note(text="coroutine"))

    async def both(app: App) -> None:
        await seed(app)
        await seed_again()
        done.set()

    for_sanic: Any = both
    app.add_task(for_sanic)
    async with serving(app):
        await asyncio.wait_for(done.wait(), 5)
        assert await notes_of(app.ctx.db) == ["function", "coroutine"]


async def test_a_task_that_sanic_calls_with_the_app_gets_its_session(app: App) -> None:
    """The decorated function itself is given to ``app.add_task``."""
    done = asyncio.Event()

    @inject_session
    async def seed(app: App, db: Database, session: AsyncSession) -> None:
        session.add(Note(text=app.name))
        assert db is app.ctx.db
        done.set()

    for_sanic: Any = seed
    app.add_task(for_sanic)
    async with serving(app):
        await asyncio.wait_for(done.wait(), 5)
        async with app.ctx.db.session() as session:
            assert await session.scalar(select(Note.text)) == "app"


async def test_a_decorated_handler_works_as_any_other(app: App) -> None:
    """On a handler the decorator changes nothing: one session, committed before the answer."""

    @app.post("/async/<value>")
    @inject_session
    async def in_async(request: Request, value: str, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text=value))
        return json(current_session() is session, 400 if value == "bad" else 200)

    @app.post("/plain/<value>")
    @inject_session
    def in_plain(request: Request, value: str, session: Session) -> HTTPResponse:
        session.add(Note(text=value))
        session.flush()
        return json(True, 400 if value == "bad" else 200)

    async with serving(app) as client:
        for path in ("async", "plain"):
            assert (await client.post(f"/{path}/bad")).status_code == 400
            response = await client.post(f"/{path}/{path}")
            assert (response.status_code, response.json()) == (200, True)
        assert await notes_of(app.ctx.db) == ["async", "plain"]


class Author:
    """A dependency of these tests."""


async def test_annotations_of_a_decorated_handler_may_be_text(app: App) -> None:
    """sanic-ext resolves the others, too: what a module imports is known to its handlers."""
    app.ext.add_dependency(Author)

    @app.get("/")
    @inject_session
    async def handler(request: "Request", author: "Author", session: "Session") -> HTTPResponse:
        return json([type(author).__name__, type(session).__name__])

    async with serving(app) as client:
        assert (await client.get("/")).json() == ["Author", "Session"]


async def test_what_the_caller_passes_is_left_alone(app: App) -> None:
    """A session given by position or by name is used; nothing else is opened."""

    @inject_session
    async def same(
        value: str, session: AsyncSession | None = None
    ) -> tuple[str, AsyncSession | None]:
        return value, session

    async with serving(app), app.ctx.db.session() as session:
        async with app.ctx.reports.session() as other:
            assert await same("x", other) == ("x", other)
            assert await same("x", session=other) == ("x", other)
        assert await same("x") == ("x", session)
        assert await same("x", None) == ("x", None)


async def test_every_annotation_is_injected(app: App) -> None:
    """Sessions of all kinds, of both databases, and the runtime objects."""

    @inject_session
    async def everything(
        plain: Session,
        session: AsyncSession,
        read: ReadSession,
        async_read: AsyncReadSession | None,
        reports: ReportsSession,
        async_reports: ReportsAsyncSession,
        db: Database,
        engine: AsyncEngine,
    ) -> list[bool]:
        reports.add(Note(text="reports"))
        plain.add(Note(text="db"))
        plain.flush()
        return [
            session.sync_session is plain,
            async_reports.sync_session is reports,
            read.scalar(select(func.count()).select_from(Note)) == 0,
            async_read is not None and async_read.sync_session is read,
            db is app.ctx.db,
            engine is db.engine,
        ]

    async with serving(app):
        assert all(await everything())
        assert await notes_of(app.ctx.db) == ["db"]
        assert await notes_of(app.ctx.reports) == ["reports"]


async def test_two_databases_of_one_call_fail_together_when_it_raises(app: App) -> None:
    """Nothing of either is kept after an exception."""

    @inject_session
    async def both(session: AsyncSession, reports: ReportsAsyncSession) -> None:
        session.add(Note(text="lost"))
        reports.add(Note(text="lost"))
        await session.flush()
        await reports.flush()
        raise RuntimeError("undone")

    async with serving(app):
        with pytest.raises(RuntimeError, match="undone"):
            await both()
        assert await notes_of(app.ctx.db) == await notes_of(app.ctx.reports) == []


async def test_the_app_is_found_or_named(make_app: Callable[[str], App]) -> None:
    """The app among the arguments, that of ``app=``, or the request's; never a guess."""
    first, second = make_app("first"), make_app("second")

    @inject_session
    async def by_argument(app: App, session: AsyncSession) -> None:
        session.add(Note(text="argument"))

    @inject_session(app=second)
    async def by_name(session: AsyncSession) -> None:
        session.add(Note(text="name"))

    @inject_session
    async def unclear(session: AsyncSession) -> None:
        session.add(Note(text="request"))

    @second.post("/")
    async def handler(request: Request) -> HTTPResponse:
        await unclear()
        return empty()

    async with serving(first), serving(second) as client:
        await by_argument(second)
        await by_name()
        assert (await client.post("/")).status_code == 204
        assert await notes_of(second.ctx.db) == ["argument", "name", "request"]
        assert await notes_of(first.ctx.db) == []
        with pytest.raises(ConfigurationError, match="app="):
            await unclear()


async def test_the_named_app_wins_over_the_current_request(
    make_app: Callable[[str], App],
) -> None:
    """``app=`` of another app than the request's opens a transaction there."""
    first, second = make_app("first"), make_app("second")

    @inject_session(app=second)
    async def elsewhere(session: AsyncSession) -> None:
        session.add(Note(text="elsewhere"))

    @first.post("/")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text="here"))
        await elsewhere()
        return empty(400)

    async with serving(second), serving(first) as client:
        assert (await client.post("/")).status_code == 400
        assert await notes_of(first.ctx.db) == []
        assert await notes_of(second.ctx.db) == ["elsewhere"]


class OtherSession(Session):
    """The session of a database that no app has."""


async def test_a_session_that_no_database_has_is_an_error_of_the_call(app: App) -> None:
    """The error names the function's parameter and what there is."""

    @inject_session
    async def wrong(other: OtherSession) -> None:
        raise AssertionError("not reached")

    async with serving(app):
        with pytest.raises(ConfigurationError, match="'other: OtherSession'") as caught:
            await wrong()
    assert "ReportsSession" in str(caught.value)


async def test_an_app_without_a_database_is_told_so() -> None:
    """The error tells to register the blueprint."""
    app: App = Sanic("bare")

    @inject_session(app=app)
    async def function(session: AsyncSession) -> None:
        raise AssertionError("not reached")

    @inject_session(app=app)
    async def with_database(db: Database) -> None:
        raise AssertionError("not reached")

    for each in (function, with_database):
        with pytest.raises(ConfigurationError, match=r"app\.blueprint"):
            await each()


async def test_annotations_that_cannot_be_resolved_are_explained(app: App) -> None:
    """A name that is imported for type checkers alone is told with its remedy."""

    @inject_session
    async def function(session: "OtherNameOfSession") -> None:  # type: ignore[name-defined]  # noqa: F821
        raise AssertionError("not reached")

    async with serving(app):
        with pytest.raises(ConfigurationError, match="TYPE_CHECKING"):
            await function()


def test_the_decorated_function_shows_what_is_left_to_pass() -> None:
    """Name, docstring and the signature without sessions; it is a coroutine function."""
    assert add_plainly.__name__ == "add_plainly"
    assert add_plainly.__doc__ == "Write with a plain session."
    assert list(signature(add_plainly).parameters) == ["value", "fail"]
    assert iscoroutinefunction(add_plainly)
    assert iscoroutinefunction(add_async)


async def test_methods_are_decorated_like_functions(app: App) -> None:
    """``self`` is passed on."""

    class Notes:
        prefix = "method "

        @inject_session
        async def add(self, value: str, session: AsyncSession) -> None:
            session.add(Note(text=self.prefix + value))

        @inject_session
        def add_plainly(self, value: str, session: Session) -> None:
            session.add(Note(text=self.prefix + value))

    async with serving(app):
        await Notes().add("a")
        await Notes().add_plainly("b")
        assert await notes_of(app.ctx.db) == ["method a", "method b"]


# --- Commands

COMMANDS = """
from __future__ import annotations

import os

from sanic import Sanic
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp import Database, DatabaseBlueprint, ReadSession, inject_session


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str]


app = Sanic("shop")
app.blueprint(DatabaseBlueprint(url="sqlite:///shop.db"))
if os.environ.get("EXTEND"):
    app.extend()


@app.command
@inject_session
async def add(value: str, session: AsyncSession, again: str = "no") -> None:
    session.add(Note(text=value))
    await session.flush()
    if value == "bad":
        raise ValueError("refused")
    print(f"added {value} {again}")


@app.command(name="add-plainly")
@inject_session
def add_plainly(session: Session, value: str = "default") -> None:
    session.add(Note(text=value))
    print(f"added {value}")


@app.command
@inject_session
async def show(read: ReadSession | None, db: Database) -> None:
    print(type(db).__name__, read.scalars(select(Note.text)).all())
"""


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a command of an app in a process of its own."""
    (tmp_path / "shop.py").write_text(COMMANDS)
    with closing(sqlite3.connect(tmp_path / "shop.db")) as connection:
        connection.execute("CREATE TABLE note (id INTEGER PRIMARY KEY, text TEXT)")

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "default", "-m", "sanic", "shop:app", "exec", *arguments],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, "PYTHONPATH": str(Path(sanic_db_bp.__file__).parents[1])},
        )

    return run


def stored(folder: Path) -> list[str]:
    """Return the notes that the commands have committed."""
    with closing(sqlite3.connect(folder / "shop.db")) as connection:
        return [text for (text,) in connection.execute("SELECT text FROM note ORDER BY id")]


@pytest.mark.parametrize(
    ("arguments", "extend", "output", "notes"),
    [
        (["add", "--value=first", "--again=yes"], "", "added first yes", ["first"]),
        (["add", "--value=first"], "yes", "added first no", ["first"]),
        (["add-plainly"], "", "added default", ["default"]),
        (["show"], "", "Database []", []),
    ],
)
def test_commands_get_sessions_and_options(
    command: Callable[..., subprocess.CompletedProcess[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    extend: str,
    output: str,
    notes: list[str],
) -> None:
    """``sanic app exec`` runs them in transactions of their own, and leaks nothing.

    Also where sanic-ext is set up before, which injects into commands by itself.
    """
    monkeypatch.setenv("EXTEND", extend)
    result = command(*arguments)
    assert result.stdout.strip() == output, result.stderr
    assert (result.returncode, result.stderr) == (0, "")
    assert stored(tmp_path) == notes


def test_a_failing_command_is_rolled_back(
    command: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    """Its exception reaches the shell, and nothing is kept."""
    result = command("add", "--value=bad")
    assert "refused" in result.stderr
    assert "ResourceWarning" not in result.stderr
    assert result.returncode != 0
    assert stored(tmp_path) == []
