"""Sessions refuse what would mix up data, and tell what to do instead."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import suppress
from typing import Any, NamedTuple

import pytest
from sqlalchemy import ForeignKey, String, TextClause, event, func, insert, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_object_session
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    Session,
    mapped_column,
    relationship,
)

from sanic_db_bp import (
    AsyncReadSession,
    ConcurrentSessionUse,
    Database,
    DatabaseSettings,
    ReadOnlySession,
    ReadSession,
    SessionError,
    SessionFinished,
    SessionOutsideBridge,
)
from sanic_db_bp.bridge import bridged, run_in_bridge
from sanic_db_bp.unit_of_work import UnitOfWork
from tests.databases import on, on_all, on_sqlite
from tests.slow_sql import all_are_free, make_slow_commit, sleep_for, teach_to_sleep


class Base(DeclarativeBase):
    pass


class Author(Base):
    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    books: Mapped[list[Book]] = relationship(back_populates="author", order_by="Book.id")


class Book(Base):
    __tablename__ = "book"

    id: Mapped[int] = mapped_column(primary_key=True)
    author_id: Mapped[int] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author] = relationship(back_populates="books")


COUNT = select(func.count()).select_from(Author)
# How a session refuses is the same everywhere; what a database has to do with runs on each.
pytestmark = on_sqlite

ONE = text("SELECT 1")


class ShopSession(Session):
    """A session class of the user, with a method of its own."""

    def count(self) -> int:
        return self.scalars(COUNT).one()

    def execute_by_super(self, statement: TextClause) -> object:
        return super().execute(statement).scalar()


class ShopAsyncSession(AsyncSession):
    """An asyncio session class of the user."""

    async def count(self) -> int:
        return (await self.scalars(COUNT)).one()


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with an author of two books."""
    database = Database(
        DatabaseSettings(url=database_url, env_file=None, pool_size=3, pool_timeout=2),
        name="shop",
        session_class=ShopSession,
        async_session_class=ShopAsyncSession,
    )
    teach_to_sleep(database.engine, database.read_engine)
    await database.create_missing_tables(Base.metadata)
    async with database.session() as session:
        session.add(Author(name="Woolf", books=[Book(), Book()]))
    yield database
    await database.dispose(within=1)


@pytest.fixture
async def unit(database: Database) -> AsyncIterator[UnitOfWork]:
    """A unit of work that is rolled back at the end."""
    unit = database.unit_of_work()
    yield unit
    await run_in_bridge(unit.rollback)
    assert await all_are_free(database)


async def outcome(work: Awaitable[object]) -> object:
    """Return the result, or the error."""
    try:
        return await work
    except Exception as error:
        return error


def in_task(function: Callable[..., Any], *args: Any) -> asyncio.Task[Any]:
    """Call a plain function in a task of its own."""

    async def call() -> Any:
        return function(*args)

    return asyncio.ensure_future(call())


def test_sessions_keep_their_types(unit: UnitOfWork) -> None:
    """Both forms are instances of the user's classes, named like them."""
    assert isinstance(unit.session, ShopSession)
    assert isinstance(unit.async_session, ShopAsyncSession)
    assert isinstance(unit.read_session, ReadSession)
    assert isinstance(unit.async_read_session, AsyncReadSession)
    assert type(unit.session).__name__ == "ShopSession"
    assert type(unit.session).__module__ == __name__


def test_the_two_forms_are_one_session(unit: UnitOfWork) -> None:
    """The asyncio session is over the plain one, and each exists once."""
    assert unit.async_session.sync_session is unit.session
    assert unit.async_session is unit.async_session
    assert unit.async_read_session.sync_session is unit.read_session
    assert unit.read_session is not unit.session


async def test_methods_of_a_users_class_work(unit: UnitOfWork) -> None:
    """What a subclass adds goes through the same guards."""
    session, async_session = unit.session, unit.async_session
    assert isinstance(session, ShopSession)
    assert isinstance(async_session, ShopAsyncSession)
    assert await async_session.count() == 1
    assert await run_in_bridge(session.count) == 1
    with pytest.raises(SessionOutsideBridge):
        session.count()


