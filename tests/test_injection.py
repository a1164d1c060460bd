"""What a handler asks for by annotation reaches it, whatever form the handler has."""

import functools
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Optional

import httpx
import pytest
from pydantic import BaseModel
from sanic import Blueprint, HTTPResponse, Request, Sanic, Websocket, empty, json, text
from sanic.views import HTTPMethodView
from sanic_ext import Extend, openapi, validate
from sanic_testing.reusable import ReusableClient  # type: ignore[import-untyped]
from sqlalchemy import ForeignKey, String, func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sanic_db_bp import (
    AsyncReadSession,
    ConfigurationError,
    Database,
    DatabaseBlueprint,
    ReadSession,
    current_session,
    transactional,
)
from tests.serving import serving

App = Sanic[Any, Any]
Handler = Callable[..., Any]


class Base(DeclarativeBase):
    """The tables of these tests."""


class Author(Base):
    """Somebody who writes notes."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    notes: Mapped[list["Note"]] = relationship(back_populates="author", order_by="Note.id")


class Note(Base):
    """A text."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(50))
    author_id: Mapped[int | None] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author | None] = relationship(back_populates="notes")


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of an empty SQLite database."""
    return f"sqlite:///{tmp_path / 'test.db'}"


def new_app(url: str, name: str = "app") -> App:
    """Return an app with a database that has the tables of these tests."""
    app: App = Sanic(name)
    app.blueprint(DatabaseBlueprint(url=url, metadata=Base.metadata, create_tables=True))
    return app


@pytest.fixture
def app(url: str) -> App:
    """An app with an empty SQLite database."""
    return new_app(url)


async def notes_of(app: App) -> list[str]:
    """Return what was committed, as another connection sees it."""
    async with app.ctx.db.read_session() as session:
        return list(await session.scalars(select(Note.text).order_by(Note.id)))


# --- The annotations, on every database


def add_annotation_handlers(app: App) -> None:
    """Add a handler for each annotation, in both forms."""

    @app.post("/async/session")
    async def async_session(request: Request, session: Session) -> HTTPResponse:
        session.add(Note(text="kept", author=Author(name="Ada")))
        session.flush()
        note = session.scalars(select(Note)).one()
        return text(f"{note.text} {type(session).__name__}")

    @app.post("/plain/session")
    def plain_session(request: Request, session: Session) -> HTTPResponse:
        session.add(Note(text="kept", author=Author(name="Ada")))
        session.flush()
        note = session.scalars(select(Note)).one()
        return text(f"{note.text} {type(session).__name__}")

    @app.post("/async/async-session")
    async def async_async_session(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text="kept", author=Author(name="Ada")))
        await session.flush()
        note = (await session.scalars(select(Note))).one()
        return text(f"{note.text} {type(session).__name__}")

    @app.post("/plain/async-session")
    def plain_async_session(request: Request, session: AsyncSession) -> Awaitable[HTTPResponse]:
        async def answer() -> HTTPResponse:
            session.add(Note(text="kept", author=Author(name="Ada")))
            await session.flush()
            return text(f"kept {type(session).__name__}")

        return answer()


@pytest.mark.parametrize("kind", ["async", "plain"])
@pytest.mark.parametrize("session", ["session", "async-session"])
async def test_sessions_write_and_are_committed(database_url: str, kind: str, session: str) -> None:
    """A plain and an asyncio session reach handlers of both kinds, and the answer means COMMIT."""
    app = new_app(database_url)
    add_annotation_handlers(app)
    async with serving(app) as client:
        response = await client.post(f"/{kind}/{session}")
        names = {"session": "Session", "async-session": "AsyncSession"}
        assert (response.status_code, response.text) == (200, f"kept {names[session]}")
        assert await notes_of(app) == ["kept"]


async def test_lazy_loading_works_in_every_kind_of_handler(database_url: str) -> None:
    """A relationship loads when it is read, with every session and in every handler."""
    app = new_app(database_url)

    @app.get("/async/<author_id:int>")
    async def async_session(
        request: Request, author_id: int, session: AsyncSession
    ) -> HTTPResponse:
        author = await session.get_one(Author, author_id)
        return json([note.text for note in author.notes])

    @app.get("/plain/<author_id:int>")
    async def plain_session(request: Request, author_id: int, session: Session) -> HTTPResponse:
        return json([note.text for note in session.get_one(Author, author_id).notes])

    @app.get("/def/<author_id:int>")
    def plain_handler(request: Request, author_id: int, session: Session) -> HTTPResponse:
        return json([note.text for note in session.get_one(Author, author_id).notes])

    @app.get("/read/<author_id:int>")
    async def reading(request: Request, author_id: int, session: ReadSession) -> HTTPResponse:
        return json([note.text for note in session.get_one(Author, author_id).notes])

    @app.get("/async-read/<author_id:int>")
    async def async_reading(
        request: Request, author_id: int, session: AsyncReadSession
    ) -> HTTPResponse:
        author = await session.get_one(Author, author_id)
        return json([note.text for note in author.notes])

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add(Author(id=1, name="Ada", notes=[Note(text="a"), Note(text="b")]))
        for path in ("async", "plain", "def", "read", "async-read"):
            response = await client.get(f"/{path}/1")
            assert (path, response.json()) == (path, ["a", "b"])


async def test_read_sessions_read_and_the_database_refuses_their_writes(
    database_url: str,
) -> None:
    """A read session finds what was committed, and a write in SQL is an error of the database."""
    app = new_app(database_url)
    errors: list[BaseException] = []

    @app.get("/count")
    async def count(request: Request, session: AsyncReadSession) -> HTTPResponse:
        return json(await session.scalar(select(func.count()).select_from(Note)))

    @app.get("/plain-count")
    def plain_count(request: Request, session: ReadSession) -> HTTPResponse:
        return json(session.scalar(select(func.count()).select_from(Note)))

    @app.post("/write")
    async def write(request: Request, session: AsyncReadSession) -> HTTPResponse:
        with pytest.raises(DBAPIError) as caught:
            await session.execute(Note.__table__.insert().values(text="lost"))  # type: ignore[attr-defined]
        errors.append(caught.value)
        return empty()

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add(Note(text="one"))
        assert (await client.get("/count")).json() == 1
        assert (await client.get("/plain-count")).json() == 1
        assert (await client.post("/write")).status_code == 204
        assert len(errors) == 1
        assert await notes_of(app) == ["one"]


async def test_the_runtime_objects_are_injected(database_url: str) -> None:
    """``db`` and ``engine`` are the app's own, in handlers of both kinds."""
    app = new_app(database_url)

    @app.get("/async")
    async def in_async(request: Request, db: Database, engine: AsyncEngine) -> HTTPResponse:
        return json([db is app.ctx.db, engine is app.ctx.db.engine])

    @app.get("/plain")
    def in_plain(request: Request, engine: AsyncEngine, db: Database) -> HTTPResponse:
        return json([db is app.ctx.db, engine is app.ctx.db.engine])

    async with serving(app) as client:
        assert (await client.get("/async")).json() == [True, True]
        assert (await client.get("/plain")).json() == [True, True]


