"""The optional mixins: Active Record, timestamps, properties of a class."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import ClassVar

import pytest
from sanic import HTTPResponse, Request, Sanic, empty, json
from sqlalchemy import String, literal, select, update
from sqlalchemy.exc import IntegrityError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp import (
    Database,
    DatabaseBlueprint,
    DatabaseSettings,
    NoCurrentSession,
    SessionOutsideBridge,
)
from sanic_db_bp.models import ActiveRecordMixin, TimestampMixin, UTCDateTime, class_property
from tests.databases import on_sqlite
from tests.serving import serving


class Base(DeclarativeBase):
    pass


class User(ActiveRecordMixin, TimestampMixin, Base):
    __tablename__ = "account"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50), unique=True)


class ReportsSession(Session):
    """The plain session of the second database."""


class ReportsAsyncSession(AsyncSession):
    """The asyncio session of the second database."""


class ReportsBase(DeclarativeBase):
    pass


class Report(ActiveRecordMixin, ReportsBase):
    __tablename__ = "report"

    session_class: ClassVar[type[Session]] = ReportsSession

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with empty tables."""
    database = Database(DatabaseSettings(url=database_url, env_file=None))
    await database.create_missing_tables(Base.metadata)
    yield database
    await database.dispose(within=1)


@pytest.fixture
async def reports(tmp_path: Path) -> AsyncIterator[Database]:
    """A second database, with session classes of its own."""
    database = Database(
        DatabaseSettings(url=f"sqlite:///{tmp_path / 'reports.db'}", env_file=None),
        name="reports",
        session_class=ReportsSession,
        async_session_class=ReportsAsyncSession,
    )
    await database.create_missing_tables(ReportsBase.metadata)
    yield database
    await database.dispose(within=1)


@on_sqlite
async def test_a_model_keeps_its_own_rows(database: Database) -> None:
    """save, get, query, select and delete work with the session of the unit of work."""

    def work(session: Session) -> int:
        ada = User(name="Ada").save()
        assert ada in session
        assert ada.id is not None
        assert User.get(ada.id) is ada
        User(name="Grace").save()
        assert [user.name for user in User.query.order_by(User.name)] == ["Ada", "Grace"]
        assert session.scalars(User.select(User.name == "Grace", User.id > 0)).one().name == "Grace"
        assert len(session.scalars(User.select()).all()) == 2
        return ada.id

    def change(_session: Session, key: int) -> None:
        ada = User.get(key)
        assert ada is not None
        ada.name = "Ada Lovelace"
        ada.save()

    def remove(_session: Session, key: int) -> None:
        ada = User.get(key)
        assert ada is not None
        assert ada.name == "Ada Lovelace"
        ada.delete()
        assert User.get(key) is None

    key = await database.run_sync(work)
    await database.run_sync(change, key)
    await database.run_sync(remove, key)
    assert await database.run_sync(lambda _: User.query.count()) == 1


async def test_what_a_model_has_saved_is_rolled_back_with_the_unit_of_work(
    database: Database,
) -> None:
    """save() writes, and the unit of work commits."""

    def work(_session: Session) -> None:
        User(name="Ada").save()
        raise LookupError

    with pytest.raises(LookupError):
        await database.run_sync(work)
    assert await database.run_sync(lambda _: User.query.count()) == 0


async def test_the_database_refuses_on_save(database: Database) -> None:
    """The error comes from save(), not from the end of the unit of work."""

    def work(session: Session) -> None:
        User(name="Ada").save()
        with pytest.raises(IntegrityError):
            User(name="Ada").save()
        session.rollback()

    await database.run_sync(work)


@on_sqlite
async def test_a_model_works_in_code_of_an_asyncio_session(database: Database) -> None:
    """run_sync of an AsyncSession is plain code too, with the same session."""
    async with database.session() as session:
        user = await session.run_sync(lambda _: User(name="Ada").save())
        assert user in session


@on_sqlite
async def test_a_model_outside_plain_code_says_what_to_do(database: Database) -> None:
    """It cannot wait in asyncio code, and has no session outside of a unit of work."""
    async with database.session():
        with pytest.raises(SessionOutsideBridge):
            User.get(1)
    with pytest.raises(NoCurrentSession, match=r"app\.ctx\.db\.session"):
        User.get(1)
    with pytest.raises(NoCurrentSession):
        _ = User.query
    assert User.select() is not None


@on_sqlite
async def test_each_model_uses_its_own_database(database: Database, reports: Database) -> None:
    """Whichever block is the inner one."""

    def both() -> None:
        User(name="Ada").save()
        Report(name="sales").save()
        assert User.query.count() == 1
        assert Report.query.count() == 1

    async with database.block() as outer, reports.block() as inner:
        await outer.async_session.run_sync(lambda _: both())
        assert outer.in_transaction
        assert inner.in_transaction
    async with reports.session() as first, database.session():
        assert await first.run_sync(lambda _: (User.query.count(), Report.query.count())) == (1, 1)
    async with reports.session() as session:
        with pytest.raises(NoCurrentSession, match="Session"):
            await session.run_sync(lambda _: User.query)


