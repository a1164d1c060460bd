"""The session of the current request or block is found without asking for it."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sanic import HTTPResponse, Request, Sanic, empty, json, text
from sanic.exceptions import NotFound
from sanic.response import BaseHTTPResponse, ResponseStream
from sqlalchemy import ForeignKey, String, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
    selectinload,
)

from sanic_db_bp import (
    AsyncReadSession,
    Database,
    DatabaseBlueprint,
    NoCurrentSession,
    SessionFinished,
    current_session,
    on_commit,
)
from tests.serving import serving

App = Sanic[Any, Any]


class Base(DeclarativeBase):
    """The tables of these tests."""


class Note(Base):
    """A text."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(50), unique=True)


class ReportsSession(Session):
    """The plain session of a second database."""


class ReportsAsyncSession(AsyncSession):
    """The asyncio session of a second database."""


@pytest.fixture
def blueprint(tmp_path: Path) -> Callable[..., DatabaseBlueprint]:
    """Make a blueprint of an empty SQLite database with the table of notes."""

    def make(name: str = "db", **options: Any) -> DatabaseBlueprint:
        url = f"sqlite:///{tmp_path / name}.db"
        return DatabaseBlueprint(
            name, url=url, metadata=Base.metadata, create_tables=True, **options
        )

    return make


@pytest.fixture
def app(blueprint: Callable[..., DatabaseBlueprint]) -> App:
    """An app with one database."""
    app: App = Sanic("app")
    app.blueprint(blueprint())
    return app


async def notes_of(database: Database) -> list[str]:
    """Return what was committed, as another connection sees it."""
    async with database.read_session() as session:
        return list(await session.scalars(select(Note.text).order_by(Note.id)))


# --- request.ctx.session


async def test_handlers_find_the_session_on_the_request(app: App) -> None:
    """Without a parameter; committed on success, rolled back on an error status."""

    @app.post("/<value>/<status:int>")
    async def handler(request: Request, value: str, status: int) -> HTTPResponse:
        request.ctx.session.add(Note(text=value))
        await request.ctx.session.flush()
        return empty(status)

    async with serving(app) as client:
        assert (await client.post("/good/200")).status_code == 200
        assert (await client.post("/bad/400")).status_code == 400
        assert await notes_of(app.ctx.db) == ["good"]
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_the_requests_session_is_the_injected_one(app: App) -> None:
    """Context, parameter and ``current_session()`` are one object."""

    @app.get("/async")
    async def in_async(request: Request, session: AsyncSession) -> HTTPResponse:
        return json([request.ctx.session is session, current_session() is session])

    @app.get("/plain")
    def in_plain(request: Request, session: Session) -> HTTPResponse:
        found = current_session()
        return json([request.ctx.session.sync_session is session, found is session])

    async with serving(app) as client:
        assert (await client.get("/async")).json() == [True, True]
        assert (await client.get("/plain")).json() == [True, True]


async def test_middleware_before_the_handler_shares_its_transaction(app: App) -> None:
    """What a request middleware writes is committed with the handler, or not at all."""

    @app.on_request
    async def audit(request: Request) -> None:
        request.ctx.session.add(Note(text=f"audit {request.path}"))
        await request.ctx.session.flush()

    @app.get("/injected/<status:int>")
    async def injected(request: Request, status: int, session: Session) -> HTTPResponse:
        return json(session.scalars(select(Note.text)).all(), status)

    @app.get("/untouched/<status:int>")
    async def untouched(request: Request, status: int) -> HTTPResponse:
        return empty(status)

    @app.get("/plain/<status:int>")
    def plain(request: Request, status: int) -> HTTPResponse:
        return empty(status)

    async with serving(app) as client:
        for path in ("/injected", "/untouched", "/plain"):
            assert (await client.get(f"{path}/400")).status_code == 400
            assert (await client.get(f"{path}/200")).status_code == 200
        expected = ["audit /injected/200", "audit /untouched/200", "audit /plain/200"]
        assert await notes_of(app.ctx.db) == expected


@pytest.mark.parametrize("status", [200, 403])
async def test_middleware_that_answers_first_is_rolled_back(app: App, status: int) -> None:
    """Without a handler the work of a middleware has no transaction to succeed in."""

    @app.on_request
    async def refuse(request: Request) -> HTTPResponse:
        request.ctx.session.add(Note(text="lost"))
        await request.ctx.session.flush()
        return empty(status)

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        raise AssertionError("not reached")

    async with serving(app) as client:
        assert (await client.get("/")).status_code == status
        assert app.ctx.db.pool_status()["checked_out"] == 0
        assert await notes_of(app.ctx.db) == []


