"""A statement that takes its time, on every database."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from sqlalchemy import TextClause, event, text
from sqlalchemy.ext.asyncio import AsyncEngine

from sanic_db_bp import Database

_SLEEP = {
    # In steps, so that it can be interrupted as any statement that computes.
    "sqlite": "SELECT max(sleep({0} / 20.0)) FROM (WITH RECURSIVE step(n) AS "
    "(SELECT 1 UNION ALL SELECT n + 1 FROM step WHERE n < 20) SELECT n FROM step)",
    "postgresql": "SELECT pg_sleep({0})",
    "mysql": "SELECT SLEEP({0})",
}


def teach_to_sleep(*engines: AsyncEngine) -> None:
    """Give SQLite, in its own thread, the function that the servers have."""

    def connected(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.create_function("sleep", 1, time.sleep)

    for engine in engines:
        if engine.dialect.name == "sqlite":
            event.listen(engine.sync_engine, "connect", connected)


def sleep_for(database: Database, seconds: float) -> TextClause:
    """Return the statement with which the database sleeps."""
    return text(_SLEEP[database.backend.name].format(seconds))


SLOW_COMMIT = (
    "CREATE TABLE slow (id integer)",
    "CREATE FUNCTION wait() RETURNS trigger LANGUAGE plpgsql AS "
    "'BEGIN PERFORM pg_sleep(0.2); RETURN NULL; END'",
    "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON slow "
    "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION wait()",
)
"""PostgreSQL: a COMMIT after an INSERT into this table lasts a fifth of a second."""


async def make_slow_commit(database: Database) -> None:
    """Create the table of that name."""
    async with database.session() as session:
        for statement in SLOW_COMMIT:
            await session.execute(text(statement))


async def all_are_free(database: Database) -> bool:
    """Whether no connection stays in use; MariaDB needs one for a moment to end a statement."""
    deadline = time.monotonic() + 2
    while database.pool_status()["checked_out"] and time.monotonic() < deadline:  # noqa: ASYNC110
        await asyncio.sleep(0.01)
    return database.pool_status()["checked_out"] == 0
