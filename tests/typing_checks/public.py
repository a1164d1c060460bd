"""What a type checker, and so an editor, knows about code that uses the package.

This file is checked, never run: see ``tests/test_typing.py``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import datetime
from typing import Any, ClassVar, assert_type

from sanic import HTTPResponse, Request, Sanic, empty, json
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Query, Session, mapped_column

from sanic_db_bp import (
    AsyncReadSession,
    Database,
    DatabaseBlueprint,
    DatabaseSettings,
    ReadSession,
    current_session,
    db_bp,
    inject_session,
    on_commit,
    transactional,
)
from sanic_db_bp.contrib.errors import get_or_404, one_or_404
from sanic_db_bp.contrib.pagination import KeysetPage, OffsetPage, keyset_page, offset_page
from sanic_db_bp.models import ActiveRecordMixin, TimestampMixin, class_property


class Base(DeclarativeBase):
    pass


class User(ActiveRecordMixin, TimestampMixin, Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str]


class ReportsSession(Session):
    def year(self) -> int:
        return 2026


class ReportsAsyncSession(AsyncSession):
    async def year(self) -> int:
        return 2026


class Report(ActiveRecordMixin, Base):
    __tablename__ = "report"

    session_class: ClassVar[type[Session]] = ReportsSession

    id: Mapped[int] = mapped_column(primary_key=True)


app = Sanic("typing")
app.blueprint(db_bp)
app.blueprint(
    DatabaseBlueprint(
        "reports",
        session_class=ReportsSession,
        async_session_class=ReportsAsyncSession,
        metadata=Base.metadata,
        pool_size=5,
    )
)
assert_type(db_bp, DatabaseBlueprint)


@app.get("/plain/<user_id:int>")
def plain(request: Request, user_id: int, session: Session) -> HTTPResponse:
    assert_type(session.get_one(User, user_id), User)
    assert_type(session.get(User, user_id), User | None)
    assert_type(session.scalars(select(User.name)).all(), Sequence[str])
    return empty()


@app.get("/async/<user_id:int>")
async def asynchronous(request: Request, user_id: int, session: AsyncSession) -> HTTPResponse:
    assert_type(await session.get_one(User, user_id), User)
    assert_type((await session.execute(select(User.id))).scalar_one(), int)
    return json({})


@app.get("/others")
async def others(
    request: Request,
    read: ReadSession,
    async_read: AsyncReadSession,
    db: Database,
    engine: AsyncEngine,
    reports: ReportsSession,
    maybe: Session | None = None,
) -> HTTPResponse:
    assert_type(read.get(User, 1), User | None)
    assert_type(await async_read.get(User, 1), User | None)
    assert_type(db.engine, AsyncEngine)
    assert_type(reports.year(), int)
    return empty()


@transactional(isolation="SERIALIZABLE", retries=3)
async def with_retries(request: Request, session: Session) -> HTTPResponse:
    return empty()


@transactional(commit=False)
def marked(request: Request, session: Session, *, number: int = 1) -> HTTPResponse:
    return empty()


@transactional
def bare(request: Request, session: Session) -> HTTPResponse:
    return empty()


async def keeps_the_signature(request: Request, session: Session) -> None:
    assert_type(await with_retries(request, session), HTTPResponse)
    assert_type(marked(request, session, number=2), HTTPResponse)
    marked(request, session, number="x")  # type: ignore[arg-type]
    marked(request)  # type: ignore[call-arg]
    assert_type(bare(request, session), HTTPResponse)


def finds_the_current_session() -> None:
    assert_type(current_session(Session), Session)
    assert_type(current_session(AsyncSession), AsyncSession)
    assert_type(current_session(ReadSession), ReadSession)
    assert_type(current_session(AsyncReadSession), AsyncReadSession)
    assert_type(current_session(ReportsSession), ReportsSession)
    assert_type(current_session(ReportsSession).year(), int)
    assert_type(current_session(), Any)
    current_session(User)  # type: ignore[type-var]


@inject_session
async def task(app: Sanic[Any, Any], session: AsyncSession) -> int:
    return 1


@inject_session
def command(name: str, session: Session) -> str:
    return name


@inject_session(app=app)
async def of_an_app(session: ReportsAsyncSession) -> int:
    return await session.year()


async def calls_what_is_injected() -> None:
    assert_type(await task(app), int)
    assert_type(await command("x"), str)
    assert_type(await command(name="x"), str)
    assert_type(await of_an_app(), int)
    assert_type(asyncio.create_task(task(app)), asyncio.Task[int])


def count(session: Session, minimum: int, *, name: str = "") -> list[User]:
    return []


async def works_outside_requests(db: Database) -> None:
    async with db.session() as session:
        assert_type(session, AsyncSession)
    async with db.session(isolation_level="SERIALIZABLE") as session:
        assert_type(await session.get(User, 1), User | None)
    async with db.read_session() as read:
        assert_type(read, AsyncReadSession)
    assert_type(await db.run_sync(count, 1, name="x"), list[User])
    assert_type(await db.run_sync(lambda session: session.get(User, 1)), User | None)
    await db.run_sync(count, "x")  # type: ignore[arg-type]
    await db.run_sync(count)  # type: ignore[call-arg]
    assert_type(await db.ping(), float)
    assert_type(db.pool_status()["checked_out"], int)
    assert_type(db.read_engine, AsyncEngine)
    await db.dispose()


def makes_a_database_without_an_app() -> None:
    assert_type(Database(), Database)
    assert_type(Database(DatabaseSettings(url="sqlite:///x.db")), Database)
    assert_type(DatabaseSettings.load("SANIC_REPORTS_"), DatabaseSettings)
    assert_type(DatabaseSettings().pool_size, int)


async def asynchronous_callback() -> None: ...


def needs_an_argument(number: int) -> None: ...


def registers_callbacks() -> None:
    on_commit(registers_callbacks)
    on_commit(asynchronous_callback)
    on_commit(lambda: print("committed"))
    on_commit(needs_an_argument)  # type: ignore[arg-type]


class Animal:
    @class_property
    def label(cls) -> str:
        return "animal"


def uses_models(user: User) -> None:
    assert_type(User.query, Query[User])
    assert_type(User.query.all(), list[User])
    assert_type(User.select(User.id > 1, User.name == "x"), Select[User])
    assert_type(User.get(1), User | None)
    assert_type(user.save(), User)
    assert_type(user.created_at, datetime)
    assert_type(Report.get(1), Report | None)
    assert_type(Animal.label, str)
    user.delete()


def executes_what_a_model_selects(session: Session) -> None:
    assert_type(session.scalars(User.select()).one(), User)


def finds_or_answers_404(session: Session) -> None:
    assert_type(get_or_404(session, User, 1), User)
    assert_type(one_or_404(session, select(User)), User)
    assert_type(one_or_404(session, select(User.name)), str)


async def finds_or_answers_404_later(session: AsyncSession) -> None:
    assert_type(await get_or_404(session, User, 1), User)
    assert_type(await one_or_404(session, select(User)), User)


def turns_pages(session: Session) -> None:
    assert_type(keyset_page(session, select(User), User.name.desc()), KeysetPage[User])
    assert_type(offset_page(session, select(User)).items, Sequence[User])


async def turns_pages_later(session: AsyncSession) -> None:
    assert_type(await keyset_page(session, select(User), User.name, size=5), KeysetPage[User])
    assert_type(await offset_page(session, select(User), number=2), OffsetPage[User])
