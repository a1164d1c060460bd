"""The tables that every contender works on, with their rows."""

from sqlalchemy import String, insert
from sqlalchemy.ext.asyncio import create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from typing_extensions import TypedDict  # pydantic takes no other before Python 3.12

TWENTY = range(1, 21)
"""The keys of twenty items, and a number of rows."""

WORLDS = range(1, 10_001)
"""The keys of the worlds, as the TechEmpower tests have them."""

ADDED_FORTUNE = "Additional fortune added at request time."


class Base(DeclarativeBase):
    pass


class ItemJSON(TypedDict):
    id: int
    name: str


class WorldJSON(TypedDict):
    id: int
    randomNumber: int


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100))

    def to_json(self) -> ItemJSON:
        return {"id": self.id, "name": self.name}


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(100))


class World(Base):
    __tablename__ = "world"

    id: Mapped[int] = mapped_column(primary_key=True)
    random_number: Mapped[int]

    def to_json(self) -> WorldJSON:
        return {"id": self.id, "randomNumber": self.random_number}


class Fortune(Base):
    __tablename__ = "fortune"

    id: Mapped[int] = mapped_column(primary_key=True)
    message: Mapped[str] = mapped_column(String(200))


FORTUNES = [
    "A pool of one is a queue.",
    "Every cache is a bug that has not been seen yet.",
    "He who measures once has a number; he who measures often has a doubt.",
    "Nobody reads the logs before the outage.",
    "The fastest query is the one that is not sent.",
    "<script>alert('Escape what you did not write.');</script>",
    "An index is paid for with every row.",
    "Two clocks never agree, and one is never asked.",
    "データベースは眠らない",
    "The transaction that was left open is still open.",
    "A timeout is a promise kept badly.",
    "What is idempotent may be said twice.",
]


async def create_rows(url: str) -> None:
    """Create the tables and their rows in an empty database."""
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
        items = [{"id": key, "name": f"Item {key}"} for key in TWENTY]
        worlds = [{"id": key, "random_number": key * 7919 % 10_000 + 1} for key in WORLDS]
        fortunes = [{"id": key, "message": text} for key, text in enumerate(FORTUNES, 1)]
        await connection.execute(insert(Item), items)
        await connection.execute(insert(World), worlds)
        await connection.execute(insert(Fortune), fortunes)
    await engine.dispose()
