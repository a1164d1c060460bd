"""What a savepoint needs to stand for a transaction, on each kind of database."""

from __future__ import annotations

import sqlite3
from collections.abc import Callable
from typing import Any, ClassVar

Fetch = Callable[[str], list[Any]]
"""Runs a statement on the connection and returns its rows."""


class Savepoints:
    """Savepoints of one kind of database that behave like its transactions.

    Args:
        fetch: runs a statement on the connection.
    """

    begin: ClassVar[str | None] = None
    """Begins the transaction of the test, where the driver does not do so by itself."""

    def __init__(self, fetch: Fetch) -> None:
        self.fetch = fetch

    def check_deferred(self) -> None:
        """Check what a COMMIT would check, and no RELEASE does."""

    def read_only(self) -> None:
        """Let the database refuse to write."""

    def read_write(self) -> None:
        """Let it write again, after the rollback to the savepoint."""


class PostgreSQL(Savepoints):
    """Deferred constraints are checked by name of their modes ("SET CONSTRAINTS")."""

    def check_deferred(self) -> None:
        """See :meth:`Savepoints.check_deferred`."""
        deferred = self.fetch(
            "SELECT string_agg(DISTINCT format('%I.%I', nspname, conname), ', ') "
            "FROM pg_constraint JOIN pg_namespace ON pg_namespace.oid = connamespace "
            "WHERE condeferred"
        )[0][0]
        self.fetch("SET CONSTRAINTS ALL IMMEDIATE")
        if deferred:
            # The next transaction begins as they were declared.
            self.fetch(f"SET CONSTRAINTS {deferred} DEFERRED")

    def read_only(self) -> None:
        """See :meth:`Savepoints.read_only`; the rollback to the savepoint takes it back."""
        self.fetch("SET LOCAL transaction_read_only = on")


class MySQL(Savepoints):
    """Nothing can be deferred, and nothing can be read-only within a transaction."""

    begin = "START TRANSACTION"


class SQLite(Savepoints):
    """Deferred foreign keys are looked for in the tables."""

    begin = "BEGIN IMMEDIATE"

    def check_deferred(self) -> None:
        """See :meth:`Savepoints.check_deferred`."""
        if self.fetch("PRAGMA foreign_keys")[0][0] and self.fetch("PRAGMA foreign_key_check"):
            raise sqlite3.IntegrityError("FOREIGN KEY constraint failed")

    def read_only(self) -> None:
        """See :meth:`Savepoints.read_only`."""
        self.fetch("PRAGMA query_only = ON")

    def read_write(self) -> None:
        """See :meth:`Savepoints.read_write`."""
        self.fetch("PRAGMA query_only = OFF")


SAVEPOINTS: dict[str, type[Savepoints]] = {
    "postgresql": PostgreSQL,
    "mysql": MySQL,
    "sqlite": SQLite,
}
