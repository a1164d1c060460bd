"""The tables, apps and dependencies of these tests."""

import functools
from collections.abc import Callable
from typing import Any

from sanic import HTTPResponse, Request, Sanic, text
from sqlalchemy import ForeignKey, String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, relationship

from sanic_db_bp import DatabaseBlueprint

App = Sanic[Any, Any]


Handler = Callable[..., Any]


class Base(DeclarativeBase):
    """The tables of these tests."""


class Author(Base):
    """Somebody who writes notes."""

    __tablename__ = "author"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(50))
    notes: Mapped[list["Note"]] = relationship(back_populates="author", order_by="Note.id")


class Note(Base):
    """A text."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(50))
    author_id: Mapped[int | None] = mapped_column(ForeignKey("author.id"))
    author: Mapped[Author | None] = relationship(back_populates="notes")


def new_app(url: str, name: str = "app") -> App:
    """Return an app with a database that has the tables of these tests."""
    app: App = Sanic(name)
    app.blueprint(DatabaseBlueprint(url=url, metadata=Base.metadata, create_tables=True))
    return app


async def notes_of(app: App) -> list[str]:
    """Return what was committed, as another connection sees it."""
    async with app.ctx.db.read_session() as session:
        return list(await session.scalars(select(Note.text).order_by(Note.id)))


def keep(session: Session, value: str) -> HTTPResponse:
    """Write a note and answer with it."""
    session.add(Note(text=value))
    session.flush()
    return text(value)


def decorated(handler: Handler) -> Handler:
    """Check something before the handler, as an authorization decorator does."""

    @functools.wraps(handler)
    async def inner(request: Request, *args: Any, **kwargs: Any) -> Any:
        response = handler(request, *args, **kwargs)
        if hasattr(response, "__await__"):
            response = await response
        response.headers["x-decorated"] = "yes"
        return response

    return inner


class Repository:
    """Keeps a plain session for later."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def count(self) -> int:
        """Count the notes."""
        return self.session.scalar(select(func.count()).select_from(Note)) or 0


class Sink:
    """What a constructor function makes."""

    def __init__(self, text: str) -> None:
        self.text = text


def make_sink(request: Request, session: Session) -> Sink:
    """Write with a plain session, without asyncio."""
    session.add(Note(text="plain"))
    session.flush()
    return Sink(session.scalars(select(Note.text)).one())
