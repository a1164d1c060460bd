"""A warning when a connection is held for long, which says by whom and since which line."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from functools import partial
from typing import Any

from sanic import Sanic
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine

from ..context import current_origin
from ..database import Database
from ..observers import Observer, Origin
from ..registry import observers_of
from ._callers import calling_line

logger = logging.getLogger("sanic.root.db")

LIMIT = 5.0
"""Seconds that a connection may be held without a warning."""


def install(app: Sanic[Any, Any], *, limit: float = LIMIT) -> None:
    """Warn of connections that are held for long: they are what exhausts a pool.

    The line that is named is the one that began the transaction, with its first statement.

    Args:
        app: the app; all its databases are observed.
        limit: seconds from which a connection is held for long.
    """
    observers_of(app).append(_HeldConnections(limit))


class _HeldConnections(Observer):
    def __init__(self, limit: float) -> None:
        self._limit = limit

    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        @event.listens_for(engine.sync_engine, "checkout")
        def taken(_connection: object, entry: Any, _proxy: object) -> None:
            given_back(_connection, entry)
            warn = partial(self._warn, database.name, current_origin(), calling_line())
            # In the context of the request, the timer would keep the request alive.
            loop = asyncio.get_running_loop()
            entry.record_info[self] = loop.call_later(self._limit, warn, context=Context())

        @event.listens_for(engine.sync_engine, "checkin")
        def given_back(_connection: object, entry: Any) -> None:
            timer = entry.record_info.pop(self, None)
            if timer is not None:
                timer.cancel()

    def _warn(self, database: str, origin: Origin | None, line: str) -> None:
        route, request_id = origin or (None, None)
        holder = "" if route is None else f" by {route}, request {request_id},"
        details = {"database": database, "route": route, "request_id": request_id, "line": line}
        logger.warning(
            "a connection of '%s' has been held for %g s%s since %s",
            *(database, self._limit, holder, line),
            extra=details,
        )
