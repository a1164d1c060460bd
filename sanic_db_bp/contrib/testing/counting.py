"""Counts the statements of a block of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import pytest
from sqlalchemy import Engine, event

from ...database import Database

AT_THE_START = (
    "wait_until_up",
    "pending_migrations",
    "create_missing_tables",
    "allowed_connections",
)
"""What the package itself asks when a server starts."""

_starting: ContextVar[bool] = ContextVar("sanic_db_bp_starting", default=False)


class QueryLog(list[str]):
    """The statements of a block, in their order."""

    def __str__(self) -> str:
        """Return them numbered, with those that are there more than once marked."""
        return "\n".join(
            f"{number:3}. {statement}" + self._repeated(statement)
            for number, statement in enumerate(self, 1)
        )

    def _repeated(self, statement: str) -> str:
        times = self.count(statement)
        return f"    <- {times} times" if times > 1 else ""


@contextmanager
def max_queries(most: int) -> Iterator[QueryLog]:
    """Fail a test that runs more statements in the block.

    What a starting server asks, by itself, does not count: ``app.test_client`` starts one for each
    request. ``executemany`` and savepoints count as one, BEGIN and COMMIT as none.

    Args:
        most: how many there may be.

    Returns:
        The statements, in the order in which they ran.
    """
    __tracebackhide__ = True
    log = QueryLog()

    def record(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        if not _starting.get():
            log.append(" ".join(statement.split()))

    event.listen(Engine, "before_cursor_execute", record)
    try:
        with _starts_left_out():
            yield log
    finally:
        event.remove(Engine, "before_cursor_execute", record)
    if len(log) > most:
        pytest.fail(f"{len(log)} statements, and there may be {most}:\n{log}", pytrace=False)


@contextmanager
def _starts_left_out() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name in AT_THE_START:
            patch.setattr(Database, name, _uncounted(getattr(Database, name)))
        yield


def _uncounted(method: Any) -> Any:
    async def call(*args: Any) -> Any:
        with uncounted():
            return await method(*args)

    return call


@contextmanager
def uncounted() -> Iterator[None]:
    """Count no statement of the block, or of what it waits for."""
    token = _starting.set(True)
    try:
        yield
    finally:
        _starting.reset(token)
