"""Errors of the database as a client sees them: the status, and nothing that gives SQL away."""

import asyncio
import logging
from datetime import date
from typing import Any

import httpx
import pytest
from sanic import HTTPResponse, Request, empty, text
from sqlalchemy import CheckConstraint, ForeignKey, String, select
from sqlalchemy import text as sql
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp.contrib import errors
from sanic_db_bp.contrib.errors import UniqueViolation, get_or_404, one_or_404
from tests.databases import on, on_all, on_every_driver, on_every_driver_of_servers
from tests.serving import serving
from tests.shop import Part, Shop, make_app

pytestmark = on_every_driver


class Base(DeclarativeBase):
    pass


class Owner(Base):
    __tablename__ = "owner"
    __table_args__ = (CheckConstraint("age >= 0"),)

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(10), unique=True)
    age: Mapped[int] = mapped_column(default=0)
    born: Mapped[date | None]


class Pet(Base):
    __tablename__ = "pet"

    id: Mapped[int] = mapped_column(primary_key=True)
    owner_id: Mapped[int] = mapped_column(ForeignKey("owner.id"))


def app_of(database_url: str, **options: Any) -> Shop:
    """An app with rows to violate, and routes that do what the request says."""
    app = make_app(database_url)
    errors.install(app, **options)

    @app.before_server_start
    async def fill(app: Shop) -> None:
        async with app.ctx.db.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with app.ctx.db.session() as session:
            session.add(Owner(id=1, name="Ada"))
            await session.flush()
            session.add(Pet(id=1, owner_id=1))

    @app.post("/async")
    async def asynchronous(request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(sql(request.json["sql"]))
        return empty()

    @app.post("/plain")
    def plain(request: Request, session: Session) -> HTTPResponse:
        session.execute(sql(request.json["sql"]))
        return empty()

    @app.get("/owners/<name>")
    def owner(request: Request, name: str, session: Session) -> HTTPResponse:
        return text(str(session.scalars(select(Owner).where(Owner.name == name)).one().id))

    return app


JSON = {"content-type": "application/json"}
BROKEN = [
    ("INSERT INTO owner (id, name, age) VALUES (2, 'Ada', 0)", 409),
    ("INSERT INTO owner (id, name, age) VALUES (1, 'Bob', 0)", 409),
    ("INSERT INTO pet (id, owner_id) VALUES (2, 77)", 409),
    ("DELETE FROM owner WHERE id = 1", 409),
    ("INSERT INTO owner (id, name, age) VALUES (2, NULL, 0)", 400),
    ("INSERT INTO owner (id, name, age) VALUES (2, 'Bob', -1)", 400),
    ("INSERT INTO nowhere VALUES (1)", 500),
]


async def test_an_error_has_the_status_that_tells_the_client_what_to_do(database_url: str) -> None:
    """In both forms of session; the answer has neither SQL nor names of tables in it."""
    async with serving(app_of(database_url)) as client:
        for statement, status in BROKEN:
            for form in ("async", "plain"):
                answer = await client.post(f"/{form}", json={"sql": statement})
                assert answer.status_code == status, (statement, answer.text)
                told = (answer.text + str(answer.headers)).lower()
                assert not any(word in told for word in ("insert", "owner", "ada", "sqlalche"))
        assert (await client.get("/owners/Ada")).text == "1"
        assert (await client.get("/owners/Eve")).status_code == 404


@on("postgresql", "mariadb", every_driver=True)
async def test_a_value_that_does_not_fit_is_the_fault_of_the_request(database_url: str) -> None:
    """Too long, or out of range; SQLite takes everything."""
    async with serving(app_of(database_url)) as client:
        for values in ("2, 'much too long a name', 0", "2, 'Bob', 99999999999"):
            statement = f"INSERT INTO owner (id, name, age) VALUES ({values})"
            assert (await client.post("/async", json={"sql": statement})).status_code == 400


@pytest.mark.parametrize(
    "body", ['{"age": 1%s}' % ("0" * 30), r'{"name": "\ud800"}', '{"born": "x"}']
)
async def test_a_value_that_cannot_be_sent_is_the_fault_of_the_request(
    database_url: str, body: str
) -> None:
    """Some are refused by a driver, in a way of its own, and some by SQLAlchemy before that."""
    app = app_of(database_url)

    @app.post("/owners")
    def add(request: Request, session: Session) -> HTTPResponse:
        session.add(Owner(**{"name": "Bob", **request.json}))
        return empty()

    async with serving(app) as client:
        answer = await client.post("/owners", content=body, headers=JSON)
        assert answer.status_code == 400


async def test_an_error_of_the_code_is_not_blamed_on_the_request(database_url: str) -> None:
    """Such as a parameter that was forgotten, which fails before anything is sent."""
    async with serving(app_of(database_url)) as client:
        answer = await client.post("/plain", json={"sql": "SELECT :forgotten"})
        assert answer.status_code == 500


@on("sqlite", "postgresql", every_driver=True)
async def test_a_failing_commit_is_told_the_same(database_url: str) -> None:
    """A deferred constraint fails only then."""
    app = app_of(database_url, foreign_key_status=422)

    @app.post("/parts")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Part(item_id=77))
        return empty()

    async with serving(app) as client:
        answer = await client.post("/parts")
        assert (answer.status_code, "part" in answer.text.lower()) == (422, False)