async def test_timestamps_are_set_and_moved(database: Database) -> None:
    """Both are set when a row is created; a change moves one of them."""
    before = datetime.now(UTC) - timedelta(seconds=2)

    def create(session: Session) -> int:
        user = User(name="Ada").save()
        session.refresh(user)
        assert before < aware(user.created_at) < datetime.now(UTC) + timedelta(seconds=2)
        assert aware(user.updated_at) - aware(user.created_at) < timedelta(seconds=1)
        return user.id

    def age(session: Session, key: int) -> None:
        old = datetime(2020, 1, 1, tzinfo=UTC)
        statement = update(User).where(User.id == key)
        session.execute(statement.values(created_at=old, updated_at=old))

    def change(session: Session, key: int) -> None:
        user = session.get_one(User, key)
        user.name = "Ada Lovelace"
        user.save()
        session.refresh(user)
        assert aware(user.created_at) == datetime(2020, 1, 1, tzinfo=UTC)
        assert aware(user.updated_at) > before

    key = await database.run_sync(create)
    await database.run_sync(age, key)
    await database.run_sync(change, key)


def aware(moment: datetime) -> datetime:
    assert moment.tzinfo is not None, "timestamps are timezone-aware"
    return moment.astimezone(UTC)


async def test_timestamps_are_known_after_save(database: Database) -> None:
    """They are loaded when they are looked at, without a refresh."""

    def work(_session: Session) -> None:
        user = User(name="Ada").save()
        assert user.created_at <= user.updated_at

    await database.run_sync(work)


async def test_times_are_the_same_moment_on_every_database(database: Database) -> None:
    """A time of another zone is found again as UTC; nothing is lost but the name of the zone."""
    moment = datetime(2024, 2, 29, 23, 59, 59, 123456, tzinfo=timezone(timedelta(hours=-5)))

    def work(session: Session) -> None:
        user = User(name="Ada", created_at=moment).save()
        session.refresh(user)
        assert user.created_at == moment
        assert user.created_at.tzinfo is UTC
        assert session.scalars(User.select(User.created_at == moment)).one() is user
        assert session.scalars(User.select(User.created_at > moment)).all() == []

    await database.run_sync(work)


@on_sqlite
async def test_a_time_without_a_zone_is_refused(database: Database) -> None:
    """It could be any of 24; the error names the remedy."""

    def work(session: Session) -> None:
        with pytest.raises(StatementError, match=r"datetime\.now\(UTC\)"):
            User(name="Ada", created_at=datetime(2024, 1, 1)).save()
        session.rollback()

    await database.run_sync(work)


@on_sqlite
async def test_no_time_is_no_time(database: Database) -> None:
    """The type of the columns can be used where a time may be missing."""

    def work(session: Session) -> None:
        assert session.scalar(select(literal(None, UTCDateTime()))) is None

    await database.run_sync(work)


def test_a_class_property_is_computed_for_each_class() -> None:
    """A subclass gets its own value, an instance that of its class."""

    class Animal:
        sound: ClassVar[str] = "?"

        @class_property
        def twice(cls) -> str:
            """What it says."""
            return cls.sound * 2

    class Cat(Animal):
        sound = "miaow"

    assert (Animal.twice, Cat.twice, Cat().twice) == ("??", "miaowmiaow", "miaowmiaow")
    assert Animal.__dict__["twice"].__doc__ == "What it says."


async def test_models_work_in_handlers(database_url: str) -> None:
    """With the request's session, in handlers of both kinds, one request beside the other."""
    app = Sanic("models")
    app.blueprint(
        DatabaseBlueprint(
            url=database_url, env_file=None, create_tables=True, metadata=Base.metadata
        )
    )

    @app.post("/users/<name:str>")
    async def create(request: Request, name: str, session: Session) -> HTTPResponse:
        user = User(name=name)
        await asyncio.sleep(0)
        assert user.save() in session
        return json({"id": user.id}, status=201)

    @app.post("/refused/<name:str>")
    def refused(request: Request, name: str, session: Session) -> HTTPResponse:
        User(name=name).save()
        return empty(status=422)

    @app.get("/users")
    def users(request: Request, session: Session) -> HTTPResponse:
        return json(sorted(user.name for user in User.query))

    async with serving(app) as client:
        answers = await asyncio.gather(*(client.post(f"/users/{name}") for name in "abc"))
        assert [answer.status_code for answer in answers] == [201, 201, 201]
        assert (await client.post("/refused/d")).status_code == 422
        assert (await client.get("/users")).json() == ["a", "b", "c"]
