"""SQLModel's session classes, and what reads objects from outside: pydantic and msgspec."""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

import httpx
import msgspec
import pytest
import sqlmodel
from pydantic import BaseModel, ConfigDict
from sanic import HTTPResponse, Request, Sanic, json
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlmodel.ext.asyncio.session import AsyncSession as AsyncModelSession

from sanic_db_bp import ConcurrentSessionUse, DatabaseBlueprint, ReadSession, SessionFinished
from tests.models_of_sqlmodel import Author, Book, Model
from tests.serving import serving

_numbers = count(1)


class ReadModelSession(ReadSession, sqlmodel.Session):
    pass


class BookOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    title: str


class AuthorOut(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    name: str
    books: list[BookOut]


class BookStruct(msgspec.Struct):
    title: str


class AuthorStruct(msgspec.Struct):
    name: str
    books: list[BookStruct]


BOOKS = {"name": "Woolf", "books": [{"title": "Orlando"}, {"title": "The Waves"}]}


@pytest.fixture
def app(database_url: str) -> Sanic[Any, Any]:
    """An app whose sessions are SQLModel's."""
    app: Sanic[Any, Any] = Sanic(f"library-{next(_numbers)}")
    app.config.TOUCHUP = False
    app.blueprint(
        DatabaseBlueprint(
            url=database_url,
            metadata=Model.metadata,
            create_tables=True,
            session_class=sqlmodel.Session,
            async_session_class=AsyncModelSession,
            read_session_class=ReadModelSession,
        )
    )

    @app.post("/authors")
    async def add(request: Request, session: sqlmodel.Session) -> HTTPResponse:
        books = [Book(title=book["title"]) for book in request.json["books"]]
        author = Author(name=request.json["name"], books=books)
        session.add(author)
        session.flush()
        return json(author.model_dump(), status=201)

    return app


async def filled(client: httpx.AsyncClient) -> None:
    assert (await client.post("/authors", json=BOOKS)).json() == {"id": 1, "name": "Woolf"}


def by_title() -> Any:
    return sqlmodel.select(Book.title).order_by(Book.title)


async def test_exec_works_in_every_form_of_session(app: Sanic[Any, Any]) -> None:
    """What a handler gets is SQLModel's class, plain, for asyncio and for reading."""

    @app.get("/plain")
    def plain(request: Request, session: sqlmodel.Session) -> HTTPResponse:
        return json(list(session.exec(by_title())))

    @app.get("/async")
    async def asynchronous(request: Request, session: AsyncModelSession) -> HTTPResponse:
        return json(list(await session.exec(by_title())))

    @app.get("/read")
    def read(request: Request, session: ReadModelSession) -> HTTPResponse:
        return json(list(session.exec(by_title())))

    async with serving(app) as client:
        await filled(client)
        for path in ("/plain", "/async", "/read"):
            assert (await client.get(path)).json() == ["Orlando", "The Waves"], path


async def test_exec_is_guarded(app: Sanic[Any, Any]) -> None:
    """It refuses a second task, and everybody after the end of the request."""
    kept: list[AsyncModelSession] = []

    @app.get("/both")
    async def both(request: Request, session: AsyncModelSession) -> HTTPResponse:
        kept.append(session)
        uses = (session.exec(by_title()) for _ in range(2))
        results = await asyncio.gather(*uses, return_exceptions=True)
        refused = [result for result in results if isinstance(result, ConcurrentSessionUse)]
        return json(len(refused))

    async with serving(app) as client:
        assert (await client.get("/both")).json() == 1
        with pytest.raises(SessionFinished):
            await kept[0].exec(by_title())


@pytest.mark.parametrize("form", ["pydantic", "msgspec"])
async def test_answers_load_what_is_lazy(app: Sanic[Any, Any], form: str) -> None:
    """Both read attributes from compiled code, which waits for the database like any other."""

    def answer(author: Any) -> HTTPResponse:
        if form == "pydantic":
            return json(AuthorOut.model_validate(author).model_dump())
        struct = msgspec.convert(author, AuthorStruct, from_attributes=True)
        return HTTPResponse(msgspec.json.encode(struct), content_type="application/json")

    @app.get("/plain/<author_id:int>")
    def plain(request: Request, author_id: int, session: sqlmodel.Session) -> HTTPResponse:
        return answer(session.get_one(Author, author_id))

    @app.get("/async/<author_id:int>")
    async def asynchronous(
        request: Request, author_id: int, session: AsyncModelSession
    ) -> HTTPResponse:
        return answer(await session.get_one(Author, author_id))

    async with serving(app) as client:
        await filled(client)
        for path in ("/plain/1", "/async/1"):
            assert (await client.get(path)).json() == BOOKS, path


async def test_run_sync_and_blocks_give_the_same_classes(app: Sanic[Any, Any]) -> None:
    """Outside of requests, too."""
    async with serving(app) as client:
        await filled(client)
        async with app.ctx.db.session() as session:
            assert isinstance(session, AsyncModelSession)
            assert isinstance(session, AsyncSession)
            assert len((await session.exec(by_title())).all()) == 2

        def count(session: Session) -> int:
            assert isinstance(session, sqlmodel.Session)
            return len(session.exec(by_title()).all())

        assert await app.ctx.db.run_sync(count) == 2