async def test_all_forms_in_one_handler_share_the_transaction(database_url: str) -> None:
    """What the plain form writes, the asyncio form of the same handler reads."""
    app = new_app(database_url)

    @app.post("/")
    async def both(
        request: Request, plain: Session, session: AsyncSession, read: ReadSession, db: Database
    ) -> HTTPResponse:
        plain.add(Note(text="seen"))
        plain.flush()
        seen = await session.scalar(select(Note.text))
        return json([seen, session.sync_session is plain, read.scalar(select(Note.text))])

    async with serving(app) as client:
        assert (await client.post("/")).json() == ["seen", True, None]
        assert await notes_of(app) == ["seen"]


# --- The forms of handlers


def keep(session: Session, value: str) -> HTTPResponse:
    """Write a note and answer with it."""
    session.add(Note(text=value))
    session.flush()
    return text(value)


async def async_handler(request: Request, value: str, session: Session) -> HTTPResponse:
    """Write with a coroutine function."""
    return keep(session, value)


def plain_handler(request: Request, value: str, session: Session) -> HTTPResponse:
    """Write with a function."""
    return keep(session, value)


def decorated(handler: Handler) -> Handler:
    """Check something before the handler, as an authorization decorator does."""

    @functools.wraps(handler)
    async def inner(request: Request, *args: Any, **kwargs: Any) -> Any:
        response = handler(request, *args, **kwargs)
        if hasattr(response, "__await__"):
            response = await response
        response.headers["x-decorated"] = "yes"
        return response

    return inner


def decorated_plainly(handler: Handler) -> Handler:
    """Pass the call on as it is."""

    @functools.wraps(handler)
    def inner(*args: Any, **kwargs: Any) -> Any:
        return handler(*args, **kwargs)

    return inner


def decorated_method(method: Handler) -> Handler:
    """Pass the call of a view's method on as it is."""

    @functools.wraps(method)
    async def inner(self: Any, request: Request, *args: Any, **kwargs: Any) -> Any:
        return await method(self, request, *args, **kwargs)

    return inner


def with_user(handler: Handler) -> Handler:
    """Give the handler an argument of its own."""

    @functools.wraps(handler)
    async def inner(request: Request, **kwargs: Any) -> Any:
        return await handler(request, user="Ada", **kwargs)

    return inner


async def handler_with_user(
    request: Request, value: str, user: str, session: Session
) -> HTTPResponse:
    """Take an argument from a decorator beside the injected one."""
    assert user == "Ada"
    return keep(session, value)


async def handler_with_prefix(
    prefix: str, request: Request, value: str, session: Session
) -> HTTPResponse:
    """Take a first argument that a partial has bound."""
    assert prefix == "prefix"
    return keep(session, value)


async def handler_with_option(
    request: Request, value: str, session: Session, option: str
) -> HTTPResponse:
    """Take an argument that a partial has bound by name."""
    assert option == "option"
    return keep(session, value)


async def handler_with_keyword(request: Request, value: str, *, session: Session) -> HTTPResponse:
    """Take the session by keyword alone."""
    return keep(session, value)


async def handler_with_text(request: Request, value: str, session: "Session") -> HTTPResponse:
    """Write the annotation as text."""
    return keep(session, value)


