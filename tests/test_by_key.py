"""Reads by primary key do what SQLAlchemy's own do, with a statement that is made once."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any, TypeVar
from uuid import UUID

import pytest
from sqlalchemy import Dialect, ForeignKey, String, event, inspect, text
from sqlalchemy.orm import (
    DeclarativeBase,
    Mapped,
    ORMExecuteState,
    Session,
    aliased,
    lazyload,
    mapped_column,
    relationship,
    with_loader_criteria,
)
from sqlalchemy.types import TypeDecorator

from sanic_db_bp import Database, DatabaseSettings, SessionFinished
from sanic_db_bp.bridge import run_in_bridge
from tests.databases import on_all, on_sqlite

pytestmark = on_sqlite

T = TypeVar("T")

A_KEY = UUID("5f0f3b1e-6d0c-4a53-9d0e-0c8a2f6f7c11")


class Base(DeclarativeBase):
    def __repr__(self) -> str:
        return f"{type(self).__name__} {inspect(self).identity}"


class LowerCase(TypeDecorator[str]):
    """A type that changes what is asked for."""

    impl = String(20)
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return None if value is None else value.lower()


class Shelf(Base):
    __tablename__ = "shelf"

    id: Mapped[int] = mapped_column(primary_key=True)
    hidden: Mapped[bool] = mapped_column(default=False)
    boxes: Mapped[list[Box]] = relationship(lazy="joined", order_by="Box.id")


class Box(Base):
    __tablename__ = "box"

    id: Mapped[int] = mapped_column(primary_key=True)
    shelf_id: Mapped[int] = mapped_column(ForeignKey("shelf.id"))


class Place(Base):
    __tablename__ = "place"

    row: Mapped[int] = mapped_column("row_no", primary_key=True)
    column: Mapped[str] = mapped_column("column_no", String(5), primary_key=True)


class Word(Base):
    __tablename__ = "word"

    word: Mapped[str] = mapped_column(LowerCase, primary_key=True)


class Token(Base):
    __tablename__ = "token"

    id: Mapped[UUID] = mapped_column(primary_key=True)


class Person(Base):
    __tablename__ = "person"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    __mapper_args__: Mapping[str, Any] = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "person",
    }


class Guest(Person):
    """In the table of its parent."""

    __mapper_args__: Mapping[str, Any] = {"polymorphic_identity": "guest"}


class Engineer(Person):
    """In a table of its own, joined to that of its parent."""

    __tablename__ = "engineer"

    id: Mapped[int] = mapped_column(ForeignKey("person.id"), primary_key=True)
    language: Mapped[str] = mapped_column(String(20))
    __mapper_args__: Mapping[str, Any] = {"polymorphic_identity": "engineer"}


class Animal(Base):
    """Read together with all its kinds."""

    __tablename__ = "animal"

    id: Mapped[int] = mapped_column(primary_key=True)
    kind: Mapped[str] = mapped_column(String(20))
    __mapper_args__: Mapping[str, Any] = {
        "polymorphic_on": "kind",
        "polymorphic_identity": "animal",
        "with_polymorphic": "*",
    }


class Bird(Animal):
    __tablename__ = "bird"

    id: Mapped[int] = mapped_column(ForeignKey("animal.id"), primary_key=True)
    wings: Mapped[int]
    __mapper_args__: Mapping[str, Any] = {"polymorphic_identity": "bird"}


def rows() -> list[Base]:
    return [
        Shelf(id=1, boxes=[Box(id=1), Box(id=2)]),
        Shelf(id=2, hidden=True),
        Place(row=1, column="a"),
        Word(word="tree"),
        Token(id=A_KEY),
        Guest(id=1),
        Engineer(id=2, language="Ada"),
        Bird(id=1, wings=2),
        Animal(id=2),
    ]


READS: dict[str, tuple[Any, ...]] = {
    "a row": (Box, 1),
    "no row": (Box, 9),
    "with a joined collection": (Shelf, 1),
    "a key of two columns": (Place, (1, "a")),
    "a key of two columns, as a list": (Place, [1, "a"]),
    "a key by its names": (Place, {"row": 1, "column": "a"}),
    "a key by its name": (Box, {"id": 1}),
    "a key of one column, as a tuple": (Box, (1,)),
    "too few values": (Place, 1),
    "too many values": (Box, (1, 2)),
    "no value": (Box, None),
    "half a value": (Place, (1, None)),
    "a value of the wrong type": (Box, True),
    "a number that is none": (Box, 1.0),
    "a type with a conversion": (Word, "TREE"),
    "a UUID": (Token, A_KEY),
    "the parent of a joined table": (Person, 2),
    "a joined table": (Engineer, 2),
    "a joined table, another kind": (Engineer, 1),
    "a kind in the same table": (Guest, 1),
    "a kind in the same table, another kind": (Guest, 2),
    "all kinds at once": (Animal, 1),
    "all kinds at once, the parent": (Animal, 2),
    "of all kinds at once, one": (Bird, 1),
    "a mapper": (Box.__mapper__, 2),
    "an alias": (aliased(Box), 1),
    "a table": (Box.__table__, 1),
    "something else": (str, 1),
    "nothing": (None, 1),
}


def read_all(session: Session) -> dict[str, Any]:
    """Read everything, each with an identity map that is empty; what came of it."""
    answers: dict[str, Any] = {}
    for name, (entity, key) in READS.items():
        try:
            answers[name] = contents(session.get(entity, key))
        except Exception as error:
            answers[name] = type(error), str(error)
        session.expunge_all()
    return answers


def contents(found: object) -> Any:
    if found is None:
        return None
    return type(found), {name: str(value) for name, value in vars(found).items() if name[0] != "_"}


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database with some of everything."""
    settings = DatabaseSettings(url=database_url, env_file=None, pool_size=2)
    database = Database(settings, name="shop")
    await database.create_missing_tables(Base.metadata)
    async with database.session() as session:
        session.add_all(rows())
    yield database
    await database.dispose(within=1)


