"""Behind a real PgBouncer in transaction mode, with fewer connections than there are workers."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import DBAPIError

from sanic_db_bp import Database, DatabaseSettings, DatabaseUnavailable
from tests.conftest import or_skip
from tests.databases import on
from tests.pgbouncer import BACKENDS, PgBouncer
from tests.servers import blocking_engine
from tests.serving import serving
from tests.shop import Base, Item, Observer, make_app

WORKERS, OPERATIONS = 10, 250

pytestmark = on("postgresql", every_driver=True)


@pytest.fixture(scope="module")
def pgbouncer(postgresql_server: str) -> Iterator[PgBouncer]:
    yield from or_skip(PgBouncer(postgresql_server))


@pytest.fixture
def pooled_url(database_url: str, pgbouncer: PgBouncer) -> str:
    """The URL of an empty database behind the pooler."""
    return pgbouncer.in_front_of(database_url)


@asynccontextmanager
async def database_at(url: str, **values: Any) -> AsyncIterator[Database]:
    """A database without an app."""
    db = Database(DatabaseSettings(url=url, env_file=None, pool_size=WORKERS, **values))
    yield db
    await db.dispose()


async def failures(operation: Callable[[int], Awaitable[None]]) -> list[Exception]:
    """Run all operations, and give the errors of those that failed."""
    numbers = iter(range(OPERATIONS))
    failed: list[Exception] = []

    async def work() -> None:
        for number in numbers:
            try:
                await operation(number)
            except Exception as error:
                failed.append(error)

    await asyncio.gather(*(work() for _ in range(WORKERS)))
    return failed


def writes(db: Database) -> Callable[[int], Awaitable[None]]:
    """A transaction of a few different statements."""

    async def write(number: int) -> None:
        async with db.session() as session:
            session.add(Item(name=f"item {number}", stock=number))
            await session.flush()
            found = select(Item.stock).where(Item.name == f"item {number}")
            assert await session.scalar(found) == number
            assert await session.scalar(select(func.count(Item.id))) > 0

    return write


def reads(db: Database) -> Callable[[int], Awaitable[None]]:
    """A read session of a few different statements."""

    async def read(number: int) -> None:
        async with db.read_session() as session:
            found = select(Item.stock).where(Item.name == f"item {number}")
            assert await session.scalar(found) == number
            assert await session.scalar(select(func.count(Item.id))) == OPERATIONS

    return read


async def test_nothing_fails_behind_pgbouncer(pooled_url: str, database_url: str) -> None:
    """Transactions and reads of many workers share few connections, with the start of the app."""
    app = make_app(pooled_url, pgbouncer=True, pool_size=WORKERS)
    observer = Observer(database_url)
    async with serving(app):
        assert await failures(writes(app.ctx.db)) == []
        assert await failures(reads(app.ctx.db)) == []
        assert len(observer.names()) == OPERATIONS
        assert 1 <= observer.connections() <= BACKENDS


async def test_without_the_setting_it_refuses_the_connection(pooled_url: str) -> None:
    """It does not know the parameters by which the timeouts are set."""
    async with database_at(pooled_url) as db:
        with pytest.raises(DatabaseUnavailable, match="unsupported startup parameter"):
            await db.ping()


async def test_prepared_statements_are_lost_behind_pgbouncer(
    pooled_url: str, database_url: str
) -> None:
    """What one connection has prepared, the next one does not know: the setting keeps none."""
    Base.metadata.create_all(blocking_engine(database_url))
    asyncpg = "asyncpg" in pooled_url
    prepared = {"statement_cache_size": 100} if asyncpg else {"prepare_threshold": 5}
    async with database_at(pooled_url, pgbouncer=True, connect_args=prepared) as db:
        failed = await failures(writes(db))
    assert any("prepared statement" in str(error) for error in failed)


async def test_reading_alone_stays_with_its_transaction(pooled_url: str, database_url: str) -> None:
    """The database refuses to write in a read session; the next session writes as ever."""
    Base.metadata.create_all(blocking_engine(database_url))
    async with database_at(pooled_url, pgbouncer=True) as db:
        for _ in range(2 * BACKENDS):
            with pytest.raises(DBAPIError, match="read-only transaction"):
                async with db.read_session() as session:
                    await session.execute(text("DELETE FROM item"))
            async with db.session() as writing:
                await writing.execute(text("DELETE FROM item"))
