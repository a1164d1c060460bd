"""The guards of a session: used by one task at a time, in the bridge, and not after its end."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any, TypeVar, cast

from sqlalchemy import Connection, event
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.orm.session import SessionTransactionOrigin

from ..bridge import bridged_task, deliver_cancellation, held_back
from ..exceptions import SessionFinished
from .by_key import by_key
from .reading import ReadSession

if TYPE_CHECKING:
    from .use import SessionUse

S = TypeVar("S", bound=Session)

WAITS_FOR_DATABASE = (
    "execute",
    "scalar",
    "scalars",
    "connection",
    "flush",
    "commit",
    "rollback",
    "begin_nested",
    "prepare",
    "bulk_save_objects",
    "bulk_insert_mappings",
    "bulk_update_mappings",
)
CHANGES_SESSION = ("add", "add_all", "delete", "delete_all", "merge", "merge_all", "refresh")
ENDS_SESSION = ("close", "reset", "invalidate")


def use_of(session: Session) -> SessionUse:
    """Return which use of which unit of work a session belongs to."""
    use: SessionUse = cast(Any, session).unit_of_work_use
    return use


def guarded_class(session_class: type[S]) -> type[S]:
    """Return the subclass of a session class whose methods report to their unit of work."""
    base: type[Session] = ReadSession if issubclass(session_class, ReadSession) else Session
    methods = {"get": by_key(base.get), **_guarded_methods(base)}
    guarded: Any = type(base.__name__, (base,), {"__module__": base.__module__, **methods})
    if session_class is not base:
        # What a subclass adds may call super().execute(), which passes by its own guards.
        methods = {"__module__": session_class.__module__, **_guarded_methods(session_class)}
        guarded = type(session_class.__name__, (session_class, guarded), methods)
    event.listen(guarded, "after_begin", _after_begin)
    if not issubclass(session_class, ReadSession):
        # The end of a read session says nothing about what is to be committed.
        event.listen(guarded, "after_commit", _after_commit)
        event.listen(guarded, "after_soft_rollback", _after_soft_rollback)
        event.listen(guarded, "after_transaction_end", _after_transaction_end)
    return cast(type[S], guarded)


def _guarded_methods(session_class: type[Session]) -> dict[str, Any]:
    writes = not issubclass(session_class, ReadSession)
    methods: dict[str, Any] = {"begin": _joining(session_class.begin)}
    for name in WAITS_FOR_DATABASE:
        forgets = writes and name == "rollback"
        methods[name] = _alone(getattr(session_class, name), forgets=forgets)
    for name in ENDS_SESSION:
        methods[name] = _alone(getattr(session_class, name), forgets=writes, ends=True)
    return methods | {name: _alive(getattr(session_class, name)) for name in CHANGES_SESSION}


def _alone(method: Callable[..., Any], *, forgets: bool, ends: bool = False) -> Callable[..., Any]:
    """Let one task at a time use the method.

    It runs for each statement: what it calls on the good path is written out here.

    Args:
        method: of the session class.
        forgets: whether what waits for a COMMIT is forgotten afterwards. Without a transaction
            SQLAlchemy has nothing to roll back, and tells nobody.
        ends: whether it may be called after the end, and does nothing then.
    """

    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        use: SessionUse = self.unit_of_work_use
        task = bridged_task()
        if task is not None and use.used_by is task:
            result = method(self, *args, **kwargs)
        elif ends and use.finished:
            return None
        else:
            use.enter(task)
            try:
                result = method(self, *args, **kwargs)
            finally:
                use.leave()
            if use.unit.ready and not use.unit.ending:
                use.unit.run_callbacks()
            if held_back and not use.unit.ending:
                deliver_cancellation()
        if forgets:
            use.unit.transaction_ended()
        return result

    return guarded


def _alive(method: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(method)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        if use_of(self).finished:
            raise SessionFinished(use_of(self).database)
        return method(self, *args, **kwargs)

    return guarded


class BlockTransaction(SessionTransaction):
    """What ``session.begin()`` returns: its end uses the session as alone as any other method."""

    def __exit__(self, *exception: Any) -> None:
        """Commit, or roll back if the block has raised."""
        use = use_of(self.session)
        use.enter(bridged_task())
        try:
            super().__exit__(*exception)
        finally:
            use.leave()
        use.unit.run_callbacks()
        deliver_cancellation()


def _joining(begin: Callable[[Any, bool], SessionTransaction]) -> Callable[..., SessionTransaction]:
    @wraps(begin)
    def guarded(self: Any, nested: bool = False) -> SessionTransaction:
        use = use_of(self)
        if use.finished:
            raise SessionFinished(use.database)
        # A middleware or dependency may have used the session before: one unit of work, one
        # transaction.
        current: SessionTransaction | None = self.get_transaction()
        if nested or current is None or current.origin is not SessionTransactionOrigin.AUTOBEGIN:
            current = begin(self, nested)
        if not nested:
            current.__class__ = BlockTransaction
        return current

    return guarded


def _after_begin(session: Any, _transaction: object, connection: Connection) -> None:
    use_of(session).connected(connection)


def _after_commit(session: Any) -> None:
    if not session.in_nested_transaction():
        use_of(session).unit.committed()


def _after_soft_rollback(session: Any, transaction: SessionTransaction) -> None:
    use_of(session).unit.rolled_back(transaction)


def _after_transaction_end(session: Any, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        use = use_of(session)
        use.unit.transaction_ended()
        if use.used_by is None:
            # Committed by the transaction's own method, not by the session's.
            use.unit.run_callbacks()