async def test_middleware_that_raises_is_rolled_back(app: App) -> None:
    """An exception before the handler ends the transaction."""

    @app.on_request
    async def fail(request: Request) -> None:
        request.ctx.session.add(Note(text="lost"))
        await request.ctx.session.flush()
        raise RuntimeError("failed")

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        raise AssertionError("not reached")

    async with serving(app) as client:
        assert (await client.get("/")).status_code == 500
        assert app.ctx.db.pool_status()["checked_out"] == 0
        assert await notes_of(app.ctx.db) == []


async def test_middleware_on_a_missing_route_is_rolled_back(app: App) -> None:
    """A 404 comes without a handler too."""

    @app.on_request
    async def audit(request: Request) -> None:
        request.ctx.session.add(Note(text="lost"))
        await request.ctx.session.flush()

    async with serving(app) as client:
        assert (await client.get("/nowhere")).status_code == 404
        assert app.ctx.db.pool_status()["checked_out"] == 0
        assert await notes_of(app.ctx.db) == []


async def test_response_middleware_has_a_transaction_of_its_own(app: App) -> None:
    """After the handler's COMMIT a response middleware may write; its work is committed too."""

    async def log(request: Any, response: Any) -> None:
        request.ctx.session.add(Note(text=f"answered {response.status}"))

    app.register_middleware(log, "response")

    @app.post("/<value>")
    async def handler(request: Request, value: str, session: Session) -> HTTPResponse:
        session.add(Note(text=value))
        return empty()

    @app.get("/")
    async def without(request: Request) -> HTTPResponse:
        return text("good")

    async with serving(app) as client:
        assert (await client.post("/x")).status_code == 204
        assert (await client.get("/")).status_code == 200
        assert await notes_of(app.ctx.db) == ["x", "answered 204", "answered 200"]
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_exception_handlers_have_a_transaction_of_their_own(app: App) -> None:
    """What the handler did is gone; what the exception handler commits by itself is kept."""

    class Known(Exception):
        pass

    @app.exception(Known)
    async def known(request: Request, error: Exception) -> HTTPResponse:
        session = request.ctx.session
        session.add(Note(text=f"caught {error}"))
        found = (await session.scalars(select(Note.text))).all()
        if str(error) == "409":
            await session.commit()
        return json(found, int(str(error)))

    @app.post("/injected/<status>")
    async def injected(request: Request, status: str, session: Session) -> HTTPResponse:
        session.add(Note(text="lost"))
        session.flush()
        raise Known(status)

    @app.post("/context/<status>")
    async def context(request: Request, status: str) -> HTTPResponse:
        request.ctx.session.add(Note(text="lost"))
        await request.ctx.session.flush()
        raise Known(status)

    @app.post("/unused/<status>")
    def unused(request: Request, status: str) -> HTTPResponse:
        raise Known(status)

    async with serving(app) as client:
        for path in ("injected", "context", "unused"):
            response = await client.post(f"/{path}/400")
            assert (path, response.status_code, response.json()) == (path, 400, ["caught 400"])
            assert await notes_of(app.ctx.db) == []
            assert app.ctx.db.pool_status()["checked_out"] == 0
        assert (await client.post("/injected/409")).json() == ["caught 409"]
        assert await notes_of(app.ctx.db) == ["caught 409"]


async def test_exception_handlers_find_the_session_when_nothing_was_reached(app: App) -> None:
    """The handler of a 404 may use ``request.ctx.session`` as well."""

    @app.exception(NotFound)
    async def missing(request: Request, error: Exception) -> HTTPResponse:
        count = await request.ctx.session.scalar(select(func.count()).select_from(Note))
        return json(count, 404)

    async with serving(app) as client:
        response = await client.get("/nowhere")
        assert (response.status_code, response.json()) == (404, 0)
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_the_session_is_finished_after_the_request(app: App) -> None:
    """A task that goes on with the request's session is told to open its own."""
    tasks: list[asyncio.Task[list[str]]] = []
    proceed = asyncio.Event()

    async def later(request: Request, session: AsyncSession) -> list[str]:
        await proceed.wait()
        errors = []
        for find in (lambda: session, lambda: request.ctx.session, current_session):
            with pytest.raises(SessionFinished) as caught:
                await find().execute(select(1))
            errors.append(str(caught.value))
        return errors

    @app.post("/<used>")
    async def handler(request: Request, used: str) -> HTTPResponse:
        session = request.ctx.session
        if used == "used":
            await session.execute(select(1))
        tasks.append(asyncio.create_task(later(request, session)))
        return empty()

    async with serving(app) as client:
        for used in ("used", "unused"):
            assert (await client.post(f"/{used}")).status_code == 204
            # The connection is kept alive: the next request must not revive the old one.
            assert (await client.get("/nowhere/at/all")).status_code == 404
            proceed.set()
            errors = await asyncio.wait_for(tasks.pop(), 5)
            assert all("app.ctx.db.session()" in error for error in errors)
            assert app.ctx.db.pool_status()["checked_out"] == 0
            proceed.clear()


