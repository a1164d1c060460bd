"""What an app's engine takes for a connection of its own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from sanic import Request

from ...handling.request import ScopedRequest
from ...unit_of_work import UnitOfWork, block_units
from .link import Around, Link, Outcome
from .stack import calling_lines
from .thread import LoopThread


class LentConnection:
    """A DBAPI connection whose transactions are savepoints on the connection of a test.

    It is what SQLAlchemy's asyncio dialects expect, and needs no event loop: outside of a greenlet
    it blocks.

    Args:
        link: the connection of the test.
        thread: where that lives.
        autocommit: whether each statement is a transaction of its own.
        read_only: whether the database is to refuse to write.
    """

    def __init__(
        self, link: Link, thread: LoopThread, *, autocommit: bool = False, read_only: bool = False
    ) -> None:
        self.autocommit = autocommit
        self.read_only = read_only
        self.readonly = self.deferrable = False
        self.closed = False
        self.undone = False
        self.number = 0
        self.unit: UnitOfWork | None = None
        self.task: asyncio.Task[Any] | None = None
        self.began_at = ""
        self._link = link
        self._thread = thread

    @property
    def savepoint(self) -> str:
        """The name of the savepoint that stands for its transaction."""
        return f"sanic_db_{self.number}"

    def cursor(self, *_: Any, **__: Any) -> LentCursor:
        """Return a cursor; all rows are read at once, also where the app asks for a stream."""
        return LentCursor(self)

    def execute(self, statement: str, parameters: Any, *, many: bool, schema: float) -> Outcome:
        """Run a statement when its turn has come."""
        if statement.startswith("BEGIN"):
            # In SQLite it is written out. A savepoint begins with the first statement.
            return Outcome()
        around = _around()
        if not self.number:
            self.task, self.began_at = around.task, calling_lines()
        job = partial(self._link.execute, self, statement, parameters, many=many, schema=schema)
        return self._thread.run(self._link.in_turn(self, around, job))

    def commit(self) -> None:
        """Commit, as far as the app can tell."""
        if self.number or self.undone:
            self._thread.run(self._link.at_once(partial(self._link.commit, self)))
        self.unit = None

    def rollback(self) -> None:
        """Roll back what was done since the last commit."""
        # Not in turn: the garbage collector may have called, in the loop of whose turn it is.
        if self.number:
            self._thread.run(self._link.at_once(partial(self._link.rollback, self)))
        self.undone = False
        self.unit = None

    def close(self) -> None:
        """Roll back and refuse everything from now on."""
        self.closed = True
        self.rollback()

    terminate = close

    def ping(self) -> None:
        """Answer that it is there."""

    def __getattr__(self, name: str) -> Any:
        """Return what only the driver knows, such as whether the connection is broken."""
        return getattr(self._link.connection, name)


class LentCursor:
    """A DBAPI cursor that has read all its rows."""

    arraysize = 1

    def __init__(self, connection: LentConnection) -> None:
        self._connection = connection
        self._outcome = Outcome()
        self._invalidate_schema_cache_asof = 0.0
        """Set by asyncpg's dialect after a statement that changes the schema."""

    @property
    def description(self) -> Sequence[Any] | None:
        """The columns, or None if there are no rows to come."""
        return self._outcome.description

    @property
    def rowcount(self) -> int:
        """How many rows were found or changed."""
        return self._outcome.rowcount

    @property
    def lastrowid(self) -> Any:
        """The key of the row that was inserted last."""
        return self._outcome.lastrowid

    def execute(self, statement: str, parameters: Any = None) -> Any:
        """Run a statement."""
        self._run(statement, parameters, many=False)

    def executemany(self, statement: str, parameters: Any) -> Any:
        """Run a statement for each of the parameters."""
        self._run(statement, parameters, many=True)

    def _run(self, statement: str, parameters: Any, *, many: bool) -> None:
        self._outcome = self._connection.execute(
            statement, parameters, many=many, schema=self._invalidate_schema_cache_asof
        )

    @property
    def _rows(self) -> deque[Any]:
        return self._outcome.rows

    def fetchone(self) -> Any:
        """Return the next row."""
        return self._rows.popleft() if self._rows else None

    def fetchmany(self, size: int | None = None) -> list[Any]:
        """Return the next rows."""
        return [self._rows.popleft() for _ in range(min(size or self.arraysize, len(self._rows)))]

    def fetchall(self) -> list[Any]:
        """Return the rows that are left."""
        rows = list(self._rows)
        self._rows.clear()
        return rows

    def __iter__(self) -> Iterator[Any]:
        """Return the rows one by one."""
        while self._rows:
            yield self._rows.popleft()

    def setinputsizes(self, *_: Any) -> None:
        """Do nothing, as all the asyncio drivers."""

    def close(self) -> None:
        """Forget the rows."""
        self._rows.clear()

    async def _async_soft_close(self) -> None:
        """Called by SQLAlchemy when the result is handed to blocking code."""


def _around() -> Around:
    request = Request._current.get(None)
    scope = request.units_of_work if isinstance(request, ScopedRequest) else None
    own = () if scope is None else scope.units.values()
    return Around(_current_task(), frozenset({*block_units(), *own}))


def _current_task() -> asyncio.Task[Any] | None:
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None