async def in_ours(database: Database, function: Callable[[Session], T]) -> T:
    """Call a function with a session of ours."""
    unit = database.unit_of_work()

    def call() -> T:
        try:
            return function(unit.session)
        finally:
            unit.rollback()

    return await run_in_bridge(call)


async def in_sqlalchemys(database: Database, function: Callable[[Session], T]) -> T:
    """Call a function with a session of SQLAlchemy's."""

    def call() -> T:
        with Session(database.engine.sync_engine) as session:
            return function(session)

    return await run_in_bridge(call)


async def outcome(database: Database, function: Callable[[Session], T]) -> T:
    """Return what a function makes of a session, and see that SQLAlchemy's own has it, too.

    What the database is asked has to be the same as well, to the letter.
    """
    asked: list[Any] = []

    @event.listens_for(database.engine.sync_engine, "before_cursor_execute")
    def note(_connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    theirs = await in_sqlalchemys(database, function)
    asked_by_theirs, asked[:] = asked[:], []
    ours = await in_ours(database, function)
    assert ours == theirs
    assert asked == asked_by_theirs
    return ours


@on_all
@pytest.mark.filterwarnings("ignore:fully NULL primary key identity")
async def test_reads_are_those_of_sqlalchemy(database: Database) -> None:
    """The same objects and errors, whatever the mapping and the key."""
    answers = await outcome(database, read_all)
    assert answers["a row"] == (Box, {"id": "1", "shelf_id": "1"})
    assert answers["no row"] is None
    assert answers["a joined table"][0] is Engineer


@on_all
async def test_what_is_asked_for_besides_is_given(database: Database) -> None:
    """Options, a lock, a fresh state."""

    def read(session: Session) -> list[object]:
        box = session.get_one(Box, 1, with_for_update=True)
        session.execute(text("UPDATE box SET shelf_id = 2 WHERE id = 1"))
        stale = box.shelf_id
        fresh = session.get_one(Box, 1, populate_existing=True).shelf_id
        shelf = session.get_one(Shelf, 1, options=[lazyload(Shelf.boxes)])
        return [stale, fresh, "boxes" in vars(shelf), repr(session.get(Box, 2, options=[]))]

    assert await outcome(database, read) == [1, 2, False, "Box (2,)"]


async def test_an_object_that_is_there_is_not_read_again(database: Database) -> None:
    """Unless it is expired; one that was deleted meanwhile is then none."""

    def read(session: Session) -> list[object]:
        box = session.get_one(Box, 1)
        same = session.get(Box, 1) is box and session.get(Box, (1,)) is box
        session.expire(box)
        again = session.get(Box, 1) is box
        session.expire(box)
        session.execute(text("DELETE FROM box WHERE id = 1"))
        return [same, again, session.get(Box, 1)]

    assert await outcome(database, read) == [True, True, None]


async def test_what_waits_to_be_written_is_found(database: Database) -> None:
    """It is written before; what waits to be deleted is there until then."""

    def read(session: Session) -> list[object]:
        new = Box(id=7, shelf_id=2)
        session.add(new)
        found = session.get(Box, 7) is new
        session.delete(new)
        there = session.get(Box, 7) is new
        session.flush()
        return [found, there, session.get(Box, 7)]

    assert await outcome(database, read) == [True, True, None]


async def test_criteria_of_the_app_are_met(database: Database) -> None:
    """Those that a listener adds to all statements, such as to hide what is deleted."""

    def hide(state: ORMExecuteState) -> None:
        visible = with_loader_criteria(Shelf, Shelf.hidden.is_(False))
        state.statement = state.statement.options(visible)

    def read(session: Session) -> list[bool]:
        event.listen(session, "do_orm_execute", hide)
        hidden = [session.get(Shelf, key) is None for key in (1, 2)]
        event.remove(session, "do_orm_execute", hide)
        return [*hidden, session.get(Shelf, 2) is None]

    assert await outcome(database, read) == [False, True, False]


async def test_a_read_is_made_of_the_statement_of_the_one_before(database: Database) -> None:
    """Which is what makes it fast: it is compiled, and looked up in the cache, once."""

    def read(session: Session) -> list[object]:
        statements: list[object] = []

        @event.listens_for(session, "do_orm_execute")
        def note(state: ORMExecuteState) -> None:
            statements.append(state.statement)

        for entity, key in [(Box, 1), (Box, 2), (Place, (1, "a")), (Place, (2, "b")), (Box, 9)]:
            session.get(entity, key)
        return statements

    box, second_box, place, second_place, missing = await in_ours(database, read)
    assert box is second_box is missing
    assert place is second_place


async def test_a_column_that_is_mapped_later_is_read(database: Database) -> None:
    """An app that maps at run time, as plugins do."""

    class LateBase(DeclarativeBase):
        pass

    class Late(LateBase):
        __tablename__ = "late"

        id: Mapped[int] = mapped_column(primary_key=True)

    async with database.session() as session:
        await session.execute(text("CREATE TABLE late (id integer PRIMARY KEY, name text)"))
        await session.execute(text("INSERT INTO late VALUES (1, 'one'), (2, 'two')"))
    await outcome(database, lambda session: contents(session.get(Late, 1)))
    Late.name = mapped_column(String(20))
    database.engine.sync_engine.clear_compiled_cache()
    answer = await outcome(database, lambda session: contents(session.get(Late, 2)))
    assert answer == (Late, {"id": "2", "name": "two"})


async def test_the_get_of_a_users_class_is_called(database_url: str, database: Database) -> None:
    """And its ``super().get()`` is ours."""

    class Counting(Session):
        got = 0

        def get(self, *arguments: Any, **options: Any) -> Any:
            self.got += 1
            return super().get(*arguments, **options)

    settings = DatabaseSettings(url=database_url, env_file=None, pool_size=2)
    counting = Database(settings, name="counting", session_class=Counting)

    def read(session: Session) -> list[object]:
        assert isinstance(session, Counting)
        return [session.get_one(Box, 1).id, session.get(Box, 9), session.got]

    assert await in_ours(counting, read) == [1, None, 2]
    await counting.dispose(within=1)


async def test_nothing_is_read_after_the_end(database: Database) -> None:
    """As with any other statement."""
    unit = database.unit_of_work()
    session = unit.session

    def read_late() -> None:
        session.get(Box, 1)
        unit.rollback()
        session.get(Box, 1)

    with pytest.raises(SessionFinished):
        await run_in_bridge(read_late)