async def test_a_request_that_uses_no_session_opens_nothing(app: App) -> None:
    """To look at ``request.ctx`` costs no connection, and neither does the bare session."""

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        request.ctx.mine = 1
        session = request.ctx.session
        return json(
            [request.ctx.mine, request.app.ctx.db.pool_status()["checked_out"], str(session)]
        )

    async with serving(app) as client:
        assert (await client.get("/")).json()[:2] == [1, 0]


async def test_keep_alive_requests_have_sessions_of_their_own(app: App) -> None:
    """Requests on one connection share nothing."""
    sessions: list[AsyncSession] = []

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        sessions.append(request.ctx.session)
        await request.ctx.session.execute(select(1))
        return json(current_session() is request.ctx.session)

    async with serving(app) as client:
        assert (await client.get("/")).json() is True
        assert (await client.get("/")).json() is True
    assert sessions[0] is not sessions[1]


async def test_a_task_that_is_first_to_look_after_the_request_is_refused(app: App) -> None:
    """A request that never used a session does not get one when it is over."""
    tasks: list[asyncio.Task[None]] = []
    proceed = asyncio.Event()

    async def later(request: Request) -> None:
        await proceed.wait()
        finds: list[Callable[[], Any]] = [current_session, lambda: request.ctx.session]
        for find in finds:
            with pytest.raises(SessionFinished):
                await find().execute(select(1))

    @app.post("/async")
    async def in_async(request: Request) -> HTTPResponse:
        tasks.append(asyncio.create_task(later(request)))
        return empty()

    @app.post("/plain")
    def in_plain(request: Request) -> HTTPResponse:
        tasks.append(asyncio.create_task(later(request)))
        return empty()

    async with serving(app) as client:
        for path in ("/async", "/plain"):
            assert (await client.post(path)).status_code == 204
            proceed.set()
            await asyncio.wait_for(tasks.pop(), 5)
            assert app.ctx.db.pool_status()["checked_out"] == 0
            proceed.clear()


async def test_a_task_is_refused_between_handler_and_answer(app: App) -> None:
    """There it is response middleware that may have a session, and a task cannot tell."""
    tasks: list[asyncio.Task[None]] = []
    proceed = asyncio.Event()

    async def later(request: Request) -> None:
        await proceed.wait()
        with pytest.raises(SessionFinished):
            await request.ctx.session.execute(select(1))

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        proceed.set()
        await asyncio.wait(tasks)

    @app.post("/")
    async def handler(request: Request) -> HTTPResponse:
        tasks.append(asyncio.create_task(later(request)))
        return empty()

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 204
        await tasks[0]
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_a_signal_is_refused_once_a_stream_has_failed(app: App) -> None:
    """It runs in the request's own task, and no answer will come that ends a transaction."""
    refused: list[SessionFinished] = []

    async def note(**_: object) -> None:
        try:
            await current_session().execute(select(1))
        except SessionFinished as error:
            refused.append(error)

    app.add_signal(note, "http.lifecycle.exception")

    @app.post("/")
    async def handler(request: Request) -> None:
        response = await request.respond()
        await response.send("half")
        raise LookupError

    async with serving(app) as client:
        assert (await client.post("/")).text == "half"
        assert len(refused) == 1
        assert app.ctx.db.pool_status()["checked_out"] == 0


@pytest.mark.parametrize("used_before", [True, False])
async def test_what_signals_do_before_the_first_byte_is_committed(
    app: App, used_before: bool
) -> None:
    """The signal of the response comes after the handler's COMMIT, and before the answer."""

    async def before(request: Request, **_: object) -> None:
        request.ctx.session.add(Note(text="before"))

    async def with_response(request: Request, **_: object) -> None:
        request.ctx.session.add(Note(text="with the response"))

    if used_before:
        app.add_signal(before, "http.routing.after")
    app.add_signal(with_response, "http.lifecycle.response")

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        return empty()

    async with serving(app) as client:
        assert (await client.get("/")).status_code == 204
        assert app.ctx.db.pool_status()["checked_out"] == 0
        before_it = ["before"] if used_before else []
        assert await notes_of(app.ctx.db) == [*before_it, "with the response"]


async def test_handlers_of_the_apps_own_signals_share_the_requests_session(app: App) -> None:
    """A signal that a handler dispatches and waits for belongs to the handler's transaction."""

    async def audit(**_: object) -> None:
        current_session(AsyncSession).add(Note(text="audit"))

    app.add_signal(audit, "shop.order.created")

    @app.post("/<status:int>")
    async def handler(request: Request, status: int, session: Session) -> HTTPResponse:
        await app.dispatch("shop.order.created", inline=True)
        return empty(status)

    async with serving(app) as client:
        await client.post("/400")
        assert await notes_of(app.ctx.db) == []
        await client.post("/200")
        assert await notes_of(app.ctx.db) == ["audit"]


# --- Contexts of the app's own


