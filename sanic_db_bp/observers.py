"""Who wants to know what happens in a database is told here; where nobody does, nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import Connection, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session

if TYPE_CHECKING:
    from .database import Database


class Origin(NamedTuple):
    """On whose behalf something runs: the request, as a line in the log calls it, and its id."""

    route: str
    request_id: str


FindOrigin = Callable[[], Origin | None]


class Observer:
    """Adds SQLAlchemy's events to what a database is made of; by itself it adds none.

    An engine is made anew at each start of an app, so events cannot be added to it beforehand. See
    "Core Events" and "ORM Events" in SQLAlchemy's documentation.
    """

    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        """Called with each engine, before it has connected."""

    def session_class_made(
        self, database: Database, session_class: type[Session], *, read_only: bool
    ) -> None:
        """Called with each class of plain sessions, which belongs to this database alone."""

    def retried(self, database: Database) -> None:
        """Called when a handler runs again because its transaction lost a race."""

    def status_of(self, error: BaseException) -> int | None:
        """Return the status with which an error is answered, if this observer sees to that."""
        return None


def status_of(observers: Iterable[Observer], error: BaseException) -> int:
    """Return the status with which an error of a handler, or of its COMMIT, is answered."""
    known = (observer.status_of(error) for observer in observers)
    return getattr(error, "status_code", None) or next(filter(None, known), 500)


@dataclass(frozen=True, slots=True)
class Execution:
    """One statement that was executed.

    Args:
        statement: the SQL, as it was sent.
        parameters: what was sent with it.
        seconds: how long the driver took for it.
        rows: how many rows were found or changed; None if the driver does not say, or it failed.
    """

    statement: str
    parameters: Any
    seconds: float
    rows: int | None


def on_execution(engine: AsyncEngine, report: Callable[[Execution], None]) -> None:
    """Call something with every statement of an engine that was executed, or has failed."""
    # Each has a clock of its own: there may be several on one engine.
    key = object()

    @event.listens_for(engine.sync_engine, "before_cursor_execute")
    def start(connection: Connection, *_: Any) -> None:
        connection.info[key] = perf_counter()

    @event.listens_for(engine.sync_engine, "after_cursor_execute")
    def stop(connection: Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        rows = cursor.rowcount
        executed(connection, statement, parameters, rows if rows >= 0 else None)

    @event.listens_for(engine.sync_engine, "handle_error")
    def fail(context: ExceptionContext) -> None:
        if context.connection is not None and context.statement is not None:
            executed(context.connection, context.statement, context.parameters, None)

    def executed(connection: Connection, statement: str, parameters: Any, rows: int | None) -> None:
        started = None if connection.closed else connection.info.pop(key, None)
        if started is not None:
            report(Execution(statement, parameters, perf_counter() - started, rows))
