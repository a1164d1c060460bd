"""The sessions for reading alone, which handlers ask for by these classes."""

from __future__ import annotations

from typing import Any, NoReturn

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from ..exceptions import ReadOnlySession, SessionError


class ReadSession(Session):
    """A plain session for reading alone.

    Each statement is a transaction of its own on a read-only engine, so that one SELECT costs one
    round trip. The database refuses to write; changed objects are refused at the flush.
    """


class AsyncReadSession(AsyncSession):
    """The asyncio form of :class:`ReadSession`.

    Raises:
        SessionError: on ``stream()``, which needs a transaction; an ``AsyncSession`` has one.
    """

    sync_session_class = ReadSession

    async def stream(self, *_: Any, **__: Any) -> NoReturn:
        """Refuse: PostgreSQL has no cursors outside of a transaction."""
        raise SessionError(
            "A read session cannot stream rows. Ask for an AsyncSession to stream.",
            entry="read-session-streams",
        )

    stream_scalars = stream


@event.listens_for(ReadSession, "before_flush")
def _refuse_to_write(session: Session, _context: object, _instances: object) -> None:
    use = session.__dict__.get("unit_of_work_use")
    raise ReadOnlySession("db" if use is None else use.database)
