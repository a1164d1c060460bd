"""The contenders: one module each, whose `create_app` makes an app with the routes of `workloads`.

Every app has `/plain`; the others a contender has as far as they make sense for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

from sanic import Sanic


@dataclass(frozen=True)
class Options:
    """What every contender is built with.

    Args:
        url: the database, with its asyncio driver.
        pool_size: connections of each pool; none of the pools may open more.
        more_routes: routes to add that nobody asks for.
        part: the optional part of this package that is in use.
    """

    url: str
    pool_size: int = 16
    more_routes: int = 0
    part: str | None = None


ASGIApp = Callable[..., Any]

LABELS = {
    "usual": "Sanic, hand-written: `async_sessionmaker.begin()`",
    "best": "Sanic, hand-written: plain `Session` in one greenlet",
    "best_async": "Sanic, hand-written: `AsyncSession` on an autocommit engine",
    "session": "sanic-db-bp: `Session`",
    "async_session": "sanic-db-bp: `AsyncSession`",
    "read_session": "sanic-db-bp: `ReadSession`",
    "async_read_session": "sanic-db-bp: `AsyncReadSession`",
    "fastapi_depends": "FastAPI: `Depends`",
    "litestar_alchemy": "Litestar: advanced-alchemy",
    "raw_asyncpg": "Sanic: asyncpg without an ORM",
    "plain": "Sanic: no database",
    "plain_with_blueprint": "Sanic: sanic-db-bp, not used",
    "injected_trivial": "Sanic: sanic-ext injects a trivial object",
}
"""The modules, with the names that reports give them."""

PARTS = {
    "imported": "every optional part imported, all off",
    "slow_log": "`SLOW_QUERY_MS`",
    "errors": "`contrib.errors`",
    "held_connections": "`contrib.held_connections`",
    "n_plus_one": "`contrib.n_plus_one`",
    "server_timing": "`contrib.server_timing`",
    "sql_comments": "`contrib.sql_comments`",
    "prometheus": "`contrib.prometheus`",
    "opentelemetry": "`contrib.opentelemetry`",
}
"""The optional parts that see every request, or every statement."""

WITH_PART = "with_part:"
LABELS |= {f"{WITH_PART}{part}": f"`Session`, {label}" for part, label in PARTS.items()}

PEERS = ("fastapi_depends", "litestar_alchemy")
"""Those that need packages of the dependency group `bench`."""


def create_app(name: str, options: Options) -> Sanic[Any, Any] | ASGIApp:
    """Make the app of a contender."""
    module, _, part = name.partition(":")
    made_by: Any = import_module(f"{__name__}.{module}")
    app: Sanic[Any, Any] | ASGIApp = made_by.create_app(replace(options, part=part or None))
    return app
