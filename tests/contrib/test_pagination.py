"""Pages: every row once and in order, in both directions, whatever a client sends."""

import base64
import json
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from sanic import HTTPResponse, Request
from sanic import json as as_json
from sanic.exceptions import BadRequest
from sqlalchemy import (
    DateTime,
    Double,
    LargeBinary,
    Numeric,
    String,
    Uuid,
    event,
    func,
    select,
    text,
)
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp import ConfigurationError, Database, DatabaseSettings
from sanic_db_bp.contrib.pagination import keyset_page, offset_page
from tests.databases import on_all
from tests.serving import serving
from tests.shop import make_app

pytestmark = on_all

COUNT = 23


class Base(DeclarativeBase):
    pass


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    title: Mapped[str] = mapped_column(String(20))
    price: Mapped[Decimal] = mapped_column(Numeric(10, 2))
    printed: Mapped[datetime] = mapped_column(DateTime)
    number: Mapped[UUID] = mapped_column(Uuid)
    subtitle: Mapped[str | None] = mapped_column(String(20))
    cover: Mapped[bytes] = mapped_column(LargeBinary, default=b"")
    weight: Mapped[float] = mapped_column(Double)
    is_lent: Mapped[bool]


def book(number: int) -> Book:
    """A book that shares its title, price and date with others."""
    return Book(
        id=number,
        title=f"title {number % 3}",
        price=Decimal(number % 4) / 4,
        printed=datetime(2020, 1, 1 + number % 5, 12, 30, 0),
        number=UUID(int=number % 6),
        weight=number % 5 / 8,
        is_lent=number % 2 == 0,
    )


@pytest.fixture
async def db(database_url: str) -> AsyncIterator[Database]:
    """A database with books."""
    db = Database(DatabaseSettings(url=database_url, env_file=None))
    async with db.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with db.session() as session:
        session.add_all(book(number) for number in range(1, COUNT + 1))
    yield db
    await db.dispose()


ORDERS: list[tuple[Any, ...]] = [
    (),
    (Book.id.desc(),),
    (Book.title, Book.price.desc()),
    (Book.price.desc(), Book.title),
    (Book.printed.desc(),),
    (Book.number, Book.printed.desc()),
    (Book.is_lent.desc(), Book.weight),
    (func.coalesce(Book.subtitle, "-"), Book.title.desc()),
]


@pytest.mark.parametrize("order", ORDERS, ids=range(len(ORDERS)))
async def test_every_row_comes_once_and_in_order(db: Database, order: tuple[Any, ...]) -> None:
    """Forward to the last page, and back to the first; the primary key decides between equals."""
    descending = bool(order) and "DESC" in str(order[-1])
    by_key = Book.id.desc() if descending else Book.id
    async with db.read_session() as session:
        wanted = (await session.scalars(select(Book.id).order_by(*order, by_key))).all()
        pages = [await keyset_page(session, select(Book), *order, size=5)]
        while cursor := pages[-1].next:
            pages.append(await keyset_page(session, select(Book), *order, size=5, cursor=cursor))
        assert [each.id for page in pages for each in page.items] == list(wanted)
        assert [len(page.items) for page in pages] == [5, 5, 5, 5, 3]
        page = pages[-1]
        for before in reversed(pages[:-1]):
            assert page.previous is not None
            page = await keyset_page(session, select(Book), *order, size=5, cursor=page.previous)
            assert page.items == before.items
            assert page.next is not None
        assert page.previous is None


async def test_rows_that_come_and_go_move_no_others(db: Database) -> None:
    """A page begins after the last row seen, even if that is deleted."""
    async with db.session() as session:
        first = await keyset_page(session, select(Book), Book.title, size=4)
        await session.delete(first.items[-1])
        session.add(Book(**{**_values(first.items[0]), "id": 99, "title": "a title"}))
        await session.flush()
        second = await keyset_page(session, select(Book), Book.title, size=4, cursor=first.next)
        wanted = select(Book.id).where(Book.id.not_in([99, *(each.id for each in first.items)]))
        expected = await session.scalars(wanted.order_by(Book.title, Book.id).limit(4))
        assert [each.id for each in second.items] == list(expected)


