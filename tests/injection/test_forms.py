"""What a handler asks for reaches it, whatever form the handler has."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sanic import Blueprint, HTTPResponse, Request, Websocket, empty, json, text
from sanic.views import HTTPMethodView
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import AsyncReadSession, Database, transactional
from tests.injection.helpers import (
    App,
    Handler,
    Note,
    Repository,
    decorated,
    keep,
    new_app,
    notes_of,
)
from tests.serving import serving


async def async_handler(request: Request, value: str, session: Session) -> HTTPResponse:
    """Write with a coroutine function."""
    return keep(session, value)


def plain_handler(request: Request, value: str, session: Session) -> HTTPResponse:
    """Write with a function."""
    return keep(session, value)


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


class ClassMethodView(HTTPMethodView):
    """A class method."""

    @classmethod
    async def post(cls, request: Request, value: str, session: Session) -> HTTPResponse:
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
    "view of class methods": (view(ClassMethodView.as_view()), "/notes/x"),
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
    app.config.update(HTTP_AUTO_HEAD=True, HTTP_AUTO_OPTIONS=True)
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
