"""How many statements a request has executed, and how long they took."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from sanic import Request, Sanic
from sanic.response import BaseHTTPResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from ..context import current_request
from ..database import Database
from ..observers import Execution, Observer, on_execution
from ..registry import observers_of


@dataclass
class DatabaseUsage:
    """What a request has done with one database so far.

    Args:
        queries: how many statements were executed, those that failed included.
        seconds: how long the driver took for them, together.
    """

    queries: int = 0
    seconds: float = 0.0


def install(app: Sanic[Any, Any], *, header: bool = True) -> None:
    """Count the statements of each request, at ``request.ctx.db_usage["<database>"]``.

    Args:
        app: the app; all its databases are observed.
        header: send the figures to the client, in the header ``Server-Timing``, which the
            developer tools of a browser show. A stream's is sent when the stream begins.
    """
    observers_of(app).append(_Counter())
    if header:
        app.register_middleware(_add_header, "response")
    app.register_middleware(_prepare, "request")


def _prepare(request: Request) -> None:
    usage_of(request)


def usage_of(request: Request) -> defaultdict[str, DatabaseUsage]:
    """Return what a request has done with each database, by the database's name."""
    usage: defaultdict[str, DatabaseUsage] | None = getattr(request.ctx, "db_usage", None)
    if usage is None:
        # A dependency may execute statements before any middleware runs.
        usage = request.ctx.db_usage = defaultdict(DatabaseUsage)
    return usage


class _Counter(Observer):
    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        def count(execution: Execution) -> None:
            # SQLite begins transactions by a statement, other databases by none that is seen here.
            request = None if execution.statement.startswith("BEGIN") else current_request()
            if request is not None:
                usage = usage_of(request)[database.name]
                usage.queries += 1
                usage.seconds += execution.seconds

        on_execution(engine, count)


def _add_header(request: Request, response: BaseHTTPResponse) -> None:
    for database, usage in usage_of(request).items():
        if not usage.queries:
            continue
        description = "1 query" if usage.queries == 1 else f"{usage.queries} queries"
        metric = f'{database};dur={usage.seconds * 1000:.1f};desc="{description}"'
        response.headers.add("Server-Timing", metric)