async def test_methods_of_a_users_class_may_call_super(
    database: Database, unit: UnitOfWork
) -> None:
    """That does not go past the guards: others are refused meanwhile."""
    session = unit.session
    assert isinstance(session, ShopSession)
    using = asyncio.ensure_future(
        run_in_bridge(session.execute_by_super, sleep_for(database, 0.05))
    )
    await asyncio.sleep(0)
    with pytest.raises(ConcurrentSessionUse):
        await unit.async_session.execute(ONE)
    await using
    assert await run_in_bridge(session.execute_by_super, ONE) == 1


@on_all
async def test_both_forms_share_the_transaction(unit: UnitOfWork) -> None:
    """What one has flushed, the other reads."""

    async def handler() -> None:
        unit.session.add(Author(id=2, name="Joyce"))
        unit.session.flush()
        assert await unit.async_session.scalar(COUNT) == 2
        unit.async_session.add(Author(id=3, name="Eliot"))
        assert unit.session.scalar(COUNT) == 3

    await bridged(handler())


@on_all
async def test_an_object_of_the_plain_form_leads_to_the_asyncio_form(unit: UnitOfWork) -> None:
    """Also if nobody has used that one: ``async_object_session()`` finds what the handler has."""
    asyncio_form = unit.async_session

    def read(session: Session) -> object:
        return session.get_one(Author, 1)

    assert async_object_session(await run_in_bridge(read, unit.session)) is asyncio_form


@pytest.mark.parametrize("form", ["session", "async_session"])
async def test_what_is_set_before_the_first_use_is_kept(unit: UnitOfWork, form: Any) -> None:
    """A session is made at its first use, whatever that is."""
    getattr(unit, form).info["tenant"] = 7
    getattr(unit, form).autoflush = False
    await unit.async_session.scalar(COUNT)
    assert not unit.session.autoflush
    assert unit.session.info == {"tenant": 7}


async def test_lazy_loading_works_in_the_bridge(unit: UnitOfWork) -> None:
    """Related objects are loaded when they are touched, whichever form loaded the first."""

    async def handler() -> None:
        author = unit.session.get_one(Author, 1)
        assert [book.id for book in author.books] == [1, 2]
        again = await unit.async_session.get_one(Book, 2, populate_existing=True)
        assert again.author.name == "Woolf"
        unit.session.expire(author)
        assert author.name == "Woolf"
        readable = await unit.async_read_session.get_one(Author, 1)
        assert len(readable.books) == 2

    await bridged(handler())


async def test_lazy_loading_outside_the_bridge_says_what_to_do(unit: UnitOfWork) -> None:
    """It cannot wait there; the error is ours, and names the remedies."""
    author = await unit.async_session.get_one(Author, 1)
    with pytest.raises(SessionOutsideBridge, match=r"app\.ctx\.shop\.run_sync"):
        _ = author.books


async def test_a_second_task_at_the_same_time_is_refused(unit: UnitOfWork) -> None:
    """The first goes on unharmed, and the session is usable afterwards."""
    session = unit.async_session
    results = await asyncio.gather(
        session.execute(ONE), session.execute(ONE), session.get(Author, 1), return_exceptions=True
    )
    assert not isinstance(results[0], BaseException)
    assert all(isinstance(result, ConcurrentSessionUse) for result in results[1:])
    assert "async with app.ctx.shop.session()" in str(results[1])
    assert await session.scalar(ONE) == 1


@on_all
async def test_a_second_task_does_not_disturb_a_write(database: Database) -> None:
    """What the first task wrote is committed, although another was refused meanwhile."""
    async with database.session() as session:
        session.add(Author(id=2, name="Joyce"))
        flushing = asyncio.ensure_future(session.flush())
        await asyncio.sleep(0)
        with pytest.raises(ConcurrentSessionUse):
            await session.execute(ONE)
        await flushing
    async with database.session() as session:
        assert await session.scalar(COUNT) == 2


async def test_a_plain_session_is_refused_while_a_task_uses_it(
    database: Database, unit: UnitOfWork
) -> None:
    """A handler may not use the plain form while a task of it uses the asyncio form."""

    async def handler() -> None:
        other = asyncio.ensure_future(unit.async_session.execute(sleep_for(database, 0.05)))
        await asyncio.sleep(0)
        with pytest.raises(ConcurrentSessionUse):
            unit.session.execute(ONE)
        with pytest.raises(ConcurrentSessionUse):
            unit.session.close()
        await other
        assert unit.session.scalar(ONE) == 1

    await bridged(handler())