async def test_a_commit_that_fails_by_the_fault_of_the_client_is_no_error_of_the_server(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It logs as little as any 4xx; what is no fault of the client is one line at ERROR."""
    app = app_of(database_url)

    @app.post("/owners/<key:int>")
    def add(request: Request, key: int, session: Session) -> HTTPResponse:
        session.add(Owner(id=key, name="Ada"))
        return empty()

    async with serving(app) as client:
        assert (await client.post("/owners/2")).status_code == 409
        assert [line for line in caplog.records if line.levelno >= logging.WARNING] == []
        async with app.ctx.db.engine.begin() as connection:
            await connection.run_sync(Base.metadata.drop_all)
        assert (await client.post("/owners/2")).status_code == 500
        (line,) = [line for line in caplog.records if line.levelno >= logging.WARNING]
        assert "COMMIT failed" in line.getMessage()


async def test_an_answer_that_has_begun_cannot_tell_the_client(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The log has the error of the COMMIT, whose status the client never gets."""
    app = app_of(database_url)

    @app.post("/owners")
    async def add(request: Request, session: AsyncSession) -> None:
        response = await request.respond()
        await response.send("begun")
        session.add(Owner(id=1, name="Eve"))
        await response.eof()

    async with serving(app) as client:
        with pytest.raises(httpx.RemoteProtocolError):
            await client.post("/owners")
    (line,) = [line for line in caplog.records if line.levelno >= logging.ERROR]
    assert "COMMIT failed" in line.getMessage()


@on_every_driver_of_servers
async def test_a_lost_race_may_be_tried_again(database_url: str) -> None:
    """Two transactions wait for each other: one succeeds, the other one is told when to return."""
    app = app_of(database_url)
    both = asyncio.Barrier(2)

    @app.post("/ages/<first:int>/<second:int>")
    async def grow(
        request: Request, first: int, second: int, session: AsyncSession
    ) -> HTTPResponse:
        await session.execute(sql(f"UPDATE owner SET age = age + 1 WHERE id = {first}"))
        await both.wait()
        await session.execute(sql(f"UPDATE owner SET age = age + 1 WHERE id = {second}"))
        return empty()

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add(Owner(id=2, name="Bob"))
        answers = await asyncio.gather(client.post("/ages/1/2"), client.post("/ages/2/1"))
    good, bad = sorted(answers, key=lambda answer: answer.status_code)
    assert (good.status_code, bad.status_code) == (204, 503)
    assert bad.headers["retry-after"] == "1"


@on_all
async def test_the_app_has_the_last_word(database_url: str) -> None:
    """By a handler for an exception of the module, with the cause; or for one of SQLAlchemy's."""
    app = app_of(database_url)

    @app.exception(UniqueViolation)
    async def taken(request: Request, error: UniqueViolation) -> HTTPResponse:
        assert isinstance(error.__cause__, IntegrityError)
        return text("taken", status=418)

    @app.exception(Exception)
    async def unexpected(request: Request, error: Exception) -> HTTPResponse:
        return text(type(error).__name__, status=599)

    async with serving(app) as client:
        answer = await client.post("/async", json={"sql": BROKEN[0][0]})
        assert (answer.status_code, answer.text) == (418, "taken")
        answer = await client.post("/async", json={"sql": BROKEN[-1][0]})
        assert answer.status_code == 599
        assert answer.text in ("ProgrammingError", "OperationalError")


@on_all
async def test_what_is_not_there_is_not_found(database_url: str) -> None:
    """The helpers work with both forms of session, and without anything that is installed."""
    app = make_app(database_url)

    @app.get("/plain/<key:int>")
    def plain(request: Request, key: int, session: Session) -> HTTPResponse:
        owner = get_or_404(session, Owner, key)
        assert one_or_404(session, select(Owner.name).where(Owner.id == key)) == owner.name
        return text(one_or_404(session, select(Owner).where(Owner.name == owner.name)).name)

    @app.get("/async/<key:int>")
    async def asynchronous(request: Request, key: int, session: AsyncSession) -> HTTPResponse:
        if key > 2:
            await one_or_404(session, select(Owner).where(Owner.id == key))
        owner = await get_or_404(session, Owner, key)
        return text(await one_or_404(session, select(Owner.name).where(Owner.id == owner.id)))

    async with serving(app) as client:
        async with app.ctx.db.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        async with app.ctx.db.session() as session:
            session.add(Owner(id=1, name="Ada"))
        for form in ("plain", "async"):
            assert (await client.get(f"/{form}/1")).text == "Ada"
            for key in (2, 3):
                answer = await client.get(f"/{form}/{key}")
                assert (answer.status_code, "owner" in answer.text) == (404, False)
