"""The contenders: one module each, whose `create_app` makes an app with the routes of `workloads`.

Every app has `/plain`; the others a contender has as far as they make sense for it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
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
    """

    url: str
    pool_size: int = 16
    more_routes: int = 0


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

PEERS = ("fastapi_depends", "litestar_alchemy")
"""Those that need packages of the dependency group `bench`."""


def create_app(name: str, options: Options) -> Sanic[Any, Any] | ASGIApp:
    """Make the app of a contender."""
    app: Sanic[Any, Any] | ASGIApp = import_module(f"{__name__}.{name}").create_app(options)
    return app
