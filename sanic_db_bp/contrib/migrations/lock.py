"""A lock in the database: of several servers that start, one migrates and the others wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from ...exceptions import DatabaseUnavailable

TRY_EVERY = 0.5
"""Seconds between two attempts to get the lock."""

# Tried again and again, never waited for: CREATE INDEX CONCURRENTLY waits for every statement that
# is under way in PostgreSQL, that of a waiting server too.
_ATTEMPTS = {
    # Ends with the transaction, which PgBouncer keeps on one connection.
    "postgresql": "SELECT pg_try_advisory_xact_lock(hashtext('sanic-db-bp migrations'))",
    # Of the whole server, so that it needs the database's name.
    "mysql": "SELECT GET_LOCK(CONCAT('sanic-db-bp ', MD5(DATABASE())), 0)",
}

# For PostgreSQL, the SELECT is under way until the next statement takes its place.
_KEEP = {"postgresql": "SET LOCAL idle_in_transaction_session_timeout = 0"}


@asynccontextmanager
async def migration_lock(engine: AsyncEngine, name: str, within: float) -> AsyncIterator[None]:
    """Hold the lock for the length of the block, on a connection of its own.

    SQLite needs none: a migration begins with its write lock.

    Args:
        engine: where to take the lock; its connections must be closed afterwards.
        name: the database's name in the error.
        within: seconds to wait for another server's migrations.

    Raises:
        DatabaseUnavailable: another server held the lock for all that time.
    """
    attempt = _ATTEMPTS.get(engine.dialect.name)
    if attempt is None:
        yield
        return
    async with engine.connect() as connection:
        try:
            async with asyncio.timeout(within):
                await _wait_for_lock(connection, attempt)
        except TimeoutError:
            raise DatabaseUnavailable(
                name, f"another server has been migrating it for {within:g} s"
            ) from None
        if keep := _KEEP.get(engine.dialect.name):
            await connection.execute(text(keep))
        yield


async def _wait_for_lock(connection: AsyncConnection, attempt: str) -> None:
    told = False
    while not await connection.scalar(text(attempt)):
        if not told:
            print("Waiting for the migrations of another server.", flush=True)
            told = True
        await connection.rollback()
        await asyncio.sleep(TRY_EVERY)
