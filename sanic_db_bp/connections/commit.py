"""COMMIT and ROLLBACK on an engine's connections: run to their end, whole or not at all."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

from sqlalchemy import event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import PendingRollbackError
from sqlalchemy.ext.asyncio import AsyncEngine

from ..bridge import uncancelled
from ..dialects import Backend, in_autocommit
from ..exceptions import link_to

DOUBTFUL = "sanic_db_bp_doubtful"
"""Noted of a connection on which a statement has failed."""

COMMITTED = "sanic_db_bp_committed"
"""Noted of a connection whose last transaction was committed, until it begins another."""

FINISH_WITHIN = 2.0
"""Seconds that a COMMIT or ROLLBACK may still take after its task was cancelled."""


def guard_commits(engine: AsyncEngine, backend: Backend) -> None:
    """Let no transaction of an engine end otherwise than its client is told.

    A COMMIT or ROLLBACK that was begun runs to its end although its task is cancelled. A COMMIT
    fails if its transaction ended before, at a failed statement whose error was caught. The
    ROLLBACK of the pool is left out after a COMMIT: most drivers ask the server for it.
    """
    dialect: Any = engine.dialect
    guard = _Guard(dialect, backend)
    dialect.do_begin = guard.begin
    dialect.do_commit = uncancelled(guard.commit, within=FINISH_WITHIN)
    dialect.do_rollback = guard.roll_back_what_is_begun
    event.listen(engine.sync_engine, "handle_error", guard.note)


class _Guard:
    """What an engine's dialect does in place of its own BEGIN, COMMIT and ROLLBACK."""

    def __init__(self, dialect: Any, backend: Backend) -> None:
        self._do_begin, self._do_commit = dialect.do_begin, dialect.do_commit
        self._do_rollback = dialect.do_rollback
        self._backend = backend
        self._roll_back_to_the_end = uncancelled(self._roll_back, within=FINISH_WITHIN)

    def begin(self, dbapi_connection: Any) -> None:
        _notes(dbapi_connection).pop(COMMITTED, None)
        self._do_begin(dbapi_connection)

    def note(self, context: ExceptionContext) -> None:
        connection = context.connection
        failed_commit = context.statement is None
        if failed_commit or connection is None or connection.closed or in_autocommit(connection):
            return
        if self._backend.may_end_transaction(connection, context.original_exception):
            _notes(connection.connection)[DOUBTFUL] = True

    def commit(self, dbapi_connection: Any) -> None:
        notes = _notes(dbapi_connection)
        try:
            if DOUBTFUL in notes and not self._backend.is_whole(dbapi_connection):
                raise PendingRollbackError(
                    "a statement failed, and its transaction with it; its error was caught, and "
                    "what was done before it would be lost in silence. Let the error out, or catch "
                    f"it outside of a savepoint: 'with session.begin_nested()'\n"
                    f"{link_to('caught-error')}"
                )
            self._do_commit(dbapi_connection)
            notes.pop(DOUBTFUL, None)
            notes[COMMITTED] = True
        except BaseException:
            # In SQLite the transaction goes on after a failed COMMIT, and SQLAlchemy takes it for
            # ended; elsewhere this does nothing.
            with suppress(Exception):
                self._roll_back(dbapi_connection)
            raise

    def _roll_back(self, dbapi_connection: Any) -> None:
        _notes(dbapi_connection).pop(DOUBTFUL, None)
        self._do_rollback(dbapi_connection)

    def roll_back_what_is_begun(self, dbapi_connection: Any) -> None:
        if COMMITTED not in _notes(dbapi_connection):
            self._roll_back_to_the_end(dbapi_connection)


def _notes(dbapi_connection: Any) -> dict[str, object]:
    """Return what is noted of a connection, from its checkout to its return."""
    # SQLAlchemy makes such an object for each checkout, but none on which it gets to know the
    # database.
    notes: dict[str, object] = getattr(dbapi_connection, "__dict__", {})
    return notes