class NamespaceRequest(Request):
    """A context with something in it."""

    @staticmethod
    def make_context() -> Any:
        return SimpleNamespace(user="Ada")


class Context:
    """A context of the app's own."""

    def __init__(self) -> None:
        self.user = "Ada"


class ClassRequest(Request):
    """A context that is an object of a class."""

    @staticmethod
    def make_context() -> Any:
        return Context()


@dataclass
class DataclassContext:
    """A context with declared attributes."""

    user: str = "Ada"


class DataclassRequest(Request):
    """A context that is a dataclass."""

    @staticmethod
    def make_context() -> Any:
        return DataclassContext()


class SlottedContext:
    """A context without a dict."""

    __slots__ = ("session_id", "user")

    def __init__(self) -> None:
        self.user = "Ada"


class SlottedRequest(Request):
    """A context with __slots__."""

    @staticmethod
    def make_context() -> Any:
        return SlottedContext()


class FallbackContext(SimpleNamespace):
    """A context that finds attributes by itself."""

    def __getattr__(self, name: str) -> str:
        if name == "user":
            return "Ada"
        raise AttributeError(f"no {name} here")


class FallbackRequest(Request):
    """A context with __getattr__."""

    @staticmethod
    def make_context() -> Any:
        return FallbackContext()


class OwnSessionContext(SimpleNamespace):
    """A context that has something else called session."""

    session = "mine"


class OwnSessionRequest(Request):
    """A context whose session is the app's own."""

    @staticmethod
    def make_context() -> Any:
        return OwnSessionContext(user="Ada")


REQUESTS = [NamespaceRequest, ClassRequest, DataclassRequest, FallbackRequest]


@pytest.mark.parametrize("request_class", REQUESTS)
async def test_an_apps_own_context_keeps_what_it_has(
    blueprint: Callable[..., DatabaseBlueprint], request_class: type[Request]
) -> None:
    """Whatever ``make_context`` returns, its attributes are there, and the session too."""
    app: App = Sanic("app", request_class=request_class)
    app.blueprint(blueprint())

    @app.on_request
    async def before(request: Request) -> None:
        request.ctx.user += "!"

    @app.get("/")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        assert isinstance(request, request_class)
        assert isinstance(request.ctx, type(request_class.make_context()))
        same = request.ctx.session is session
        with pytest.raises(AttributeError):
            _ = request.ctx.nothing
        with pytest.raises(AttributeError):
            _ = request.ctx.unknown_session
        return json([request.ctx.user, same, hasattr(request.ctx, "missing")])

    async with serving(app) as client:
        response = await client.get("/")
        assert response.status_code == 200
        assert response.json() == ["Ada!", True, False]


async def test_a_context_with_slots_is_left_as_it_is(
    blueprint: Callable[..., DatabaseBlueprint],
) -> None:
    """It has no room for a session; parameters and ``current_session()`` give it all the same."""
    app: App = Sanic("app", request_class=SlottedRequest)
    app.blueprint(blueprint())

    @app.get("/")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        request.ctx.session_id = 7
        found = current_session() is session
        ours = hasattr(request.ctx, "session")
        return json([request.ctx.user, request.ctx.session_id, found, ours])

    async with serving(app) as client:
        assert (await client.get("/")).json() == ["Ada", 7, True, False]


async def test_a_session_of_the_apps_own_on_the_context_wins(
    blueprint: Callable[..., DatabaseBlueprint],
) -> None:
    """An attribute that is there is never hidden, such as the one of a cookie session."""
    app: App = Sanic("app", request_class=OwnSessionRequest)
    app.blueprint(blueprint())

    @app.get("/declared")
    async def declared(request: Request) -> HTTPResponse:
        return text(request.ctx.session)

    @app.get("/assigned")
    async def assigned(request: Request) -> HTTPResponse:
        request.ctx.db_session = "assigned"
        return text(request.ctx.db_session)

    async with serving(app) as client:
        assert (await client.get("/declared")).text == "mine"
        assert (await client.get("/assigned")).text == "assigned"


async def test_a_request_class_of_ones_own_keeps_its_behaviour(
    blueprint: Callable[..., DatabaseBlueprint],
) -> None:
    """Attributes and methods of the app's request class work, with and without a session."""

    class OwnRequest(Request):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.made_by = "app"

        @property
        def shout(self) -> str:
            return self.path.upper()

    app: App = Sanic("app", request_class=OwnRequest)
    app.blueprint(blueprint())

    @app.get("/with")
    async def with_session(request: OwnRequest, session: Session) -> HTTPResponse:
        return json([request.shout, request.made_by, type(request).__name__])

    @app.get("/without")
    async def without_session(request: OwnRequest) -> HTTPResponse:
        return json([request.shout, request.made_by, type(request).__name__])

    async with serving(app) as client:
        assert (await client.get("/with")).json() == ["/WITH", "app", "OwnRequest"]
        assert (await client.get("/without")).json() == ["/WITHOUT", "app", "OwnRequest"]


