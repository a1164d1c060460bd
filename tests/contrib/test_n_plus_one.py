"""N+1 detection names what is loaded again and again, and what cures it."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from sanic import HTTPResponse, Request, Sanic, json
from sanic.application.constants import Mode
from sqlalchemy import ForeignKey, String, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    joinedload,
    mapped_column,
    relationship,
    selectinload,
)

from sanic_db_bp import DatabaseBlueprint, ReadSession
from sanic_db_bp.contrib import n_plus_one
from tests.databases import on_sqlite
from tests.serving import serving
from tests.shop import Shop


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    books: Mapped[list[Book]] = relationship(back_populates="author")


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")
    chapters: Mapped[list[Chapter]] = relationship()


class Chapter(Base):
    __tablename__ = "chapter"

    id: Mapped[int] = mapped_column(primary_key=True)
    book_id: Mapped[int] = mapped_column(ForeignKey("book.id"))
    title: Mapped[str] = mapped_column(String(50), default="")


AUTHORS = 4


def titles(session: Session, *options: Any) -> int:
    """Reach every chapter from its author, lazily where nothing else was said."""
    return sum(
        len(book.chapters)
        for author in session.scalars(select(Author).options(*options))
        for book in author.books
    )


@asynccontextmanager
async def library(
    database_url: str, *, debug: bool = True, **options: Any
) -> AsyncIterator[tuple[Shop, httpx.AsyncClient]]:
    """Serve authors with two books of two chapters each."""
    app: Shop = Sanic("library")
    app.config.TOUCHUP = False
    app.state.mode = Mode.DEBUG if debug else Mode.PRODUCTION
    app.blueprint(DatabaseBlueprint(metadata=Base.metadata, url=database_url, create_tables=True))
    n_plus_one.install(app, **options)

    @app.get("/lazy")
    def lazy(request: Request, session: Session) -> HTTPResponse:
        return json(titles(session))

    @app.get("/reading")
    async def reading(request: Request, session: ReadSession) -> HTTPResponse:
        return json(titles(session))

    @app.get("/asyncio")
    async def asynchronous(request: Request, session: AsyncSession) -> HTTPResponse:
        books = await session.scalars(select(Book))
        return json([book.author.id for book in books])

    @app.get("/half")
    async def half(request: Request, session: Session) -> HTTPResponse:
        return json(titles(session, selectinload(Author.books)))

    @app.get("/cured")
    async def cured(request: Request, session: Session) -> HTTPResponse:
        return json(titles(session, selectinload(Author.books).selectinload(Book.chapters)))

    @app.get("/cured_asyncio")
    async def cured_asyncio(request: Request, session: AsyncSession) -> HTTPResponse:
        books = await session.scalars(select(Book).options(joinedload(Book.author)))
        return json([book.author.id for book in books])

    async with serving(app) as client:
        await app.ctx.db.run_sync(fill)
        yield app, client


def fill(session: Session) -> None:
    for _ in range(AUTHORS):
        books = [Book(chapters=[Chapter(), Chapter()]) for _ in range(2)]
        session.add(Author(books=books))


@pytest.fixture
def library_url(database_url: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """A database for an app that may be made again under its name."""
    monkeypatch.setattr(Sanic, "_app_registry", {})
    return database_url


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name == "sanic.root.db"
    ]


@pytest.mark.parametrize("path", ["lazy", "reading"])
async def test_it_names_route_attribute_number_line_and_cure(
    library_url: str, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """One warning for each attribute at the end of the transaction, in either kind of session."""
    async with library(library_url) as (_, client):
        assert (await client.get(f"/{path}")).json() == 4 * AUTHORS
    books, chapters = warnings(caplog)
    assert books.startswith(
        f"N+1 in GET /{path} (library.{path}): Author.books was loaded lazily 4 times"
    )
    assert f"{__file__}:" in books
    assert " in titles. " in books or " in <genexpr>. " in books
    assert books.endswith("select(Author).options(selectinload(Author.books))")
    assert "Book.chapters was loaded lazily 8 times" in chapters
    assert chapters.endswith(
        "select(Author).options(selectinload(Author.books).selectinload(Book.chapters))"
    )


async def test_an_attribute_below_one_that_was_loaded_eagerly_is_named_with_its_way(
    library_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The cure begins at the class that was asked for."""
    async with library(library_url) as (_, client):
        await client.get("/half")
    (chapters,) = warnings(caplog)
    assert chapters.endswith(
        "select(Author).options(selectinload(Author.books).selectinload(Book.chapters))"
    )


async def test_single_objects_are_joined(
    library_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The other side of a relationship is found too, on an AsyncSession as well."""
    async with library(library_url) as (_, client):
        await client.get("/asyncio")
    (authors,) = warnings(caplog)
    assert "Book.author was loaded lazily 4 times" in authors
    assert authors.endswith("select(Book).options(joinedload(Book.author))")


@pytest.mark.parametrize("path", ["cured", "cured_asyncio"])
async def test_the_cure_cures(
    library_url: str, caplog: pytest.LogCaptureFixture, path: str
) -> None:
    """With the option that the warning names, there is no warning."""
    async with library(library_url) as (_, client):
        assert (await client.get(f"/{path}")).status_code == 200
    assert not warnings(caplog)


@on_sqlite
@pytest.mark.parametrize(
    ("options", "debug", "number"),
    [
        ({}, False, 0),
        ({"always": True}, False, 2),
        ({"limit": 5}, True, 1),
        ({"limit": 9}, True, 0),
    ],
)
async def test_it_warns_in_debug_mode_or_if_asked_for_and_above_the_limit(
    library_url: str,
    caplog: pytest.LogCaptureFixture,
    options: dict[str, Any],
    debug: bool,
    number: int,
) -> None:
    """In production nobody pays for it unless he wants to."""
    async with library(library_url, debug=debug, **options) as (_, client):
        await client.get("/lazy")
    assert len(warnings(caplog)) == number


@on_sqlite
async def test_outside_of_requests_it_names_the_line_alone(
    library_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Background tasks load lazily too; each transaction is counted by itself."""
    async with library(library_url, limit=AUTHORS) as (app, _):
        for _ in range(2):
            await app.ctx.db.run_sync(titles)
        await app.ctx.db.run_sync(lambda session: len(session.get_one(Author, 1).books))
    assert len(warnings(caplog)) == 4
    assert all(warning.startswith("N+1: ") for warning in warnings(caplog))
