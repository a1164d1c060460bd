"""What a handler asks for by annotation reaches it, however it is spelt."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, Optional

import pytest
from sanic import HTTPResponse, Request, empty, json, text
from sqlalchemy import func, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import AsyncReadSession, Database, ReadSession
from tests.injection.helpers import App, Author, Note, new_app, notes_of
from tests.serving import serving


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