def _values(of: Book) -> dict[str, Any]:
    names = ("title", "price", "printed", "number", "weight", "is_lent")
    return {name: getattr(of, name) for name in names}


async def test_a_page_may_be_filtered_and_plain(db: Database) -> None:
    """A plain session gives the page at once, of objects or of a column."""

    def load(session: Session) -> None:
        statement = select(Book.title).where(Book.id > 20)
        page = keyset_page(session, statement, Book.id.desc(), size=2)
        assert page.items == ["title 2", "title 1"]
        last = keyset_page(session, statement, Book.id.desc(), size=2, cursor=page.next)
        assert (last.items, last.next) == (["title 0"], None)
        numbered = offset_page(session, statement.order_by(Book.title), size=2)
        assert (numbered.items, numbered.total) == (["title 0", "title 1"], 3)

    await db.run_sync(load)


@pytest.mark.parametrize(
    ("order", "written"),
    [
        ((Book.id.desc(),), "id DESC"),
        ((Book.id,), "id"),
        ((Book.title, Book.id.asc()), "title, id ASC"),
        ((Book.title.desc(),), "title DESC, id"),
        ((), "id"),
    ],
)
async def test_no_column_is_ordered_by_twice(
    db: Database, order: tuple[Any, ...], written: str
) -> None:
    """The primary key comes last only where the order does not have it."""
    statements = []

    def note(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        statements.append(statement.replace("book.", ""))

    async with db.read_session() as session:
        event.listen(db.read_engine.sync_engine, "before_cursor_execute", note)
        await offset_page(session, select(Book).order_by(*order), size=3)
    (order_by,) = re.findall(r"ORDER BY (.+?)\s+LIMIT", statements[0])
    assert order_by == written


async def test_numbered_pages_know_how_many_there_are(db: Database) -> None:
    """Equal rows have a stable order; a page past the end is empty."""
    async with db.read_session() as session:
        statement = select(Book).order_by(Book.title)
        pages = [await offset_page(session, statement, number=n, size=10) for n in (1, 2, 3, 4)]
        found = [each.id for page in pages for each in page.items]
        assert found == list(await session.scalars(select(Book.id).order_by(Book.title, Book.id)))
        assert [(page.total, page.pages, len(page.items)) for page in pages] == [
            (COUNT, 3, 10),
            (COUNT, 3, 10),
            (COUNT, 3, 3),
            (COUNT, 3, 0),
        ]


def cursor_of(*values: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(values).encode()).decode().rstrip("=")


GARBAGE = [
    "",
    "x",
    "%00",
    "é",
    "=" * 9,
    "A" * 5000,
    base64.b64encode(b"[" * 100_000).decode(),
    cursor_of(),
    cursor_of("n"),
    cursor_of("x", "a", 1),
    cursor_of("n", "a", 1, 2),
    cursor_of("n", "a\0", 1),
    cursor_of("n", "\ud800", 1),
    cursor_of("n", None, 1),
    cursor_of("n", {}, 1),
    cursor_of("n", "a", 2**63),
    cursor_of("n", "a", True),
    cursor_of("n", "a", float("nan")),
    base64.b64encode(b'{"n": 1}').decode(),
    base64.b64encode(b"\xff\xfe").decode(),
]


async def test_garbage_in_place_of_a_cursor_is_a_bad_request(db: Database) -> None:
    """Whatever it is, it reaches no database and breaks nothing."""
    async with db.read_session() as session:
        for garbage in GARBAGE:
            with pytest.raises(BadRequest, match="cursor"):
                await keyset_page(session, select(Book), Book.title, cursor=garbage)
        for column, value in [
            (Book.price, "NaN"),
            (Book.price, "1e99999"),
            (Book.price, 1.5),
            (Book.printed, "yesterday"),
            (Book.number, "1"),
            (Book.number, 1),
            (Book.weight, "1"),
            (Book.weight, True),
            (Book.weight, float("inf")),
            (Book.is_lent, 1),
        ]:
            with pytest.raises(BadRequest, match="cursor"):
                await keyset_page(session, select(Book), column, cursor=cursor_of("n", value, 1))


async def test_values_at_the_edge_end_in_a_page_or_a_bad_request(db: Database) -> None:
    """What only the database can refuse is the client's fault, too."""
    aware = datetime(2020, 1, 1, tzinfo=UTC).isoformat()
    for column, value, key in [
        (Book.title, "x" * 10_000, 1),
        (Book.title, "a", 2**63 - 1),
        (Book.title, "a", -(2**63) + 1),
        (Book.price, "9" * 30, 1),
        (Book.printed, aware, 1),
        (Book.printed, "0001-01-01T00:00:00", 1),
    ]:
        async with db.read_session() as session:
            try:
                page = await keyset_page(
                    session, select(Book), column, cursor=cursor_of("n", value, key)
                )
            except BadRequest:
                continue
            assert len(page.items) <= COUNT


async def test_a_page_that_cannot_be_is_a_bad_request(db: Database) -> None:
    """Sizes and numbers come from clients as well."""
    async with db.read_session() as session:
        for size in (0, -1, 101, 2**70):
            with pytest.raises(BadRequest, match="from 1 to 100"):
                await keyset_page(session, select(Book), size=size)
            with pytest.raises(BadRequest, match="from 1 to 100"):
                await offset_page(session, select(Book), size=size)
        for number in (0, -1, 2**63):
            with pytest.raises(BadRequest, match="no such page"):
                await offset_page(session, select(Book), number=number)
        last = await offset_page(session, select(Book), number=2**62 // 20, size=20)
        assert last.items == []


async def test_an_order_that_cannot_be_kept_is_refused(db: Database) -> None:
    """Before any page is served: columns with NULL, types without an order in JSON, no class."""
    async with db.session() as session:
        with pytest.raises(ConfigurationError, match="may be NULL"):
            await keyset_page(session, select(Book), Book.subtitle.desc())
        with pytest.raises(ConfigurationError, match="cannot hold"):
            await keyset_page(session, select(Book), Book.cover)
        with pytest.raises(ConfigurationError, match="cannot hold"):
            await keyset_page(session, select(Book), text("title"))
        with pytest.raises(ConfigurationError, match="mapped class"):
            await offset_page(session, select(func.now()))
        with pytest.raises(ConfigurationError, match="has NULL"):
            await keyset_page(
                session, select(Book), func.lower(Book.subtitle, type_=String), size=2
            )


async def test_a_client_turns_pages(database_url: str) -> None:
    """In a handler: the cursor of an answer leads to the next; a wrong one is a 400."""
    app = make_app(database_url)

    @app.get("/books")
    async def books(request: Request, session: AsyncSession) -> HTTPResponse:
        page = await keyset_page(
            session, select(Book), Book.title, cursor=request.args.get("cursor"), size=2
        )
        return as_json({"books": [each.id for each in page.items], "next": page.next})

    async with serving(app) as client:
        async with app.ctx.db.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with app.ctx.db.session() as session:
            session.add_all(book(number) for number in (1, 2, 3))
        first = (await client.get("/books")).json()
        assert first["books"] == [3, 1]
        answer = await client.get("/books", params={"cursor": first["next"]})
        assert answer.json() == {"books": [2], "next": None}
        assert (await client.get("/books", params={"cursor": "x"})).status_code == 400


async def test_an_error_of_the_app_is_no_bad_request(db: Database) -> None:
    """A statement that the database cannot run at all is not the client's fault."""
    wrong = select(Book).where(text("nothing = 1"))
    async with db.read_session() as session:
        page = await keyset_page(session, select(Book), Book.title, size=2)
        for cursor in (None, page.next):
            with pytest.raises(DBAPIError, match="nothing"):
                await keyset_page(session, wrong, Book.title, cursor=cursor)