async def test_unknown_attributes_of_the_context_are_attribute_errors(app: App) -> None:
    """``hasattr`` and ``getattr`` with a default behave on the context as before."""
    errors: list[str] = []

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        for name in ("nothing", "other_session", "session_token"):
            with pytest.raises(AttributeError) as caught:
                getattr(request.ctx, name)
            errors.append(str(caught.value))
        return json([hasattr(request.ctx, "nothing"), getattr(request.ctx, "user", None)])

    async with serving(app) as client:
        assert (await client.get("/")).json() == [False, None]
    assert errors[0] == "'SimpleNamespace' object has no attribute 'nothing'"
    assert "other_session" in errors[1]


# --- The recipe of Sanic's guide


class GuideBase(DeclarativeBase):
    """The tables of the guide."""


class Person(GuideBase):
    """A person of the guide."""

    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    cars: Mapped[list["Car"]] = relationship(back_populates="user")

    def to_dict(self) -> dict[str, Any]:
        """Return what the guide answers."""
        return {"name": self.name, "cars": [{"brand": car.brand} for car in self.cars]}


class Car(GuideBase):
    """A car of the guide."""

    __tablename__ = "car"

    id: Mapped[int] = mapped_column(primary_key=True)
    brand: Mapped[str] = mapped_column(String(50))
    user_id: Mapped[int | None] = mapped_column(ForeignKey("person.id"))
    user: Mapped[Person | None] = relationship(back_populates="cars")


async def test_handlers_of_the_guides_recipe_run_unchanged(database_url: str) -> None:
    """``async with session.begin()`` on ``request.ctx.session``, with nothing but the setup new."""
    app: App = Sanic("app")
    app.blueprint(
        DatabaseBlueprint(url=database_url, metadata=GuideBase.metadata, create_tables=True)
    )

    @app.post("/user")
    async def create_user(request: Request) -> HTTPResponse:
        session = request.ctx.session
        async with session.begin():
            car = Car(brand="Tesla")
            person = Person(name="foo", cars=[car])
            session.add_all([person])
        return json(person.to_dict())

    @app.get("/user/<pk:int>")
    async def get_user(request: Request, pk: int) -> HTTPResponse:
        session = request.ctx.session
        async with session.begin():
            stmt = select(Person).where(Person.id == pk).options(selectinload(Person.cars))
            result = await session.execute(stmt)
            person = result.scalar()

        if not person:
            return json({})

        return json(person.to_dict())

    @app.get("/twice/<pk:int>")
    async def twice(request: Request, pk: int) -> HTTPResponse:
        session = request.ctx.session
        async with session.begin():
            person = await session.get(Person, pk)
        async with session.begin():
            person.name = "bar"
        await session.commit()
        await session.close()
        return json({"name": person.name})

    async with serving(app) as client:
        expected = {"name": "foo", "cars": [{"brand": "Tesla"}]}
        assert (await client.post("/user")).json() == expected
        assert (await client.get("/user/1")).json() == expected
        assert (await client.get("/user/2")).json() == {}
        assert (await client.get("/twice/1")).json() == {"name": "bar"}
        assert (await client.get("/user/1")).json() == {**expected, "name": "bar"}
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_begin_works_although_a_middleware_read_before(app: App) -> None:
    """A middleware that looks up the user leaves the handler free to begin."""

    @app.on_request
    async def load_user(request: Request) -> None:
        await request.ctx.session.execute(select(1))

    @app.post("/<value>")
    async def handler(request: Request, value: str) -> HTTPResponse:
        async with request.ctx.session.begin():
            request.ctx.session.add(Note(text=value))
        return empty()

    async with serving(app) as client:
        assert (await client.post("/x")).status_code == 204
        assert await notes_of(app.ctx.db) == ["x"]


async def test_a_context_variable_set_and_reset_by_middleware_goes_on_working(app: App) -> None:
    """The guide's ContextVar token beside our session does no harm."""
    from contextvars import ContextVar, Token

    variable: ContextVar[AsyncSession] = ContextVar("session")

    @app.on_request
    async def inject(request: Request) -> None:
        request.ctx.session_ctx_token = variable.set(request.ctx.session)

    async def close(request: Any, response: Any) -> None:
        if hasattr(request.ctx, "session_ctx_token"):
            token: Token[AsyncSession] = request.ctx.session_ctx_token
            variable.reset(token)
            await request.ctx.session.close()

    app.register_middleware(close, "response")

    @app.post("/<value>")
    async def handler(request: Request, value: str) -> HTTPResponse:
        async with variable.get().begin():
            variable.get().add(Note(text=value))
        return empty()

    async with serving(app) as client:
        assert (await client.post("/x")).status_code == 204
        assert await notes_of(app.ctx.db) == ["x"]


# --- current_session()