class Controller:
    """Handlers that are methods of an object."""

    async def handle(self, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write with an asyncio method."""
        return keep(session, value)

    def handle_plainly(self, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write with a plain method."""
        return keep(session, value)

    @classmethod
    async def of_class(cls, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write with a method of the class."""
        return keep(session, value)

    @staticmethod
    async def static(request: Request, value: str, session: Session) -> HTTPResponse:
        """Write with a static method."""
        return keep(session, value)


class CallableHandler:
    """An object that is a handler itself."""

    async def __call__(self, request: Request, value: str, session: Session) -> HTTPResponse:
        return keep(session, value)


class PlainCallableHandler:
    """The same without asyncio."""

    def __call__(self, request: Request, value: str, session: Session) -> HTTPResponse:
        return keep(session, value)


@dataclass(frozen=True)
class DataclassHandler:
    """A callable object whose class has annotations of its own."""

    greeting: str

    async def __call__(self, request: Request, value: str, session: Session) -> HTTPResponse:
        return keep(session, value)


class ObjectDecorator:
    """A decorator that is an object with the name and the annotations of its handler."""

    def __init__(self, handler: Handler) -> None:
        functools.update_wrapper(self, handler)
        self.handler = handler

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.handler(*args, **kwargs)


async def handler_with_database(
    bound: Database, request: Request, value: str, session: Session
) -> HTTPResponse:
    """Take a database that a partial has bound, not the app's."""
    assert bound.name == "bound"
    return keep(session, value)


class View(HTTPMethodView):
    """Methods of both kinds."""

    async def post(self, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write with an asyncio method."""
        return keep(session, value)

    def put(self, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write with a plain method."""
        return keep(session, value)


class InheritedView(View):
    """Has its methods from its base."""


class ViewOfMethods(HTTPMethodView):
    """A decorated method."""

    @decorated_method
    async def post(self, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write."""
        return keep(session, value)


class StaticView(HTTPMethodView):
    """A static method, as Sanic's guide has it with decorators."""

    @staticmethod
    @decorated
    async def post(request: Request, value: str, session: Session) -> HTTPResponse:
        """Write."""
        return keep(session, value)


class DecoratedView(HTTPMethodView):
    """Decorators of the whole view."""

    decorators = [decorated]  # noqa: RUF012 - Sanic's own way

    async def post(self, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write."""
        return keep(session, value)


class ViewWithArguments(HTTPMethodView):
    """A view whose objects are made with arguments."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix

    async def post(self, request: Request, value: str, session: Session) -> HTTPResponse:
        """Write."""
        assert self.prefix == "prefix"
        return keep(session, value)


def blueprint(**options: Any) -> Callable[[App], None]:
    """Return what adds the handler in a blueprint."""

    def add(app: App) -> None:
        bp = Blueprint("notes", **options)
        bp.add_route(async_handler, "/notes/<value>", methods=["POST"])
        app.blueprint(bp)

    return add


def nested_blueprints(app: App) -> None:
    """Add the handler in a blueprint in a group in a group."""
    bp = Blueprint("notes", url_prefix="/notes", version=2)
    bp.add_route(async_handler, "/<value>", methods=["POST"])
    inner = Blueprint.group(bp, url_prefix="/inner")
    app.blueprint(Blueprint.group(inner, url_prefix="/outer"))


def copied_blueprint(app: App) -> None:
    """Add the handler in a blueprint and in its copy."""
    bp = Blueprint("notes", version=1)
    bp.add_route(async_handler, "/notes/<value>", methods=["POST"])
    app.blueprint(bp)
    app.blueprint(bp.copy("notes2", version=2))


def route(handler: Handler, **options: Any) -> Callable[[App], None]:
    """Return what adds a handler to an app."""

    def add(app: App) -> None:
        app.add_route(handler, "/notes/<value>", methods=["POST"], **options)

    return add


def view(handler: Handler) -> Callable[[App], None]:
    """Return what adds a view to an app."""

    def add(app: App) -> None:
        app.add_route(handler, "/notes/<value>")

    return add


def attached_view(app: App) -> None:
    """Attach a view where its class is made."""

    class Attached(View, attach=app, uri="/notes/<value>", methods=["POST"]):
        pass


def decorator_routes(app: App) -> None:
    """Put one handler on several routes."""
    for name in ("other", "notes"):
        add: Handler = app.post(f"/{name}/<value>", name=name)
        add(async_handler)


FORMS: dict[str, tuple[Callable[[App], None], str]] = {
    "async def": (route(async_handler), "/notes/x"),
    "def": (route(plain_handler), "/notes/x"),
    "keyword only": (route(handler_with_keyword), "/notes/x"),
    "annotation as text": (route(handler_with_text), "/notes/x"),
    "decorators": (decorator_routes, "/notes/x"),
    "decorated": (route(decorated(async_handler)), "/notes/x"),
    "decorated def": (route(decorated(plain_handler)), "/notes/x"),
    "decorated plainly": (route(decorated_plainly(async_handler)), "/notes/x"),
    "decorated twice": (route(decorated(decorated_plainly(plain_handler))), "/notes/x"),
    "decorator with an argument": (route(with_user(handler_with_user)), "/notes/x"),
    "partial": (route(functools.partial(async_handler), name="n"), "/notes/x"),
    "partial with a first argument": (
        route(functools.partial(handler_with_prefix, "prefix"), name="n"),
        "/notes/x",
    ),
    "partial with a keyword": (
        route(functools.partial(handler_with_option, option="option"), name="n"),
        "/notes/x",
    ),
    "partial of partial": (
        route(functools.partial(functools.partial(decorated(plain_handler))), name="n"),
        "/notes/x",
    ),
    "bound method": (route(Controller().handle), "/notes/x"),
    "plain bound method": (route(Controller().handle_plainly), "/notes/x"),
    "class method": (route(Controller.of_class), "/notes/x"),
    "static method": (route(Controller.static), "/notes/x"),
    "callable object": (route(CallableHandler(), name="n"), "/notes/x"),
    "plain callable object": (route(PlainCallableHandler(), name="n"), "/notes/x"),
    "callable dataclass": (route(DataclassHandler("hello"), name="n"), "/notes/x"),
    "partial of a callable object": (
        route(functools.partial(CallableHandler()), name="n"),
        "/notes/x",
    ),
    "partial with a database": (
        route(functools.partial(handler_with_database, Database(name="bound")), name="n"),
        "/notes/x",
    ),
    "partial of a bound method": (
        route(functools.partial(Controller().handle), name="n"),
        "/notes/x",
    ),
    "decorated bound method": (route(decorated(Controller().handle)), "/notes/x"),
    "object that decorates": (route(ObjectDecorator(async_handler)), "/notes/x"),
    "view": (view(View.as_view()), "/notes/x"),
    "inherited view": (view(InheritedView.as_view()), "/notes/x"),
    "view of decorated methods": (view(ViewOfMethods.as_view()), "/notes/x"),
    "view of static methods": (view(StaticView.as_view()), "/notes/x"),
    "decorated view": (view(DecoratedView.as_view()), "/notes/x"),
    "view with arguments": (view(ViewWithArguments.as_view("prefix")), "/notes/x"),
    "attached view": (attached_view, "/notes/x"),
    "blueprint": (blueprint(), "/notes/x"),
    "blueprint with prefix": (blueprint(url_prefix="/api"), "/api/notes/x"),
    "blueprint with version": (blueprint(version=1), "/v1/notes/x"),
    "blueprint with all": (
        blueprint(url_prefix="/api", version=3, version_prefix="/rest/v"),
        "/rest/v3/api/notes/x",
    ),
    "blueprint groups": (nested_blueprints, "/v2/outer/inner/notes/x"),
    "copied blueprint": (copied_blueprint, "/v2/notes/x"),
    "version": (route(async_handler, version=4), "/v4/notes/x"),
    "strict slashes": (route(async_handler, strict_slashes=True), "/notes/x"),
    "host": (route(async_handler, host="localhost"), "/notes/x"),
    "stream": (route(async_handler, stream=True), "/notes/x"),
    "transactional": (route(transactional(commit=True)(async_handler)), "/notes/x"),
}


@pytest.mark.parametrize(("add", "path"), FORMS.values(), ids=FORMS)
async def test_every_form_of_handler_gets_the_session(
    app: App, add: Callable[[App], None], path: str
) -> None:
    """However a handler is written and added, its session is injected and committed."""
    add(app)
    async with serving(app) as client:
        response = await client.post(path, headers={"host": "localhost"})
        assert (response.status_code, response.text) == (200, "x")
        assert await notes_of(app) == ["x"]


async def test_each_method_of_a_view_has_its_own_annotations(app: App) -> None:
    """One method of a view may ask for a plain session, another for none at all."""

    class Mixed(HTTPMethodView):
        async def get(self, request: Request, session: AsyncReadSession) -> HTTPResponse:
            return json((await session.scalars(select(Note.text))).all())

        def post(self, request: Request, plain: Session) -> HTTPResponse:
            return keep(plain, "x")

        @transactional(commit=False)
        async def put(self, request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Note(text="lost"))
            await session.flush()
            return empty()

        async def patch(self, request: Request) -> HTTPResponse:
            return text("none")

    app.add_route(Mixed.as_view(), "/")
    async with serving(app) as client:
        assert (await client.post("/")).text == "x"
        assert (await client.put("/")).status_code == 204
        assert (await client.patch("/")).text == "none"
        assert (await client.get("/")).json() == ["x"]


async def test_one_handler_serves_two_apps(url: str, tmp_path: Path) -> None:
    """Each app injects its own database into the same function."""
    apps = [new_app(url, "first"), new_app(f"sqlite:///{tmp_path / 'second.db'}", "second")]
    for app in apps:
        route(async_handler)(app)
    async with serving(apps[0]) as first, serving(apps[1]) as second:
        assert (await first.post("/notes/a")).text == "a"
        assert (await second.post("/notes/b")).text == "b"
        assert [await notes_of(app) for app in apps] == [["a"], ["b"]]


async def test_the_decorator_stands_around_the_handler(app: App) -> None:
    """What a decorator does with the response is not lost."""
    route(decorated(async_handler))(app)
    async with serving(app) as client:
        assert (await client.post("/notes/x")).headers["x-decorated"] == "yes"


async def test_head_and_options_are_answered_for_handlers_with_sessions(app: App) -> None:
    """The routes that sanic-ext adds by itself work for functions, views and dependencies."""
    app.ext.add_dependency(Repository)
    ran: list[str] = []

    @app.get("/function")
    async def function(request: Request, session: Session) -> HTTPResponse:
        ran.append(str(session.scalar(select(func.count()).select_from(Note))))
        return text("body")

    @app.get("/dependency")
    async def dependency(request: Request, repository: Repository) -> HTTPResponse:
        ran.append(str(repository.count()))
        return text("body")

    class Both(HTTPMethodView):
        async def get(self, request: Request, session: AsyncSession) -> HTTPResponse:
            ran.append(str(await session.scalar(select(func.count()).select_from(Note))))
            return text("body")

    app.add_route(Both.as_view(), "/view")
    async with serving(app) as client:
        for path in ("/function", "/dependency", "/view"):
            head = await client.head(path)
            assert (path, head.status_code, head.text) == (path, 200, "")
            options = await client.options(path)
            assert options.status_code == 204
            assert "GET" in options.headers["allow"]
        assert ran == ["0", "0", "0"]


async def test_a_head_handler_of_ones_own_gets_its_session(app: App) -> None:
    """A view that answers HEAD by itself has its own annotations there."""

    class Both(HTTPMethodView):
        async def get(self, request: Request, session: Session) -> HTTPResponse:
            return text(type(session).__name__)

        async def head(self, request: Request, session: AsyncSession) -> HTTPResponse:
            return empty(headers={"x-session": type(session).__name__})

    app.add_route(Both.as_view(), "/")
    async with serving(app) as client:
        assert (await client.head("/")).headers["x-session"] == "AsyncSession"
        assert (await client.get("/")).text == "Session"


async def test_what_needs_no_session_starts_beside_it(app: App, tmp_path: Path) -> None:
    """Static routes, websockets, redirects and handlers without annotations work as before."""
    (tmp_path / "file.txt").write_text("static")
    app.static("/static", tmp_path / "file.txt", name="file")
    app.static("/folder", tmp_path, name="folder")
    without_annotations: Handler = lambda request: text("lambda")  # noqa: E731
    app.add_route(without_annotations, "/lambda", name="lambda")

    async def socket(request: Request, ws: Websocket) -> None:
        await ws.send("hello")

    async def untyped(request, ws):  # type: ignore[no-untyped-def]
        await ws.send("hello")

    app.add_websocket_route(socket, "/socket")
    app.add_websocket_route(untyped, "/untyped")

    async with serving(app) as client:
        assert (await client.get("/static")).text == "static"
        assert (await client.get("/folder/file.txt")).text == "static"
        assert (await client.get("/lambda")).text == "lambda"
        assert (await client.get("/nowhere")).status_code == 404
        assert (await client.delete("/lambda")).status_code == 405


# --- Spellings of annotations


Injected = Annotated[Session, "any metadata"]


async def test_optional_and_annotated_sessions_are_injected(app: App) -> None:
    """``Session | None``, ``Optional`` and ``Annotated``, also together and with a default."""

    @app.get("/union")
    async def union(request: Request, session: Session | None) -> HTTPResponse:
        return text(type(session).__name__)

    @app.get("/none-first")
    async def none_first(request: Request, session: None | Session) -> HTTPResponse:  # noqa: RUF036
        return text(type(session).__name__)

    @app.get("/default")
    async def default(request: Request, session: AsyncSession | None = None) -> HTTPResponse:
        return text(type(session).__name__)

    @app.get("/optional")
    def optional(request: Request, session: Optional[Session]) -> HTTPResponse:  # noqa: UP045
        return text(type(session).__name__)

    @app.get("/annotated")
    async def annotated(request: Request, session: Injected) -> HTTPResponse:
        return text(type(session).__name__)

    @app.get("/annotated-optional")
    async def annotated_optional(
        request: Request, session: Annotated[AsyncReadSession | None, 1] = None
    ) -> HTTPResponse:
        return text(type(session).__name__)

    @app.get("/optional-annotated")
    async def optional_annotated(
        request: Request, session: Annotated[ReadSession, 1] | None = None
    ) -> HTTPResponse:
        return text(type(session).__name__)

    @app.get("/database")
    async def database(request: Request, db: Database | None = None) -> HTTPResponse:
        return text(type(db).__name__)

    expected = {
        "union": "Session",
        "none-first": "Session",
        "default": "AsyncSession",
        "optional": "Session",
        "annotated": "Session",
        "annotated-optional": "AsyncReadSession",
        "optional-annotated": "ReadSession",
        "database": "Database",
    }
    async with serving(app) as client:
        assert {path: (await client.get(f"/{path}")).text for path in expected} == expected


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import a module from its source."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(source: str) -> Any:
        (tmp_path / "module_of_a_test.py").write_text(source)
        return import_module("module_of_a_test")

    yield load
    sys.modules.pop("module_of_a_test", None)


FUTURE_MODULE = """
from __future__ import annotations

from typing import TYPE_CHECKING

from sanic import Blueprint, Request, text
from sanic.views import HTTPMethodView
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

bp = Blueprint("future")

@bp.get("/function")
async def function(request: Request, session: Session):
    return text(str(session.scalar(sql("SELECT 1"))))

@bp.get("/plain")
def plain(request: Request, session: Session | None = None):
    return text(str(session.scalar(sql("SELECT 1"))))

class View(HTTPMethodView, attach=bp, uri="/view"):
    async def get(self, request: Request, session: AsyncSession):
        return text(str(await session.scalar(sql("SELECT 1"))))

class Repository:
    def __init__(self, session: Session) -> None:
        self.one = session.scalar(sql("SELECT 1"))

@bp.get("/dependency")
async def dependency(request: Request, repository: Repository):
    return text(str(repository.one))
"""


async def test_modules_with_postponed_annotations_work(
    app: App, load: Callable[[str], Any]
) -> None:
    """``from __future__ import annotations`` changes nothing."""
    module = load(FUTURE_MODULE)
    app.blueprint(module.bp)
    app.ext.add_dependency(module.Repository)
    async with serving(app) as client:
        for path in ("function", "plain", "view", "dependency"):
            response = await client.get(f"/{path}")
            assert (path, response.text) == (path, "1")


# --- Dependencies


class Repository:
    """Keeps a plain session for later."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def count(self) -> int:
        """Count the notes."""
        return self.session.scalar(select(func.count()).select_from(Note)) or 0


@dataclass
class Counted:
    """Asks for a session as a dataclass does, and uses it at once."""

    session: Session

    def __post_init__(self) -> None:
        self.count = self.session.scalar(select(func.count()).select_from(Note))


class Service:
    """Depends on what depends on a session."""

    def __init__(self, repository: Repository, session: AsyncSession) -> None:
        self.repository = repository
        self.session = session


class Facade:
    """Depends on that, in turn."""

    def __init__(self, service: Service, request: Request) -> None:
        self.service = service
        self.path = request.path


class Sink:
    """What a constructor function makes."""

    def __init__(self, text: str) -> None:
        self.text = text


def make_sink(request: Request, session: Session) -> Sink:
    """Write with a plain session, without asyncio."""
    session.add(Note(text="plain"))
    session.flush()
    return Sink(session.scalars(select(Note.text)).one())


async def make_sink_async(session: AsyncSession) -> Sink:
    """Write with an asyncio session."""
    session.add(Note(text="async"))
    return Sink((await session.scalars(select(Note.text))).one())


async def make_sink_bridged(session: Session) -> Sink:
    """Write with a plain session in a coroutine function."""
    session.add(Note(text="bridged"))
    return Sink(session.scalars(select(Note.text)).one())


@pytest.mark.parametrize(
    ("constructor", "expected"),
    [(make_sink, "plain"), (make_sink_async, "async"), (make_sink_bridged, "bridged")],
)
async def test_constructor_functions_write_in_the_handlers_transaction(
    app: App, constructor: Handler, expected: str
) -> None:
    """A dependency's function, with or without asyncio, uses the session of its request."""
    app.ext.add_dependency(Sink, constructor)

    @app.post("/<status:int>")
    async def handler(request: Request, status: int, sink: Sink) -> HTTPResponse:
        return text(sink.text, status=status)

    async with serving(app) as client:
        assert (await client.post("/400")).text == expected
        assert await notes_of(app) == []
        assert (await client.post("/200")).text == expected
        assert await notes_of(app) == [expected]


async def test_nested_dependencies_share_one_session(app: App) -> None:
    """Three levels deep, everybody has the session of the handler and its transaction."""
    for dependency in (Repository, Service, Facade):
        app.ext.add_dependency(dependency)

    @app.post("/")
    async def handler(
        request: Request, facade: Facade, repository: Repository, session: Session
    ) -> HTTPResponse:
        session.add(Note(text="x"))
        session.flush()
        service = facade.service
        same = {session, repository.session, service.repository.session}
        return json(
            [len(same), service.session.sync_session is session, repository.count(), facade.path]
        )

    async with serving(app) as client:
        assert (await client.post("/")).json() == [1, True, 1, "/"]
        assert await notes_of(app) == ["x"]


@pytest.mark.parametrize("dependency", [Repository, Counted])
async def test_plain_sessions_of_dependencies_work_in_every_handler(
    app: App, dependency: type
) -> None:
    """A repository's plain session is used in the constructor or in the handler, of any kind."""
    app.ext.add_dependency(dependency)

    def number(made: Any) -> HTTPResponse:
        return text(str(made.count() if callable(made.count) else made.count))

    @app.get("/async")
    async def in_async(request: Request, made: dependency) -> HTTPResponse:  # type: ignore[valid-type]
        return number(made)

    @app.get("/plain")
    def in_plain(request: Request, made: dependency) -> HTTPResponse:  # type: ignore[valid-type]
        return number(made)

    class Viewed(HTTPMethodView, attach=app, uri="/view"):
        async def get(self, request: Request, made: dependency) -> HTTPResponse:  # type: ignore[valid-type]
            return number(made)

    @app.get("/beside")
    async def beside(
        request: Request,
        session: AsyncSession,
        made: dependency,  # type: ignore[valid-type]
    ) -> HTTPResponse:
        await session.execute(select(1))
        return number(made)

    async with serving(app) as client:
        for path in ("async", "plain", "view", "beside"):
            response = await client.get(f"/{path}")
            assert (path, response.status_code, response.text) == (path, 200, "0")


class Aware:
    """Asks for the other things of this package."""

    def __init__(
        self,
        db: Database,
        engine: AsyncEngine,
        read: ReadSession,
        async_read: AsyncReadSession,
        maybe: Session | None,
    ) -> None:
        self.good = engine is db.engine
        self.classes = [type(read).__name__, type(async_read).__name__, type(maybe).__name__]


async def test_dependencies_get_everything_that_handlers_get(app: App) -> None:
    """Constructors may ask for the database, its engine, read sessions and optional ones."""
    app.ext.add_dependency(Aware)

    @app.get("/")
    async def handler(request: Request, aware: Aware) -> HTTPResponse:
        return json([aware.good, *aware.classes])

    async with serving(app) as client:
        expected = [True, "ReadSession", "AsyncReadSession", "Session"]
        assert (await client.get("/")).json() == expected


async def test_dependencies_added_while_the_server_starts_are_found(app: App) -> None:
    """The app's own listeners of default priority may still add dependencies."""

    @app.before_server_start
    async def add(app: App) -> None:
        app.ext.add_dependency(Repository)

    @app.get("/")
    async def handler(request: Request, repository: Repository) -> HTTPResponse:
        return text(str(repository.count()))

    async with serving(app) as client:
        assert (await client.get("/")).text == "0"


class OwnAsyncSession(AsyncSession):
    """A session that the app makes by itself."""


class Keeper:
    """Depends on an asyncio session."""

    def __init__(self, session: AsyncSession) -> None:
        self.session = session


async def test_what_the_app_itself_registers_holds_everywhere(app: App) -> None:
    """The app's own constructor for AsyncSession serves handlers and dependencies alike."""

    def make() -> AsyncSession:
        return OwnAsyncSession()

    app.ext.add_dependency(AsyncSession, make)
    app.ext.add_dependency(Keeper)

    @app.get("/")
    async def handler(
        request: Request, session: AsyncSession, keeper: Keeper, plain: Session
    ) -> HTTPResponse:
        names = [type(found).__name__ for found in (session, keeper.session, plain)]
        return json(names)

    async with serving(app) as client:
        expected = ["OwnAsyncSession", "OwnAsyncSession", "Session"]
        assert (await client.get("/")).json() == expected


async def test_a_failing_dependency_rolls_back(app: App) -> None:
    """When the second dependency raises, what the first wrote is gone, and nothing is held."""

    class Refused:
        pass

    def refuse() -> Refused:
        raise RuntimeError("refused")

    app.ext.add_dependency(Sink, make_sink)
    app.ext.add_dependency(Refused, refuse)

    @app.post("/")
    async def handler(request: Request, sink: Sink, refused: Refused) -> HTTPResponse:
        raise AssertionError("not reached")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        assert await notes_of(app) == []
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_path_parameters_reach_constructors(app: App) -> None:
    """A constructor takes the route's parameters beside the session."""

    def find_author(session: Session, author_id: int) -> Author:
        return session.get_one(Author, author_id)

    app.ext.add_dependency(Author, find_author)

    @app.get("/<author_id:int>")
    async def handler(request: Request, author_id: int, author: Author) -> HTTPResponse:
        return json([author.name, [note.text for note in author.notes]])

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add(Author(id=7, name="Ada", notes=[Note(text="a")]))
        assert (await client.get("/7")).json() == ["Ada", ["a"]]


async def test_current_session_is_the_injected_one(app: App) -> None:
    """A helper called from a handler finds the same session, in the handler's form."""

    @app.get("/async")
    async def in_async(request: Request, session: AsyncSession) -> HTTPResponse:
        return json(current_session() is session)

    @app.get("/plain")
    async def in_plain(request: Request, session: Session) -> HTTPResponse:
        return json(current_session() is session)

    async with serving(app) as client:
        assert (await client.get("/async")).json() is True
        assert (await client.get("/plain")).json() is True


# --- sanic-ext's other parts


class Body(BaseModel):
    """A note as a client sends it."""

    text: str


async def test_validated_bodies_come_beside_sessions(app: App) -> None:
    """``@validate`` gives the body, this package the session; a wrong body is a 400."""

    @app.post("/")
    @validate(json=Body)
    async def handler(request: Request, body: Body, session: Session) -> HTTPResponse:
        return keep(session, body.text)

    @app.post("/query")
    @validate(query=Body)
    async def query(request: Request, session: AsyncSession, query: Body) -> HTTPResponse:
        session.add(Note(text=query.text))
        return text(query.text)

    class Validated(HTTPMethodView, attach=app, uri="/view", methods=["POST"]):
        @validate(json=Body)
        async def post(self, request: Request, body: Body, session: Session) -> HTTPResponse:
            return keep(session, body.text)

    async with serving(app) as client:
        assert (await client.post("/", json={"text": "a"})).text == "a"
        assert (await client.post("/query?text=b")).text == "b"
        assert (await client.post("/view", json={"text": "c"})).text == "c"
        assert (await client.post("/", json={"wrong": 1})).status_code == 400
        assert await notes_of(app) == ["a", "b", "c"]


async def test_sessions_are_injected_without_sanic_ext(app: App) -> None:
    """With ``AUTO_EXTEND = False`` handlers are served, and sanic-ext stays away."""
    app.config.AUTO_EXTEND = False
    for add, _ in (FORMS["async def"],):
        add(app)

    @app.get("/")
    async def handler(request: Request, session: AsyncSession | None, db: Database) -> HTTPResponse:
        assert session is not None
        return text(str(await session.scalar(select(1))))

    class Viewed(HTTPMethodView, attach=app, uri="/view"):
        def get(self, request: Request, session: Session) -> HTTPResponse:
            return text(str(session.scalar(select(1))))

    async with serving(app) as client:
        assert (await client.get("/")).text == "1"
        assert (await client.get("/view")).text == "1"
        assert (await client.post("/notes/x")).text == "x"
        assert (await client.get("/docs")).status_code == 404
        assert await notes_of(app) == ["x"]


@pytest.mark.parametrize("injection", [True, False])
async def test_sanic_ext_without_its_injection(app: App, injection: bool) -> None:
    """Sessions come too when sanic-ext was set up with extensions of the app's choice."""
    Extend(app, built_in_extensions=injection)

    @app.get("/")
    async def handler(request: Request, session: Session) -> HTTPResponse:
        return text(str(session.scalar(select(1))))

    async with serving(app) as client:
        assert (await client.get("/")).text == "1"


@pytest.mark.parametrize("when", ["before", "after"])
async def test_sanic_ext_may_be_set_up_before_or_after(url: str, when: str) -> None:
    """``Extend(app)`` may come before ``app.blueprint(...)`` or after it."""
    app: App = Sanic("app")
    app.config.OAS = True
    bp = DatabaseBlueprint(url=url, metadata=Base.metadata, create_tables=True)
    if when == "before":
        Extend(app)
    app.blueprint(bp)
    if when == "after":
        Extend(app)
    app.ext.add_dependency(Repository)

    @app.get("/")
    async def handler(request: Request, session: Session, repository: Repository) -> HTTPResponse:
        return text(f"{session is repository.session} {repository.count()}")

    async with serving(app) as client:
        assert (await client.get("/")).text == "True 0"
        assert (await client.get("/docs/openapi.json")).status_code == 200


# --- The OpenAPI document


def documented_app(url: str | None) -> App:
    """Return an app with documented handlers, with sessions if there is a database."""
    app: App = new_app(url) if url else Sanic("app")
    wanted: Any = Session if url else int

    def documented(request: Request, item_id: int, session: wanted = None) -> HTTPResponse:
        """Read an item.

        The longer description.

        openapi:
        ---
        parameters:
          - name: item_id
            in: path
            description: The number of the item
        responses:
          '200':
            description: The item
        """
        return empty()

    documented.__annotations__["session"] = wanted

    @openapi.summary("By decorator")
    @openapi.description("What it does")
    @openapi.parameter("limit", int, "query")
    @openapi.body({"application/json": {"name": str}})
    @openapi.response(201, {"application/json": {"id": int}}, "Created")
    @openapi.tag("things")
    @openapi.secured("token")
    async def by_decorator(request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    by_decorator.__annotations__["session"] = wanted

    @openapi.exclude()
    async def excluded(request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    excluded.__annotations__["session"] = wanted

    @openapi.deprecated()
    @openapi.operation("definedName")
    @openapi.definition(summary="Defined", response={"text/plain": str})
    def defined(request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    defined.__annotations__["session"] = wanted

    async def got(self: Any, request: Request, session: Any = None) -> HTTPResponse:
        """Get by a view."""
        return empty()

    @openapi.summary("Posted by a view")
    async def posted(self: Any, request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    for method in (got, posted):
        method.__annotations__["session"] = wanted
    view_class: Any = type("Viewed", (HTTPMethodView,), {"get": got, "post": posted})

    class Documented:
        @openapi.summary("A method's summary")
        async def handle(self, request: Request, session: Any = None) -> HTTPResponse:
            return empty()

    Documented.handle.__annotations__["session"] = wanted

    bp = Blueprint("library", url_prefix="/library", version=1)
    plain: list[Handler] = [documented, defined]
    bp.add_route(plain[0], "/items/<item_id:int>")
    app.blueprint(bp)
    app.add_route(Documented().handle, "/method")
    app.add_route(by_decorator, "/decorated", methods=["POST", "PUT"])
    app.add_route(excluded, "/excluded")
    app.add_route(plain[1], "/defined")
    app.add_route(view_class.as_view(), "/view")
    app.add_route(functools.partial(decorated(documented)), "/partial/<item_id:int>", name="p")
    return app


async def document_of(app: App) -> Any:
    """Return the OpenAPI document of an app."""
    app.config.OAS = True
    async with serving(app) as client:
        return (await client.get("/docs/openapi.json")).json()


@pytest.fixture
def fresh_openapi(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget sanic-ext's documents, of which there is one a process."""
    from sanic_ext.extensions.openapi.builders import OperationStore, SpecificationBuilder

    def forget() -> None:
        monkeypatch.setattr(SpecificationBuilder, "_singleton", None)
        monkeypatch.setattr(OperationStore, "_singleton", None)

    forget()
    return forget


async def test_the_openapi_document_shows_no_trace_of_sessions(
    url: str, fresh_openapi: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document is the one that the same app has without a database."""
    expected = await document_of(documented_app(None))
    fresh_openapi()
    monkeypatch.setattr(Sanic, "_app_registry", {})
    document = await document_of(documented_app(url))
    assert "session" not in str(document).lower()
    assert document["paths"]["/decorated"]["post"]["summary"] == "By decorator"
    assert document["paths"]["/v1/library/items/{item_id}"]["get"]["summary"] == "Read an item."
    assert document["paths"]["/method"]["get"]["summary"] == "A method's summary"
    assert document["paths"] == expected["paths"]
    assert document == expected


# --- Mistakes that are told at start


async def error_at_start(app: App) -> str:
    """Return the text of the error with which the app does not start."""
    with pytest.raises(ConfigurationError) as caught:
        async with serving(app):
            pass
    return str(caught.value)


class ReportsSession(Session):
    """The session of a database that is not registered."""


class ReportsAsyncSession(AsyncSession):
    """The same, with asyncio."""


@pytest.mark.parametrize("form", ["async", "optional", "view", "default"])
async def test_a_session_of_an_unregistered_database_is_refused_at_start(
    app: App, form: str
) -> None:
    """The error names the handler, the parameter, the class, what there is, and the remedy."""

    async def reports(request: Request, reports_session: ReportsSession) -> HTTPResponse:
        raise AssertionError("not reached")

    async def optional(
        request: Request, reports_session: ReportsAsyncSession | None
    ) -> HTTPResponse:
        raise AssertionError("not reached")

    async def default(
        request: Request, reports_session: ReportsSession | None = None
    ) -> HTTPResponse:
        raise AssertionError("not reached")

    class Reports(HTTPMethodView):
        async def get(self, request: Request, reports_session: ReportsSession) -> HTTPResponse:
            raise AssertionError("not reached")

    handlers: dict[str, Handler] = {
        "async": reports,
        "optional": optional,
        "default": default,
        "view": Reports.as_view(),
    }
    app.add_route(handlers[form], "/reports", name="reports")
    message = await error_at_start(app)
    assert "app.reports" in message
    wanted = "ReportsAsyncSession" if form == "optional" else "ReportsSession"
    assert f"'reports_session: {wanted}'" in message
    assert "AsyncReadSession, AsyncSession, ReadSession, Session" in message
    assert "DatabaseBlueprint('<name>'" in message


async def test_an_ambiguous_union_is_refused_at_start(app: App) -> None:
    """Nobody can tell which of two sessions is meant."""

    @app.get("/either")
    async def either(request: Request, session: Session | AsyncSession) -> HTTPResponse:
        raise AssertionError("not reached")

    message = await error_at_start(app)
    assert "app.either" in message
    assert "'session: " in message


async def test_an_unregistered_session_in_a_dependency_stops_the_start(app: App) -> None:
    """A constructor that asks for a session that nobody has is told at start too."""

    class Reporter:
        def __init__(self, session: ReportsSession) -> None:
            raise AssertionError("not reached")

    app.ext.add_dependency(Reporter)

    @app.get("/")
    async def handler(request: Request, reporter: Reporter) -> HTTPResponse:
        raise AssertionError("not reached")

    with pytest.raises(Exception, match="ReportsSession"):
        async with serving(app):
            pass


@pytest.mark.parametrize(
    "wanted", [Session, AsyncSession, ReadSession, AsyncReadSession, Session | None]
)
async def test_a_session_in_a_websocket_handler_is_refused_at_start(app: App, wanted: Any) -> None:
    """The error tells to open a session for each message."""

    async def chat(request: Request, ws: Websocket, session: Any) -> None:
        raise AssertionError("not reached")

    chat.__annotations__["session"] = wanted
    app.add_websocket_route(chat, "/chat")
    message = await error_at_start(app)
    assert "websocket handler 'app.chat'" in message
    assert "db.session()" in message


UNRESOLVED_MODULE = """
from __future__ import annotations

from typing import TYPE_CHECKING

from sanic import Request, text
from sanic.views import HTTPMethodView

if TYPE_CHECKING:
    from sqlalchemy.orm import Session
    from sanic_db_bp import Database

async def function(request: Request, session: Session):
    return text("not reached")

async def socket(request: Request, ws, db: Database):
    pass

class View(HTTPMethodView):
    async def get(self, request: Request, session: Session):
        return text("not reached")
"""


@pytest.mark.parametrize("form", ["function", "socket", "view"])
async def test_imports_for_type_checking_alone_are_explained_at_start(
    app: App, load: Callable[[str], Any], form: str
) -> None:
    """A name that is not there when the app runs is told with the handler and the remedy."""
    module = load(UNRESOLVED_MODULE)
    if form == "function":
        app.add_route(module.function, "/")
    elif form == "socket":
        app.add_websocket_route(module.socket, "/")
    else:
        app.add_route(module.View.as_view(), "/", name="view")
    message = await error_at_start(app)
    assert f"app.{form}" in message
    assert "TYPE_CHECKING" in message
    assert ("Database" if form == "socket" else "Session") in message


UNRELATED_MODULE = """
from __future__ import annotations

from typing import TYPE_CHECKING

from sanic import text

if TYPE_CHECKING:
    from somewhere import Repository

async def handler(request, repository: Repository):
    return text("not reached")
"""


async def test_other_unresolved_names_stay_errors_of_sanic_ext(
    app: App, load: Callable[[str], Any]
) -> None:
    """A dependency that cannot be resolved stops the start as it does without this package."""
    app.add_route(load(UNRELATED_MODULE).handler, "/")
    with pytest.raises(NameError, match="Repository"):
        async with serving(app):
            pass


# --- Websockets


async def test_a_websocket_handler_opens_a_session_for_each_message(
    app: App, websocket: Callable[[httpx.AsyncClient, str], Any]
) -> None:
    """``db: Database`` is injected beside path parameters and dependencies."""
    app.ext.add_dependency(Sink, make_sink)

    async def chat(request: Request, ws: Websocket, room: str, db: Database, sink: Sink) -> None:
        async for message in ws:
            async with db.session() as session:
                session.add(Note(text=f"{room}: {message}"))
            await ws.send(sink.text)

    app.add_websocket_route(chat, "/<room>")
    async with serving(app) as client:
        async with websocket(client, "/lobby") as socket:
            for message in ("a", "b"):
                await socket.send(message)
                assert await socket.recv() == "plain"
        assert await notes_of(app) == ["plain", "lobby: a", "lobby: b"]


@pytest.fixture
def websocket() -> Callable[[httpx.AsyncClient, str], Any]:
    """Open a websocket at a path of the served app."""
    from websockets.asyncio.client import ClientConnection, connect

    @asynccontextmanager
    async def open_socket(client: httpx.AsyncClient, path: str) -> AsyncIterator[ClientConnection]:
        url = str(client.base_url).replace("http", "ws").rstrip("/")
        async with connect(f"{url}{path}", proxy=None) as connection:
            yield connection

    return open_socket


# --- Starting twice


def add_counting_handlers(app: App) -> list[str]:
    """Add handlers that tell how often they were called."""
    calls: list[str] = []
    app.ext.add_dependency(Sink, make_sink)

    @app.post("/<value>")
    async def handler(request: Request, value: str, session: Session, db: Database) -> HTTPResponse:
        calls.append(value)
        session.add(Note(text=value))
        session.flush()
        return json(session.scalar(select(func.count()).select_from(Note)))

    @app.get("/")
    async def root(request: Request, sink: Sink, session: AsyncSession) -> HTTPResponse:
        calls.append("sink")
        return json(sink.text)

    async def socket(request: Request, ws: Websocket, db: Database) -> None:
        async with db.session() as session:
            await ws.send(str(await session.scalar(select(func.count()).select_from(Note))))

    app.add_websocket_route(socket, "/ws")

    class Viewed(HTTPMethodView, attach=app, uri="/view"):
        async def get(self, request: Request, session: Session) -> HTTPResponse:
            return json(session.scalar(select(func.count()).select_from(Note)))

    return calls


async def test_an_app_may_be_served_again(app: App) -> None:
    """A second start wraps nothing twice and finds the data in the file."""
    calls = add_counting_handlers(app)
    for number in (1, 2, 3):
        async with serving(app) as client:
            assert (await client.post("/x")).json() == number
            assert (await client.get("/view")).json() == number
            assert (await client.head("/view")).status_code == 200
            found: Any = app.router.find_route_by_view_name("handler")
            handler = found.handler
            assert handler.__wrapped__.__name__ == "handler"
            assert not hasattr(handler.__wrapped__, "__wrapped__")
    assert calls == ["x", "x", "x"]


def test_sanic_testings_client_restarts_the_server(app: App) -> None:
    """Each request of ``test_client`` is a start of its own; the file keeps the data."""
    add_counting_handlers(app)
    for number in (1, 2):
        _, response = app.test_client.post("/x")
        assert (response.status, response.json) == (200, number)
    _, response = app.test_client.get("/")
    assert response.status == 500, "make_sink finds more than one note"


def test_sanic_testings_reusable_client_works(app: App) -> None:
    """One start, several requests."""
    add_counting_handlers(app)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    with ReusableClient(app, host="127.0.0.1", port=port) as client:
        for number in (1, 2):
            _, response = client.post("/x")
            assert (response.status, response.json) == (200, number)


async def test_sanic_testings_asgi_client_works(app: App) -> None:
    """The ASGI client starts the app for each request too."""
    add_counting_handlers(app)
    for number in (1, 2):
        _, response = await app.asgi_client.post("/x")
        assert (response.status, response.json) == (200, number)
    _, response = await app.asgi_client.get("/view")
    assert response.json == 2
