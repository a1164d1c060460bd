"""Which unit of work is the current one: of a request, or of a block outside of requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeVar, overload

from sanic import Request, Sanic
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from .bridge import in_greenlet
from .exceptions import NoCurrentSession
from .handling.request import ScopedRequest, scope_of, used_beside_handler
from .observers import Origin
from .registry import databases_of, default_database
from .unit_of_work import Callback, UnitOfWork, block_units

if TYPE_CHECKING:
    from .database import Database

S = TypeVar("S", bound=Session | AsyncSession)


def current_request() -> Request | None:
    """Return the request on whose behalf the current code runs."""
    return Request._current.get(None)


def current_origin() -> Origin | None:
    """Return what the log says of the current request."""
    request = current_request()
    if not isinstance(request, ScopedRequest):
        return None
    return Origin(request.for_log, str(request.id))


def current_unit(session_class: type[Session | AsyncSession] | None = None) -> UnitOfWork:
    """Return the unit of work of the innermost block around the caller, or of its request.

    Args:
        session_class: of the database that is meant; by default the innermost, or ``db``.

    Raises:
        NoCurrentSession: there is none.
    """
    for unit in block_units():
        if session_class is None or unit.database.form_of(session_class):
            return unit
    request = current_request()
    if request is not None:
        for database in _candidates(request.app):
            if session_class is None or database.form_of(session_class):
                return used_beside_handler(request).unit(database)
    wanted = "session" if session_class is None else session_class.__name__
    raise NoCurrentSession(
        f"There is no current {wanted}: the code runs outside of a request and of a block. Open "
        "one: 'async with app.ctx.db.session() as session'.",
        entry="no-current-session",
    )


def _candidates(app: Sanic[Any, Any]) -> list[Database]:
    first = default_database(app)
    return [] if first is None else [first, *databases_of(app).values()]


@overload
def current_session() -> Any: ...
@overload
def current_session(session_class: type[S]) -> S: ...
def current_session(session_class: Any = None) -> Any:
    """Return the session of the current request or block, from anywhere in its code.

    Args:
        session_class: the class of the session, which tells the form and the database:
            ``current_session(Session)``, ``current_session(ReportsAsyncSession)``. Without it, the
            session is in the form that the code around was opened with: a plain ``Session`` in
            ``run_sync`` and in a handler that asks for plain sessions alone, an ``AsyncSession``
            everywhere else.

    Returns:
        The session, the same that the handler or the block has.

    Raises:
        NoCurrentSession: the code runs outside of a request and of a block.
        SessionFinished: on use, if the request or block is over.
    """
    unit = current_unit(session_class)
    if session_class is None:
        return unit.session if unit.plain and not _beside_handler() else unit.async_session
    return getattr(unit, unit.database.form_of(session_class) or "session")


def _beside_handler() -> bool:
    """Whether the caller is middleware or an exception handler: no plain session waits there."""
    request = current_request()
    if not isinstance(request, ScopedRequest) or in_greenlet():
        return False
    return not scope_of(request).handling


def on_commit(callback: Callback) -> None:
    """Call something after the COMMIT of the current unit of work, never after a rollback.

    An error in it is logged and changes nothing: the transaction is durable by then. An asyncio
    callback is awaited before the answer is sent; long work belongs into ``app.add_task``.

    Args:
        callback: a function without arguments, or one that returns an awaitable.

    Raises:
        NoCurrentSession: the code runs outside of a request and of a block.
    """
    current_unit().on_commit(callback)
