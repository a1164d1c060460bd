"""Routes for those who ask whether a server lives, and whether it can serve just now."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from contextvars import Context
from typing import Any, Literal, NotRequired, TypedDict

from sanic import Blueprint, HTTPResponse, Request, Sanic, json
from sanic_ext import openapi
from sqlalchemy import text
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine

from ..connections.pool import FairPool, PoolExhausted, PoolStatus
from ..database import Database
from ..exceptions import ConfigurationError, SanicDBError
from ..registry import databases_of

logger = logging.getLogger("sanic.root.db")

Reason = Literal["unavailable", "timeout", "pool_exhausted", "migrations_pending"]

NEVER_STORED = {"Cache-Control": "no-store"}


class Report(TypedDict):
    """What the readiness route says of one database."""

    ready: bool
    reason: NotRequired[Reason]
    seconds: NotRequired[float]
    pool: PoolStatus


class HealthBlueprint(Blueprint):
    """Serves ``/health/live`` and ``/health/ready``, for load balancers and orchestrators.

    ``live`` answers 200 as long as the worker answers at all; it never asks a database, which a
    restart of the app would not mend. ``ready`` answers 200 if every database answers in time,
    through the pool that requests use, and else 503 with the reason.

    Args:
        url_prefix: before the two routes.
        within: seconds that a database has to answer, the wait for a connection included. Below
            the time that the prober waits, which is 1 s in Kubernetes.
        at_head: whether a server is ready only if no migration is pending; needs the
            ``MigrationsBlueprint`` of each database.
        databases: the names of the blueprints to ask, by default all of the app.
        documented: whether the routes are part of the app's OpenAPI documentation.
    """

    __slots__ = ("_at_head", "_names", "_within")

    def __init__(
        self,
        url_prefix: str = "/health",
        *,
        within: float = 0.8,
        at_head: bool = False,
        databases: Sequence[str] | None = None,
        documented: bool = False,
    ) -> None:
        super().__init__("database_health", url_prefix=url_prefix)
        self._within = within
        self._at_head = at_head
        self._names = databases
        for name, handler in (("live", _live), ("ready", self._make_ready())):
            self.add_route(openapi.exclude(not documented)(handler), f"/{name}", name=name)
        self.listener("before_server_start")(self._check_configuration)

    def _make_ready(self) -> Any:
        async def ready(request: Request) -> HTTPResponse:
            """Tell whether every database answers: 200 or 503."""
            asked = {
                each.name: self._report(request.app, each) for each in self._asked(request.app)
            }
            reports = dict(zip(asked, await asyncio.gather(*asked.values()), strict=True))
            ready = all(report["ready"] for report in reports.values())
            body = {"ready": ready, "databases": reports}
            return json(body, status=200 if ready else 503, headers=NEVER_STORED)

        return ready

    def _asked(self, app: Sanic[Any, Any]) -> list[Database]:
        databases = databases_of(app)
        return [databases[name] for name in self._names or databases]

    async def _check_configuration(self, app: Sanic[Any, Any]) -> None:
        unknown = set(self._names or ()) - databases_of(app).keys()
        if unknown:
            raise ConfigurationError(
                f"HealthBlueprint: the app '{app.name}' has no database "
                f"{', '.join(sorted(unknown))}. It has: {', '.join(databases_of(app))}.",
                entry="health-of-no-database",
            )
        if self._at_head:
            for database in self._asked(app):
                await database.pending_migrations()

    async def _report(self, app: Sanic[Any, Any], database: Database) -> Report:
        """Join the check that is under way, however many ask, or begin one."""
        checks: dict[str, asyncio.Task[Report]]
        checks = app.ctx.__dict__.setdefault("_sanic_db_bp_health", {})
        check = checks.get(database.name)
        if check is None or check.done():
            loop = asyncio.get_running_loop()
            bounded = _bounded_check(database, self._within, at_head=self._at_head)
            # In an empty context: the request that began it may be over before.
            check = checks[database.name] = loop.create_task(bounded, context=Context())
        return await asyncio.shield(check)


async def _live(request: Request) -> HTTPResponse:
    """Tell that the worker answers."""
    return json({"live": True}, headers=NEVER_STORED)


def _engine(database: Database) -> AsyncEngine:
    # The one connection for writing of SQLite may be busy while everybody can read.
    return database.read_engine if database.backend.one_writer else database.engine


async def _bounded_check(database: Database, within: float, *, at_head: bool) -> Report:
    clock = asyncio.get_running_loop().time
    started = clock()
    check = asyncio.create_task(_check(database, at_head=at_head))
    # Not asyncio.timeout: to give up a connection on a frozen network takes time, too.
    await asyncio.wait({check}, timeout=within)
    reason = check.result() if check.done() else _reason_for_timeout(database)
    check.cancel()
    pool = database.pool_status()
    if reason is None:
        return {"ready": True, "seconds": round(clock() - started, 6), "pool": pool}
    logger.warning("database %s is not ready: %s", database.name, reason)
    return {"ready": False, "reason": reason, "pool": pool}


def _reason_for_timeout(database: Database) -> Reason:
    pool = _engine(database).pool
    return "pool_exhausted" if isinstance(pool, FairPool) and pool.waiting() else "timeout"


async def _check(database: Database, *, at_head: bool) -> Reason | None:
    """Ask a database; returns why it is not ready, in words that give nothing away."""
    try:
        async with _engine(database).connect() as connection:
            await connection.execute(text("SELECT 1"))
            if at_head and await database.pending_migrations(connection):
                return "migrations_pending"
    except PoolExhausted:
        return "pool_exhausted"
    except (SanicDBError, SQLAlchemyError, OSError) as error:
        logger.warning("database %s: %s", database.name, str(error).partition("\n")[0])
        return "unavailable"
    return None
