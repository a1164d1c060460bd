"""What metrics are made of: the connections of each pool, and how transactions end."""

from __future__ import annotations

from dataclasses import dataclass
from time import perf_counter
from typing import Any, Literal, NamedTuple

from sqlalchemy import Connection, event
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.orm import Session, SessionTransaction

from ..connections.pool import FairPool
from ..database import Database
from ..observers import Observer

Outcome = Literal["committed", "rolled back", "failed"]
"""How a transaction ended; failed: it was to be committed, and was not."""


class PoolName(NamedTuple):
    """One of the two pools of a database."""

    database: str
    engine: Literal["read", "write"]


@dataclass
class _Transaction:
    """A transaction of a session, as far as it has come."""

    outcome: Outcome = "rolled back"


class UsageObserver(Observer):
    """Finds out how pools and transactions fare; a subclass counts it."""

    def opened(self, pool: PoolName) -> None:
        """A connection was opened."""

    def closed(self, pool: PoolName) -> None:
        """A connection was closed."""

    def taken(self, pool: PoolName) -> None:
        """A connection was taken out of the pool."""

    def given_back(self, pool: PoolName, held: float) -> None:
        """A connection came back, or was lost, after so many seconds."""

    def waited(self, pool: PoolName, seconds: float, found: bool) -> None:
        """Somebody has waited for a connection, and got one or gave up."""

    def transaction_ended(self, database: str, outcome: Outcome) -> None:
        """A transaction of a read-write session is over."""

    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        """See :meth:`Observer.engine_made`."""
        name = PoolName(database.name, "read" if read_only else "write")
        self._observe_connections(engine, name)
        self._observe_checkouts(engine, name)
        pool = type(engine.pool)
        if issubclass(pool, FairPool):
            pool.on_wait += (lambda seconds, found: self.waited(name, seconds, found),)

    def _observe_connections(self, engine: AsyncEngine, name: PoolName) -> None:
        @event.listens_for(engine.sync_engine, "connect")
        def opened(*_: Any) -> None:
            self.opened(name)

        @event.listens_for(engine.sync_engine, "close")
        @event.listens_for(engine.sync_engine, "detach")
        def closed(*_: Any) -> None:
            self.closed(name)

    def _observe_checkouts(self, engine: AsyncEngine, name: PoolName) -> None:
        taken_at = object()

        @event.listens_for(engine.sync_engine, "checkout")
        def taken(_connection: object, entry: Any, _proxy: object) -> None:
            # SQLAlchemy checks out once more what it has found to be dead.
            if taken_at not in entry.record_info:
                self.taken(name)
            entry.record_info[taken_at] = perf_counter()

        @event.listens_for(engine.sync_engine, "checkin")
        @event.listens_for(engine.sync_engine, "detach")
        def given_back(_connection: object, entry: Any) -> None:
            started = entry.record_info.pop(taken_at, None)
            if started is not None:
                self.given_back(name, perf_counter() - started)
            # Wherever a transaction ends, its connection comes back then: a cut one too.
            transaction = entry.info.pop(self, None)
            if transaction is not None:
                self.transaction_ended(name.database, transaction.outcome)

    def session_class_made(
        self, database: Database, session_class: type[Session], *, read_only: bool
    ) -> None:
        """See :meth:`Observer.session_class_made`."""
        if not read_only:
            event.listen(session_class, "after_begin", self._begun)
            event.listen(session_class, "before_commit", self._to_be_committed)
            event.listen(session_class, "after_commit", self._committed)
            event.listen(session_class, "after_transaction_end", self._ended)

    def _transaction(self, session: Session) -> _Transaction:
        transaction: _Transaction = session.info.setdefault(self, _Transaction())
        return transaction

    def _begun(self, session: Session, _transaction: object, connection: Connection) -> None:
        connection.info[self] = self._transaction(session)

    def _to_be_committed(self, session: Session) -> None:
        # What the flush of a COMMIT sends may be the first statement, so it need not have begun.
        if not session.in_nested_transaction():
            self._transaction(session).outcome = "failed"

    def _committed(self, session: Session) -> None:
        if not session.in_nested_transaction():
            self._transaction(session).outcome = "committed"

    def _ended(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is None:
            session.info.pop(self, None)