@on_all
async def test_tasks_one_after_the_other_may_share_a_session(unit: UnitOfWork) -> None:
    """wait_for runs a statement in a task of its own on Python 3.11, and that is fine."""
    result = await asyncio.wait_for(unit.async_session.execute(ONE), 1)
    assert result.scalar_one() == 1
    assert await asyncio.ensure_future(unit.async_session.scalar(ONE)) == 1


@on_all
async def test_a_statement_that_waits_too_long_is_given_up(
    database: Database, unit: UnitOfWork
) -> None:
    """wait_for cancels it; the unit of work ends clean, and the next one works."""
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(unit.async_session.execute(sleep_for(database, 0.4)), 0.05)
    await run_in_bridge(unit.rollback)
    assert await all_are_free(database)
    async with database.session() as session:
        assert await session.scalar(COUNT) == 1


USES: dict[str, Callable[[Session], object]] = {
    "execute": lambda session: session.execute(ONE),
    "scalar": lambda session: session.scalar(ONE),
    "scalars": lambda session: session.scalars(select(Author)),
    "get": lambda session: session.get(Author, 1),
    "get_one": lambda session: session.get_one(Author, 1),
    "query": lambda session: session.query(Author).all(),
    "connection": lambda session: session.connection(),
    "flush": lambda session: session.flush(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "begin_nested": lambda session: session.begin_nested(),
    "prepare": lambda session: session.prepare(),
    "merge": lambda session: session.merge(Author(id=1)),
    "merge_all": lambda session: session.merge_all([Author(id=1)]),
    "bulk_save_objects": lambda session: session.bulk_save_objects([Author(name="x")]),
    "bulk_insert_mappings": lambda session: session.bulk_insert_mappings(
        Author.__mapper__, [{"name": "x"}]
    ),
    "bulk_update_mappings": lambda session: session.bulk_update_mappings(
        Author.__mapper__, [{"id": 1, "name": "x"}]
    ),
}
CHANGES: dict[str, Callable[[Session], object]] = {
    "add": lambda session: session.add(Author(name="x")),
    "add_all": lambda session: session.add_all([Author(name="x")]),
    "begin": lambda session: session.begin(),
    "begin nested": lambda session: session.begin(nested=True),
}
ENDS: dict[str, Callable[[Session], object]] = {
    "close": lambda session: session.close(),
    "reset": lambda session: session.reset(),
    "invalidate": lambda session: session.invalidate(),
}
ASYNC_USES: dict[str, Callable[[AsyncSession], Awaitable[object]]] = {
    "execute": lambda session: session.execute(ONE),
    "scalar": lambda session: session.scalar(ONE),
    "scalars": lambda session: session.scalars(select(Author)),
    "stream": lambda session: session.stream(select(Author)),
    "stream_scalars": lambda session: session.stream_scalars(select(Author)),
    "get": lambda session: session.get(Author, 1),
    "get_one": lambda session: session.get_one(Author, 1),
    "connection": lambda session: session.connection(),
    "flush": lambda session: session.flush(),
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "begin": lambda session: session.begin().start(),
    "begin_nested": lambda session: session.begin_nested().start(),
    "merge": lambda session: session.merge(Author(id=1)),
    "run_sync": lambda session: session.run_sync(lambda plain: plain.scalar(ONE)),
}


class Kept(NamedTuple):
    """The sessions of a unit of work, and one object of each kind."""

    session: Session
    async_session: AsyncSession
    read_session: ReadSession
    async_read_session: AsyncReadSession
    author: Author


@pytest.fixture
async def finished(database: Database) -> Kept:
    """What somebody still has of a unit of work that is over."""
    async with database.block() as unit:
        author = await unit.async_session.get_one(Author, 1)
        assert await unit.async_read_session.scalar(ONE) == 1
        return Kept(
            unit.session, unit.async_session, unit.read_session, unit.async_read_session, author
        )


DELETES: dict[str, Callable[[Session, Author], object]] = {
    "delete": lambda session, author: session.delete(author),
    "delete_all": lambda session, author: session.delete_all([author]),
    "refresh": lambda session, author: session.refresh(author),
}
ASYNC_DELETES: dict[str, Callable[[AsyncSession, Author], Awaitable[object]]] = {
    "delete": lambda session, author: session.delete(author),
    "delete_all": lambda session, author: session.delete_all([author]),
    "refresh": lambda session, author: session.refresh(author),
}


async def test_a_plain_session_refuses_every_use_after_the_end(finished: Kept) -> None:
    """It is never silently opened again; the error names what to open instead."""
    for name, use in {**USES, **CHANGES}.items():
        refusal = await outcome(run_in_bridge(use, finished.session))
        assert isinstance(refusal, SessionFinished), name
        assert "async with app.ctx.shop.session()" in str(refusal), name


async def test_a_plain_session_refuses_objects_after_the_end(finished: Kept) -> None:
    """Deleting and refreshing an object that the session once loaded is refused too."""
    for name, use in DELETES.items():
        refusal = await outcome(run_in_bridge(use, finished.session, finished.author))
        assert isinstance(refusal, SessionFinished), name


async def test_an_asyncio_session_refuses_every_use_after_the_end(finished: Kept) -> None:
    """The asyncio form refuses like the plain one."""
    for name, use in ASYNC_USES.items():
        refusal = await outcome(use(finished.async_session))
        assert isinstance(refusal, SessionFinished), name
    with pytest.raises(SessionFinished):
        finished.async_session.add(Author(name="x"))
    with pytest.raises(SessionFinished):
        finished.async_session.add_all([Author(name="x")])
    for name, use_object in ASYNC_DELETES.items():
        refusal = await outcome(use_object(finished.async_session, finished.author))
        assert isinstance(refusal, SessionFinished), name


async def test_read_sessions_refuse_every_use_after_the_end(finished: Kept) -> None:
    """Read sessions end with the unit of work, too."""
    with pytest.raises(SessionFinished):
        await run_in_bridge(finished.read_session.get, Author, 1)
    with pytest.raises(SessionFinished):
        await finished.async_read_session.scalar(ONE)


async def test_closing_after_the_end_is_harmless(finished: Kept) -> None:
    """Nothing is left to close, and no error hides the one that led there."""
    for end in ENDS.values():
        end(finished.session)
        end(finished.read_session)
    await finished.async_session.close()
    await finished.async_session.aclose()
    async with finished.async_read_session:
        pass


async def test_what_needs_no_database_works_after_the_end(finished: Kept) -> None:
    """Looking at a finished session, or at what it has loaded, is no use of it."""
    assert finished.author.name == "Woolf"
    assert not finished.session.in_transaction()
    assert not finished.session.dirty
    assert finished.author not in finished.session


async def test_the_end_is_told_in_threads_and_tasks_too(finished: Kept) -> None:
    """After the end, the end is the reason, wherever the session is used."""
    with pytest.raises(SessionFinished):
        await asyncio.to_thread(finished.session.execute, ONE)
    with pytest.raises(SessionFinished):
        await in_task(finished.session.execute, ONE)


async def test_a_plain_session_is_refused_in_a_task_of_its_own(unit: UnitOfWork) -> None:
    """There it would block the event loop; the handler that has it goes on."""

    async def handler() -> None:
        unit.session.execute(ONE)
        for name, use in {**USES, **ENDS}.items():
            refusal = await outcome(in_task(use, unit.session))
            assert isinstance(refusal, SessionOutsideBridge), name
            assert "in a task or function of its own" in str(refusal), name
        assert unit.session.in_transaction()
        assert unit.session.scalar(ONE) == 1

    await bridged(handler())


async def test_a_plain_session_is_refused_in_a_thread(unit: UnitOfWork) -> None:
    """No event loop is there to wait in; the handler that has it goes on."""

    async def handler() -> None:
        unit.session.execute(ONE)
        for name, use in {**USES, **ENDS}.items():
            refusal = await outcome(asyncio.to_thread(use, unit.session))
            assert isinstance(refusal, SessionOutsideBridge), name
            assert "in a thread" in str(refusal), name
        assert unit.session.scalar(ONE) == 1

    await bridged(handler())


async def test_a_plain_session_is_refused_without_the_bridge(unit: UnitOfWork) -> None:
    """The error names run_sync and the asyncio session."""
    with pytest.raises(SessionOutsideBridge) as refused:
        unit.session.execute(ONE)
    assert "await app.ctx.shop.run_sync(function)" in str(refused.value)
    assert "AsyncSession" in str(refused.value)
    assert await unit.async_session.scalar(ONE) == 1


async def test_every_refusal_is_a_session_error(unit: UnitOfWork) -> None:
    """One class catches them all."""
    with pytest.raises(SessionError):
        unit.session.execute(ONE)


async def test_a_refused_use_leaves_the_session_free(unit: UnitOfWork) -> None:
    """An error within a statement reserves nothing."""
    with pytest.raises(DBAPIError):
        await unit.async_session.execute(text("SELECT * FROM no_such_table"))
    await unit.async_session.rollback()
    assert await unit.async_session.scalar(ONE) == 1


@on_all
async def test_read_sessions_read(unit: UnitOfWork) -> None:
    """A read session of either form finds what is committed."""
    assert await unit.async_read_session.scalar(COUNT) == 1
    assert await run_in_bridge(unit.read_session.scalar, COUNT) == 1


async def test_a_read_session_refuses_to_flush(database: Database) -> None:
    """Changed, new and deleted objects are refused before a statement is sent."""
    changes: list[Callable[[Session, Author], object]] = [
        lambda session, _: session.add(Author(name="x")),
        lambda _, author: setattr(author, "name", "x"),
        lambda session, author: session.delete(author),
    ]
    for change in changes:
        async with database.block() as unit:
            author = await unit.async_read_session.get_one(Author, 1)
            change(unit.read_session, author)
            with pytest.raises(ReadOnlySession, match="in place of ReadSession"):
                await unit.async_read_session.flush()
            unit.read_session.expunge_all()


@pytest.mark.parametrize("read_before", [False, True])
async def test_a_read_session_with_changes_fails_the_unit_of_work(
    database: Database, *, read_before: bool
) -> None:
    """Without a flush the change would be lost silently; the other session's work goes with it."""

    async def work() -> None:
        async with database.block() as unit:
            unit.async_session.add(Author(name="x"))
            await unit.async_session.flush()
            if read_before:
                await unit.async_read_session.execute(ONE)
            unit.read_session.add(Author(name="x"))

    with pytest.raises(ReadOnlySession):
        await work()
    async with database.read_session() as session:
        assert await session.scalar(COUNT) == 1


@on_all
async def test_the_database_refuses_writes_of_a_read_session(unit: UnitOfWork) -> None:
    """A statement that goes past the session's check is refused where it counts."""
    with pytest.raises(DBAPIError):
        await unit.async_read_session.execute(insert(Author).values(name="x"))
    assert await unit.async_read_session.scalar(COUNT) == 1


async def test_a_read_session_refuses_to_stream(unit: UnitOfWork) -> None:
    """Cursors need a transaction; the error names the session that has one."""
    with pytest.raises(SessionError, match="AsyncSession"):
        await unit.async_read_session.stream(ONE)
    with pytest.raises(SessionError, match="AsyncSession"):
        await unit.async_read_session.stream_scalars(ONE)


async def test_a_read_session_of_the_users_own_refuses_to_flush(database: Database) -> None:
    """The class keeps its promise also where it is made by hand."""
    with ReadSession(database.read_engine.sync_engine) as session:
        session.add(Author(name="x"))
        with pytest.raises(ReadOnlySession):
            await run_in_bridge(session.flush)
        session.expunge_all()


@on_all
async def test_begin_joins_a_transaction_that_has_begun_by_itself(database: Database) -> None:
    """A block works although a dependency has used the session before, and commits it all."""
    async with database.block() as unit:

        async def handler() -> None:
            unit.session.add(Author(name="Joyce"))
            unit.session.flush()
            with unit.session.begin():
                unit.session.add(Author(name="Eliot"))
            assert unit.commits == 1
            with unit.session.begin():
                unit.session.add(Author(name="Mann"))
            assert unit.commits == 2

        await bridged(handler())
        await unit.async_session.execute(ONE)
        async with unit.async_session.begin():
            unit.async_session.add(Author(name="Proust"))
        assert unit.commits == 3
        await unit.async_session.rollback()
    async with database.session() as session:
        assert await session.scalar(COUNT) == 5


@on_all
async def test_begin_that_fails_rolls_back_what_it_has_joined(database: Database) -> None:
    """One unit of work is one transaction: the block takes the earlier work with it."""
    async with database.session() as session:
        session.add(Author(name="Joyce"))
        await session.flush()
        with pytest.raises(LookupError):
            async with session.begin():
                raise LookupError
        assert await session.scalar(COUNT) == 1


async def test_begin_twice_is_an_error_as_ever(unit: UnitOfWork) -> None:
    """A second explicit begin is SQLAlchemy's own error."""
    unit.session.begin()
    with pytest.raises(Exception, match="already begun"):
        unit.session.begin()


@on_all
async def test_savepoints_nest(database: Database) -> None:
    """An inner savepoint is rolled back alone."""
    async with database.session() as session:
        session.add(Author(name="Joyce"))
        async with session.begin_nested():
            session.add(Author(name="Eliot"))
            with suppress(LookupError):
                async with session.begin_nested():
                    session.add(Author(name="Mann"))
                    await session.flush()
                    raise LookupError
    async with database.session() as session:
        names = (await session.scalars(select(Author.name).order_by(Author.name))).all()
        assert names == ["Eliot", "Joyce", "Woolf"]


async def test_a_session_closed_by_the_user_works_on(database: Database) -> None:
    """close() ends the transaction, not the unit of work."""
    async with database.session() as session:
        session.add(Author(name="Joyce"))
        await session.flush()
        await session.close()
        assert await session.scalar(COUNT) == 1
        session.add(Author(name="Eliot"))
    async with database.session() as session:
        assert await session.scalar(COUNT) == 2


@on_all
async def test_streams_of_rows_are_read_in_pieces(unit: UnitOfWork) -> None:
    """Server-side results work in both forms."""
    rows = await unit.async_session.stream_scalars(select(Book.id).order_by(Book.id))
    assert [row async for row in rows] == [1, 2]

    def read() -> list[int]:
        statement = select(Book.id).order_by(Book.id).execution_options(yield_per=1)
        return list(unit.session.scalars(statement))

    assert await run_in_bridge(read) == [1, 2]


async def test_listeners_of_the_users_class_are_called(database: Database) -> None:
    """Events of SQLAlchemy reach the sessions, on the user's class and on Session itself."""
    seen: list[str] = []

    def before_flush(session: Session, *_: object) -> None:
        seen.append(type(session).__name__)

    for target in (ShopSession, Session):
        event.listen(target, "before_flush", before_flush)
    try:
        async with database.session() as session:
            session.add(Author(name="Joyce"))
    finally:
        for target in (ShopSession, Session):
            event.remove(target, "before_flush", before_flush)
    assert seen == ["ShopSession"] * 2


@on_all
async def test_the_isolation_level_is_that_of_the_block(database: Database) -> None:
    """A block with a level of its own has it, and the next one has not."""
    async with database.session() as session:
        usual = await (await session.connection()).get_isolation_level()
    async with database.session(isolation_level="SERIALIZABLE") as session:
        assert await (await session.connection()).get_isolation_level() == "SERIALIZABLE"
    async with database.session() as session:
        assert await (await session.connection()).get_isolation_level() == usual


@on("postgresql", every_driver=True)
async def test_a_commit_block_of_another_task_counts_as_use(database_url: str) -> None:
    """The unit of work waits for a COMMIT under way in a task, as for a statement."""
    database = Database(DatabaseSettings(url=database_url, env_file=None))
    await make_slow_commit(database)

    async def write(session: AsyncSession) -> None:
        async with session.begin():
            await session.execute(text("INSERT INTO slow VALUES (1)"))

    writing: list[asyncio.Task[None]] = []

    async def work() -> None:
        async with database.session() as session:
            writing.append(asyncio.ensure_future(write(session)))
            await asyncio.sleep(0.1)

    with pytest.raises(ConcurrentSessionUse):
        await work()
    await writing[0]
    assert database.pool_status()["checked_out"] == 0
    await database.dispose(within=1)
