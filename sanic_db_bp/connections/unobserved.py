"""A connection for whose events nobody listens."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Connection, Engine


class UnobservedConnection(Connection):
    """A connection that does not join the events of its engine unless there are any.

    SQLAlchemy joins them for each connection that is checked out, and that is a noticeable part of
    a short transaction.
    """

    def __init__(
        self,
        engine: Engine,
        connection: Any = None,
        _has_events: bool | None = None,
        **options: Any,
    ) -> None:
        # Of the class only where somebody listens to all connections.
        listened = engine._has_events or getattr(type(self), "_has_events", False)
        if _has_events is None and not listened:
            _has_events = False
        super().__init__(engine, connection, _has_events, **options)
