"""The app's own dependencies get what handlers get, and share their transaction."""

from dataclasses import dataclass
from typing import Any

import pytest
from sanic import HTTPResponse, Request, json, text
from sanic.views import HTTPMethodView
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import (
    AsyncReadSession,
    ConfigurationError,
    Database,
    ReadSession,
    current_session,
    inject_session,
)
from tests.injection.helpers import (
    App,
    Author,
    Handler,
    Note,
    Repository,
    Sink,
    make_sink,
    notes_of,
)
from tests.serving import serving


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


class OwnSession(Session):
    """A session that the app makes by itself."""


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


async def test_what_the_app_itself_registers_holds_at_each_start(app: App) -> None:
    """Also if it asks for a session of ours, for which it is bridged."""

    def make(session: AsyncSession) -> Session:
        return OwnSession()

    app.ext.add_dependency(Session, make)

    @app.get("/")
    async def handler(request: Request, session: Session) -> HTTPResponse:
        return text(type(session).__name__)

    @inject_session(app=app)
    def function(session: Session) -> None:
        raise AssertionError("not reached")

    for _ in range(2):
        async with serving(app) as client:
            assert (await client.get("/")).text == "OwnSession"
            with pytest.raises(ConfigurationError, match="no database"):
                await function()


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
