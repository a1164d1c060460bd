"""An app of somebody who uses the pytest plugin."""

import asyncio
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from typing import Any

from sanic import HTTPResponse, Request, Sanic, json, text
from sanic_testing.reusable import ReusableClient  # type: ignore[import-untyped]
from sqlalchemy import ForeignKeyConstraint, String, func, insert, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp import (
    AsyncReadSession,
    Database,
    DatabaseBlueprint,
    ReadSession,
    on_commit,
    transactional,
)
from tests.serving import make_light

_numbers = count(1)


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)


class Part(Base):
    """A part of an item, which need not exist before the COMMIT (MariaDB cannot defer that)."""

    __tablename__ = "part"
    __table_args__ = (
        ForeignKeyConstraint(
            ["item_id"], ["item.id"], deferrable=True, initially="DEFERRED"
        ).ddl_if(callable_=lambda *_, dialect, **__: dialect.name != "mysql"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int]


@contextmanager
def reusable_client(app: Sanic[Any, Any]) -> Iterator[ReusableClient]:
    """sanic-testing's client, on a port that is free, and out of the way of later ones."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
    with ReusableClient(app, port=port) as client:
        yield client


def create_app(**settings: Any) -> Sanic[Any, Any]:
    app: Sanic[Any, Any] = Sanic(f"shop-{next(_numbers)}")
    values = {"metadata": Base.metadata, "create_tables": True, **settings}
    app.blueprint(DatabaseBlueprint(**values))
    app.ctx.told = []
    for method, path, handler in ROUTES:
        app.add_route(handler, path, methods=[method])
    make_light(app)
    return app


def same_database(app: Sanic[Any, Any]) -> Database:
    """Another pool on the database of an app: in SQLite each has one connection that writes."""
    return Database(app.ctx.db.settings, name="same")


async def add(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
    session.add(Item(name=name))
    return json({}, status=201)


def add_plainly(request: Request, name: str, session: Session) -> HTTPResponse:
    session.add(Item(name=name))
    session.flush()
    return json({}, status=201)


async def add_and_wait(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
    before = await session.scalar(select(func.count()).select_from(Item))
    session.add(Item(name=name))
    await session.flush()
    await asyncio.sleep(0.02)
    after = await session.scalar(select(func.count()).select_from(Item))
    return json([before, after])


async def names(request: Request, session: AsyncReadSession) -> HTTPResponse:
    return json(list(await session.scalars(select(Item.name).order_by(Item.name))))


def names_plainly(request: Request, session: ReadSession) -> HTTPResponse:
    return json(list(session.scalars(select(Item.name).order_by(Item.name))))


async def names_of_all_kinds(
    request: Request, name: str, session: Session, reading: ReadSession, engine: AsyncEngine
) -> HTTPResponse:
    session.add(Item(name=name))
    session.commit()
    async with engine.connect() as connection:
        by_engine = list(await connection.scalars(select(Item.name)))
    return json([list(reading.scalars(select(Item.name))), by_engine])


async def add_and_fail(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
    session.add(Item(name=name))
    await session.flush()
    raise RuntimeError("after the flush")


async def add_around(
    request: Request, name: str, session: AsyncSession, db: Database
) -> HTTPResponse:
    """A block of its own inside of the request's transaction, and another one that fails."""
    session.add(Item(name=name))
    await session.flush()
    async with db.session() as inner:
        inner.add(Item(name=f"{name} inside"))
    try:
        async with db.session() as failing:
            failing.add(Item(name=f"{name} failed"))
            await failing.flush()
            raise LookupError(name)
    except LookupError:
        session.add(Item(name=f"{name} after"))
    return json({}, status=201)


async def add_at_once(
    request: Request, name: str, session: AsyncSession, db: Database
) -> HTTPResponse:
    """Three tasks with sessions of their own, while the request has one in use."""
    session.add(Item(name=name))
    await session.flush()

    async def add_one(number: int) -> None:
        async with db.session() as own:
            own.add(Item(name=f"{name} {number}"))
            await own.flush()
            await asyncio.sleep(0.01)
            if number == 2:
                raise LookupError(name)

    results = await asyncio.gather(*map(add_one, range(3)), return_exceptions=True)
    return json([repr(result) for result in results])


async def add_later(request: Request, name: str, db: Database) -> HTTPResponse:
    async def job() -> None:
        await db.run_sync(lambda session: session.add(Item(name=name)))

    await asyncio.create_task(job())
    return json({}, status=201)


async def add_part(request: Request, item_id: int, session: AsyncSession) -> HTTPResponse:
    session.add(Part(item_id=item_id))
    return json({}, status=201)


async def add_and_tell(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
    on_commit(lambda: request.app.ctx.told.append(name))
    session.add(Item(name=name))
    status = 201 if request.args.get("good") else 400
    return json({}, status=status)


@transactional(retries=2, isolation="SERIALIZABLE")
async def add_again(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
    session.add(Item(name=name))
    await session.flush()
    request.app.ctx.told.append(name)
    if len(request.app.ctx.told) == 1:
        raise OperationalError("", {}, LostRace(1213))
    return json({}, status=201)


class LostRace(Exception):
    """What the drivers of all three databases are believed to say of a lost race."""

    sqlstate = "40001"
    sqlite_errorcode = 5


async def stream(request: Request, session: AsyncSession) -> None:
    response = await request.respond(content_type="text/plain")
    async for name in await session.stream_scalars(select(Item.name).order_by(Item.name)):
        await response.send(f"{name}\n")
    await response.eof()


async def leak(request: Request, engine: AsyncEngine) -> HTTPResponse:
    request.app.ctx.leaked = await connected(engine)
    return text("")


async def connected(engine: AsyncEngine) -> AsyncConnection:
    return await connected_at_last(engine)


async def connected_at_last(engine: AsyncEngine) -> AsyncConnection:
    return await engine.connect()


async def write_in_read_session(request: Request, session: AsyncReadSession) -> HTTPResponse:
    await session.execute(insert(Item).values(name="written"))
    return json({}, status=201)


ROUTES: list[tuple[str, str, Any]] = [
    ("POST", "/add/<name>", add),
    ("POST", "/add-plainly/<name>", add_plainly),
    ("POST", "/add-and-wait/<name>", add_and_wait),
    ("GET", "/names", names),
    ("GET", "/names-plainly", names_plainly),
    ("POST", "/names-of-all-kinds/<name>", names_of_all_kinds),
    ("POST", "/add-and-fail/<name>", add_and_fail),
    ("POST", "/add-around/<name>", add_around),
    ("POST", "/add-at-once/<name>", add_at_once),
    ("POST", "/add-later/<name>", add_later),
    ("POST", "/add-part/<item_id:int>", add_part),
    ("POST", "/add-and-tell/<name>", add_and_tell),
    ("POST", "/add-again/<name>", add_again),
    ("GET", "/stream", stream),
    ("GET", "/leak", leak),
    ("POST", "/write-in-read-session", write_in_read_session),
]