async def test_helpers_of_concurrent_requests_find_their_own_session(app: App) -> None:
    """Twenty requests at once, interleaved on one event loop, never see another's session."""
    arrived = 0
    everybody = asyncio.Event()

    async def helper() -> AsyncSession:
        await asyncio.sleep(0)
        session: AsyncSession = current_session()
        return session

    @app.get("/<number:int>")
    async def handler(request: Request, number: int) -> HTTPResponse:
        nonlocal arrived
        mine = request.ctx.session
        arrived += 1
        if arrived == 20:
            everybody.set()
        await everybody.wait()
        found = await helper()
        await asyncio.sleep(0)
        return json([number, found is mine, current_session(AsyncReadSession) is not None])

    async with serving(app) as client:
        answers = await asyncio.gather(*(client.get(f"/{number}") for number in range(20)))
        assert [answer.json() for answer in answers] == [
            [number, True, True] for number in range(20)
        ]


async def test_current_session_in_a_block_is_the_blocks(app: App) -> None:
    """Inside ``db.session()`` it is that session, around it none, in a request the request's."""

    @app.get("/")
    async def handler(request: Request, session: AsyncSession, db: Database) -> HTTPResponse:
        async with db.session() as inner:
            inside = current_session() is inner
            async with db.session() as innermost:
                nested = current_session() is innermost
            after = current_session() is inner
        return json([inside, nested, after, current_session() is session])

    async with serving(app) as client:
        assert (await client.get("/")).json() == [True] * 4
        async with app.ctx.db.session() as session:
            assert current_session() is session
            assert current_session(AsyncSession) is session
            assert current_session(Session) is session.sync_session
        with pytest.raises(NoCurrentSession):
            current_session()


async def test_current_session_in_run_sync_is_plain(app: App) -> None:
    """In ``run_sync`` the plain session is found, and works."""

    def write(session: Session, value: str) -> bool:
        found = current_session()
        found.add(Note(text=value))
        found.flush()
        return found is session

    async with serving(app):
        assert await app.ctx.db.run_sync(write, "x") is True
        assert await notes_of(app.ctx.db) == ["x"]


class Reader:
    """A dependency that finds its session by itself."""

    def __init__(self, session: Session) -> None:
        self.finds_its_own = current_session() is session


async def test_current_session_of_a_dependency_is_in_the_form_of_the_handler(app: App) -> None:
    """Its constructor runs in the bridge, before the handler is reached."""
    app.ext.add_dependency(Reader)

    @app.get("/")
    def handler(request: Request, reader: Reader, session: Session) -> HTTPResponse:
        return json(reader.finds_its_own)

    async with serving(app) as client:
        assert (await client.get("/")).json() is True


async def test_current_session_beside_a_plain_handler_can_be_awaited(app: App) -> None:
    """Middleware and exception handlers get an AsyncSession, whatever form the handler has."""
    count = select(func.count()).select_from(Note)

    @app.on_request
    async def before(request: Request) -> None:
        request.ctx.before = await current_session().scalar(count)

    @app.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        response.headers["x-after"] = str(await current_session().scalar(count))

    @app.get("/")
    def handler(request: Request, session: Session) -> HTTPResponse:
        session.add(Note(text="x"))
        return json([request.ctx.before, current_session() is session])

    @app.get("/error")
    def failing(request: Request, session: Session) -> HTTPResponse:
        raise NotFound

    @app.exception(NotFound)
    async def not_found(request: Request, error: NotFound) -> HTTPResponse:
        return json(await current_session().scalar(count), 404)

    async with serving(app) as client:
        answer = await client.get("/")
        assert (answer.json(), answer.headers["x-after"]) == ([0, True], "1")
        assert (await client.get("/error")).json() == 1
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_current_session_in_child_tasks(app: App) -> None:
    """A child task of a handler or of a block finds the session of its parent."""

    async def child() -> Any:
        session = current_session()
        await session.execute(select(1))
        return session

    @app.get("/")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        return json(await asyncio.create_task(child()) is session)

    async with serving(app) as client:
        assert (await client.get("/")).json() is True
        async with app.ctx.db.session() as session:
            assert await asyncio.create_task(child()) is session


async def test_tasks_of_the_app_have_no_current_session(app: App) -> None:
    """A background task started by the server belongs to no request."""
    found: asyncio.Future[str] = asyncio.get_running_loop().create_future()

    async def task(app: App) -> None:
        try:
            current_session()
        except NoCurrentSession as error:
            found.set_result(error.message)

    for_sanic: Any = task
    app.add_task(for_sanic)
    async with serving(app):
        message = await asyncio.wait_for(found, 5)
    assert message == (
        "There is no current session: the code runs outside of a request and of a block. Open "
        "one: 'async with app.ctx.db.session() as session'."
    )


