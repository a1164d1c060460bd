"""Comments that tell the database's own logs and statistics on whose behalf a statement runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

from sanic import Request, Sanic
from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine

from ..context import current_request
from ..database import Database
from ..exceptions import ConfigurationError
from ..observers import Observer
from ..registry import observers_of

LONGEST = 128
"""Characters of a value; the client chooses some of them."""

_TRACEPARENT = re.compile(r"[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")


def _traceparent(request: Request) -> str | None:
    sent: str = request.headers.get("traceparent", "")
    return sent if _TRACEPARENT.fullmatch(sent) else None


KEYS: dict[str, Callable[[Request], object]] = {
    "application": lambda request: request.app.name,
    "controller": lambda request: request.name,
    "request_id": lambda request: request.id,
    "route": lambda request: request.uri_template,
    "traceparent": _traceparent,
}
"""What a comment may say of the current request."""

DEFAULT_KEYS = ("application", "route")
"""What is the same for all requests of a route.

A driver that prepares its statements (asyncpg, psycopg) knows them by their text, comment
included: with a value that changes from request to request it has to prepare every one anew.
"""


def install(
    app: Sanic[Any, Any],
    *,
    keys: Iterable[str] = DEFAULT_KEYS,
    values: Mapping[str, Callable[[], str | None]] | None = None,
) -> None:
    """Add a comment to the statements of requests, in the form of sqlcommenter.

    Such as ``/*application='shop',route='%2Fitems'*/``: the keys are sorted, and the values
    encoded as in a URL, so that no value can end the comment. ``executemany`` is left as it is,
    because MySQL's drivers would send its rows one by one.

    Args:
        app: the app; all its databases are observed.
        keys: what to tell of the request: of ``application``, ``controller`` (the route's name),
            ``request_id``, ``route`` and ``traceparent`` (as the client has sent it).
        values: more keys, each with a function that returns the current value, or None.

    Raises:
        ConfigurationError: there is no such key.
    """
    keys = tuple(keys)
    unknown = [key for key in keys if key not in KEYS]
    if unknown:
        raise ConfigurationError(
            f"{', '.join(unknown)}: SQL comments have no such key. There are: {', '.join(KEYS)}.",
            entry="no-such-key",
        )
    observers_of(app).append(_Comments(keys, values or {}))


class _Comments(Observer):
    def __init__(self, keys: Iterable[str], values: Mapping[str, Callable[[], object]]) -> None:
        self._keys = {key: KEYS[key] for key in keys}
        self._values = values

    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        percent = "%%" if engine.dialect.paramstyle in ("format", "pyformat") else "%"

        @event.listens_for(engine.sync_engine, "before_cursor_execute", retval=True)
        def add(
            _connection: Connection,
            _cursor: object,
            statement: str,
            parameters: Any,
            _context: object,
            executemany: bool,
        ) -> tuple[str, Any]:
            # Whoever comments by himself has said all.
            if not executemany and not statement.endswith("*/"):
                statement += _comment(tuple(self._pairs()), percent)
            return statement, parameters

    def _pairs(self) -> Iterable[tuple[str, object]]:
        request = current_request()
        if request is not None:
            for key, tell in self._keys.items():
                yield key, tell(request)
        for key, value in self._values.items():
            yield key, value()


@lru_cache(maxsize=512)
def _comment(pairs: tuple[tuple[str, object], ...], percent: str) -> str:
    known = sorted((key, str(value)[:LONGEST]) for key, value in pairs if value is not None)
    if not known:
        return ""
    inner = ",".join(f"{_encoded(key)}='{_encoded(value)}'" for key, value in known)
    return f" /*{inner.replace('%', percent)}*/"


def _encoded(text: str) -> str:
    return quote(text, safe="", errors="replace")
