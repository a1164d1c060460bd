"""What a server asks of its databases before it starts."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable, Sequence

from sqlalchemy.exc import SQLAlchemyError

from .database import Database
from .engine import pool_limit, share_of
from .exceptions import ConfigurationError, DatabaseUnavailable

logger = logging.getLogger("sanic.root.db")


async def require_head(database: Database) -> None:
    """Refuse, or warn of, a database that lacks migrations: ``REQUIRE_HEAD``.

    Raises:
        ConfigurationError: it lacks some, and the setting is ``refuse``.
    """
    wanted = database.settings.require_head
    if wanted == "off" or not (pending := await database.pending_migrations()):
        return
    message = (
        f"The database '{database.name}' lacks migrations: {', '.join(pending)}. "
        f"Run: sanic <app> exec {database.name}-upgrade"
    )
    if wanted == "refuse":
        raise ConfigurationError(message, entry="pending-migrations")
    logger.warning(message)


async def tell_budget(databases: Iterable[Database]) -> None:
    """Log how many connections may be opened, and warn where the database server allows fewer.

    Databases on one server share what it allows. A replica (``READ_URL``) counts for itself, and
    is not asked. SQLite has no such limit.
    """
    servers: dict[tuple[str | None, int | None], list[Database]] = defaultdict(list)
    for database in databases:
        if database.backend.connection_limit is not None:
            servers[database.url.host, database.url.port].append(database)
    for sharing in servers.values():
        await _tell(sharing)


async def _tell(databases: Sequence[Database]) -> None:
    needs = [_needed(database) for database in databases]
    known = [need for need in needs if need is not None]
    if len(known) < len(needs):
        return
    limits = [limit for each in databases if (limit := await _allowed(each)) is not None]
    total, names = sum(known), " and ".join(each.name for each in databases)
    # Users and databases may have limits of their own; the widest is nearest to the server's.
    allowed = max(limits, default=None)
    if allowed is not None and total > allowed:
        logger.warning(
            "database %s: up to %d connections, all workers together, and the server allows %d. "
            "Set MAX_CONNECTIONS, or lower POOL_SIZE",
            names,
            total,
            allowed,
        )
        return
    suffix = "" if allowed is None else f", of {allowed} that the server allows"
    logger.info("database %s: up to %d connections, all workers together%s", names, total, suffix)


def _needed(database: Database) -> int | None:
    pools = [_most_connections(database)]
    if database.settings.read_url is None:
        pools.append(_most_connections(database, read_only=True))
    known = [pool for pool in pools if pool is not None]
    return database.workers * sum(known) if len(known) == len(pools) else None


def _most_connections(database: Database, *, read_only: bool = False) -> int | None:
    """Return how many connections one worker opens at most, or None if nobody can tell."""
    share = share_of(database.settings, database.workers, read_only=read_only)
    return pool_limit(database.settings, database.backend, share, read_only=read_only)


async def _allowed(database: Database) -> int | None:
    try:
        return await database.allowed_connections()
    except (DatabaseUnavailable, SQLAlchemyError) as error:
        reason = str(error).partition("\n")[0]
        logger.info("database %s: its limit of connections is unknown: %s", database.name, reason)
        return None