async def test_outside_there_is_no_current_session() -> None:
    """The error names the class that was asked for, and the remedy."""
    with pytest.raises(NoCurrentSession, match=r"There is no current session: .*db\.session\(\)"):
        current_session()
    with pytest.raises(NoCurrentSession, match="There is no current ReportsSession"):
        current_session(ReportsSession)
    with pytest.raises(NoCurrentSession):
        on_commit(lambda: None)


async def test_a_request_of_an_app_without_a_database_has_no_current_session() -> None:
    """``current_session()`` in another app of the process tells what is missing."""
    app: App = Sanic("app")

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        with pytest.raises(NoCurrentSession):
            current_session()
        with pytest.raises(NoCurrentSession):
            current_session(AsyncSession)
        with pytest.raises(AttributeError):
            _ = request.ctx.session
        return empty()

    async with serving(app) as client:
        assert (await client.get("/")).status_code == 204


async def test_a_blueprint_that_comes_after_the_start_is_too_late(tmp_path: Path) -> None:
    """The requests of its app were set up without a database."""
    app: App = Sanic("app")

    @app.get("/")
    async def handler(request: Request) -> HTTPResponse:
        with pytest.raises(NoCurrentSession, match="before the server starts"):
            current_session()
        return empty()

    async with serving(app) as client:
        app.blueprint(DatabaseBlueprint(url=f"sqlite:///{tmp_path / 'late.db'}"))
        assert (await client.get("/")).status_code == 204


async def test_a_websocket_has_no_current_session(app: App) -> None:
    """In a websocket handler each message has a block, and only there is a current session."""
    from websockets.asyncio.client import connect

    async def handler(request: Request, ws: Any, db: Database) -> None:
        messages = []
        finds: list[Callable[[], Any]] = [current_session, lambda: request.ctx.session]
        for find in finds:
            try:
                find()
            except NoCurrentSession as error:
                messages.append(error.message)
        async with db.session() as session:
            assert current_session() is session
        await ws.send("\n".join(messages))

    app.add_websocket_route(handler, "/")
    async with serving(app) as client:
        url = str(client.base_url).replace("http", "ws")
        async with connect(url, proxy=None) as socket:
            messages = str(await socket.recv()).splitlines()
    assert len(messages) == 2
    assert all("for each message" in message for message in messages)


# --- Several databases


@pytest.fixture
def two(blueprint: Callable[..., DatabaseBlueprint]) -> App:
    """An app with a second database, ``reports``."""
    app: App = Sanic("app")
    app.blueprint(blueprint())
    app.blueprint(
        blueprint("reports", session_class=ReportsSession, async_session_class=ReportsAsyncSession)
    )
    return app


async def test_the_context_has_the_session_of_each_database(two: App) -> None:
    """``request.ctx.<name>_session`` is the session of the database of that name."""

    @two.post("/<status:int>")
    async def handler(request: Request, status: int) -> HTTPResponse:
        request.ctx.session.add(Note(text="db"))
        request.ctx.reports_session.add(Note(text="reports"))
        return json(
            [
                request.ctx.db_session is request.ctx.session,
                isinstance(request.ctx.reports_session, ReportsAsyncSession),
                current_session(ReportsAsyncSession) is request.ctx.reports_session,
                current_session(ReportsSession) is request.ctx.reports_session.sync_session,
                current_session() is request.ctx.session,
                hasattr(request.ctx, "other_session"),
            ],
            status,
        )

    async with serving(two) as client:
        assert (await client.post("/400")).status_code == 400
        assert (await client.post("/200")).json() == [True] * 5 + [False]
        assert await notes_of(two.ctx.db) == ["db"]
        assert await notes_of(two.ctx.reports) == ["reports"]


async def test_an_exception_handler_commits_nothing_of_a_failed_commit(two: App) -> None:
    """What one database has refused is stored in none, also where the error has a good answer."""

    @two.post("/")
    async def handler(request: Request) -> HTTPResponse:
        request.ctx.reports_session.add(Note(text="reports"))
        request.ctx.session.add_all([Note(id=1, text="db"), Note(id=1, text="again")])
        return empty()

    @two.exception(IntegrityError)
    async def refused(request: Request, error: IntegrityError) -> HTTPResponse:
        return empty()

    async with serving(two) as client:
        assert (await client.post("/")).status_code == 204
        assert await notes_of(two.ctx.db) == []
        assert await notes_of(two.ctx.reports) == []


@pytest.mark.parametrize("wanted", [AsyncSession, ReportsAsyncSession])
async def test_a_callback_of_on_commit_is_refused_the_session_of_its_request(
    two: App, caplog: pytest.LogCaptureFixture, wanted: type[AsyncSession]
) -> None:
    """Nobody would commit what it does more, also in a database that was not used before."""

    async def write() -> None:
        current_session(wanted).add(Note(text="callback"))
        await current_session(wanted).flush()

    @two.post("/")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text="handler"))
        on_commit(write)
        return empty()

    async with serving(two) as client:
        assert (await client.post("/")).status_code == 204
        [line] = [record for record in caplog.records if record.levelname == "ERROR"]
        assert line.exc_info is not None
        assert isinstance(line.exc_info[1], SessionFinished)
        assert await notes_of(two.ctx.db) == ["handler"]
        assert await notes_of(two.ctx.reports) == []
        for database in (two.ctx.db, two.ctx.reports):
            assert database.pool_status()["checked_out"] == 0


async def test_blocks_of_several_databases_are_kept_apart(two: App) -> None:
    """Inside a block of each, the innermost counts, or the one whose class is asked for."""
    async with serving(two), two.ctx.db.session() as outer, two.ctx.reports.session() as inner:
        assert current_session() is inner
        assert current_session(AsyncSession) is outer
        assert current_session(ReportsAsyncSession) is inner
        async with two.ctx.db.session() as innermost:
            assert current_session() is innermost
            assert current_session(ReportsAsyncSession) is inner
        assert current_session(AsyncSession) is outer


async def test_a_single_database_of_another_name_is_on_the_context(
    blueprint: Callable[..., DatabaseBlueprint],
) -> None:
    """An app whose only database is not ``db`` has ``<name>_session`` and ``current_session()``."""
    app: App = Sanic("app")
    app.blueprint(blueprint("library"))

    @app.get("/")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        return json([request.ctx.library_session is session, current_session() is session])

    async with serving(app) as client:
        assert (await client.get("/")).json() == [True, True]


# --- on_commit


async def test_on_commit_runs_after_the_commit_and_never_after_a_rollback(app: App) -> None:
    """What it reads in a session of its own is there already; an error status runs nothing."""
    seen: list[list[str]] = []

    async def tell() -> None:
        seen.append(await notes_of(app.ctx.db))

    @app.post("/async/<status:int>")
    async def in_async(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        session.add(Note(text="async"))
        on_commit(tell)
        return empty(status)

    @app.post("/plain/<status:int>")
    def in_plain(request: Request, status: int, session: Session) -> HTTPResponse:
        session.add(Note(text="plain"))
        on_commit(lambda: seen.append(["called"]))
        return empty(status)

    @app.post("/context/<status:int>")
    async def in_context(request: Request, status: int) -> HTTPResponse:
        request.ctx.session.add(Note(text="context"))
        on_commit(tell)
        return empty(status)

    async with serving(app) as client:
        for path in ("async", "plain", "context"):
            assert (await client.post(f"/{path}/500")).status_code == 500
        assert seen == []
        for path in ("async", "plain", "context"):
            assert (await client.post(f"/{path}/200")).status_code == 200
        assert seen == [["async"], ["called"], ["async", "plain", "context"]]


async def test_on_commit_in_a_block_belongs_to_the_block(app: App) -> None:
    """In ``db.session()`` it waits for the end of the block."""
    seen: list[str] = []
    async with serving(app):
        async with app.ctx.db.session() as session:
            session.add(Note(text="x"))
            on_commit(lambda: seen.append("committed"))
            await session.flush()
            assert seen == []
        assert seen == ["committed"]

        async def fail() -> None:
            async with app.ctx.db.session() as session:
                on_commit(lambda: seen.append("never"))
                await session.execute(select(1))
                raise RuntimeError("undone")

        with pytest.raises(RuntimeError, match="undone"):
            await fail()
        assert seen == ["committed"]


async def test_on_commit_without_a_transaction_still_runs_when_the_request_succeeds(
    app: App,
) -> None:
    """A handler that wrote nothing has nothing to lose: its callback runs on success."""
    seen: list[str] = []

    @app.post("/<status:int>")
    async def handler(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        on_commit(lambda: seen.append("called"))
        return empty(status)

    async with serving(app) as client:
        await client.post("/500")
        assert seen == []
        await client.post("/200")
        assert seen == ["called"]


# --- Streams


async def test_the_session_on_the_request_lives_as_long_as_a_stream(app: App) -> None:
    """``request.ctx.session`` and ``current_session()`` work to the end of a stream."""

    @app.post("/respond/<value>")
    async def respond(request: Request, value: str) -> None:
        response = await request.respond(content_type="text/plain")
        assert response is not None
        request.ctx.session.add(Note(text=value))
        await response.send(value)
        await current_session().flush()
        await response.eof()

    @app.post("/stream/<value>")
    async def stream(request: Request, value: str) -> ResponseStream:
        async def write(response: Any) -> None:
            request.ctx.session.add(Note(text=value))
            await response.write(value)
            await current_session().flush()

        return ResponseStream(write, content_type="text/plain")

    async with serving(app) as client:
        assert (await client.post("/respond/a")).text == "a"
        assert (await client.post("/stream/b")).text == "b"
        assert await notes_of(app.ctx.db) == ["a", "b"]
        assert app.ctx.db.pool_status()["checked_out"] == 0
