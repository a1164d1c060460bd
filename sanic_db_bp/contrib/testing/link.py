"""The one connection of a test, lent in turn to all who believe that they have their own."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from sqlalchemy import Connection, MetaData
from sqlalchemy.engine import URL, Dialect
from sqlalchemy.pool import NullPool

from ...bridge import run_in_bridge
from ...engine import make_engine
from ...exceptions import SanicDBError
from .counting import uncounted
from .savepoints import SAVEPOINTS

if TYPE_CHECKING:
    from ...settings import DatabaseSettings
    from ...unit_of_work import UnitOfWork
    from .lent import LentConnection
    from .scratch import Provision

T = TypeVar("T")

OUTERMOST = "sanic_db_test"
"""The savepoint that is there as long as nothing has ended the test's transaction."""


class TestTransactionError(SanicDBError):
    """The transaction of a test cannot stand for what the app does."""

    __test__ = False
    entry = "one-connection-for-a-test"


@dataclass(frozen=True)
class Around:
    """Where a statement comes from: the task, and the units of work that it runs inside of."""

    task: asyncio.Task[Any] | None
    units: frozenset[UnitOfWork]


@dataclass
class Outcome:
    """What a statement has brought."""

    description: Sequence[Any] | None = None
    rows: deque[Any] = field(default_factory=deque)
    rowcount: int = -1
    lastrowid: Any = None


class Link:
    """One connection to one database, with a savepoint for each transaction of the app.

    Everything runs in the loop of the thread in which the connection was opened, one thing at a
    time. Savepoints are a stack: what is on top has its turn, and so has what runs inside of it;
    all others wait.

    Args:
        settings: of the app's database.
        url: the configured one; what is used is what ``provision`` makes of it.
        provision: gives the database of the tests.
        schema: fills it when it is new.
    """

    def __init__(
        self,
        settings: DatabaseSettings,
        url: URL,
        provision: Provision,
        schema: Callable[[Connection], object] | None,
    ) -> None:
        self.testing = False
        self.problems: list[str] = []
        self._settings = settings
        self._url = url
        self._provision = provision
        self._schema = schema
        self._savepoints = SAVEPOINTS[url.get_backend_name()](self._fetch)
        self._turn = asyncio.Condition()
        self._stack: list[LentConnection] = []
        self._begun = False
        self._kept = False
        self._tables: set[MetaData] = set()
        self._resources: ExitStack | None = None
        self.connection: Any = None

    async def in_turn(self, lent: LentConnection, around: Around, job: Callable[[], T]) -> T:
        """Run something when its turn has come; in the bridge, and nothing else meanwhile.

        Raises:
            TestTransactionError: it did not come within ``POOL_TIMEOUT``.
        """
        async with self._turn:
            await run_in_bridge(self._roll_back_abandoned)
            try:
                async with asyncio.timeout(self._settings.pool_timeout):
                    await self._turn.wait_for(lambda: self._may_run(lent, around))
            except TimeoutError:
                raise self._noted(
                    TestTransactionError(self._who_waits(), entry="one-connection-for-a-test")
                ) from None
            return await self._alone(job)

    async def at_once(self, job: Callable[[], T]) -> T:
        """Run something in the bridge, whoever's turn it is; nothing else runs meanwhile."""
        async with self._turn:
            return await self._alone(job)

    async def _alone(self, job: Callable[[], T]) -> T:
        try:
            return await run_in_bridge(job)
        finally:
            self._turn.notify_all()

    def _may_run(self, lent: LentConnection, around: Around) -> bool:
        if not self._stack or self._stack[-1] is lent or lent.closed:
            return True
        top = self._stack[-1]
        if top.unit is not None:
            return top.unit in around.units or top.unit is lent.unit
        return top.task is not None and top.task is around.task

    def _roll_back_abandoned(self) -> None:
        """A server that was stopped has left its tasks where they were."""
        for lent in list(self._stack):
            if lent in self._stack and lent.task is not None and lent.task.get_loop().is_closed():
                self.rollback(lent)

    def _noted(self, error: TestTransactionError) -> TestTransactionError:
        """Let the test fail for it, whoever catches it."""
        self.problems.append(str(error))
        return error

    def _who_waits(self) -> str:
        began_at = self._stack[-1].began_at if self._stack else ""
        return (
            f"all that a test does shares one connection, and for {self._settings.pool_timeout:g} "
            f"s (POOL_TIMEOUT) it was in use by the transaction that began here:\n{began_at}"
            "End it, by a commit or rollback, before something else has to wait for it."
        )

    def _open(self) -> None:
        if self._resources is not None:
            return
        with ExitStack() as stack:
            self._url = stack.enter_context(self._provision(self._url))
            # Nothing waits for a free connection, and a debugger may take its time.
            options = {**self._settings.engine_options, "poolclass": NullPool}
            settings = self._settings.model_copy(
                update={"engine_options": options, "idle_in_transaction_timeout": 0}
            )
            self._engine = make_engine(settings, self._url, name="tests").sync_engine
            if self._schema is not None:
                with self._engine.begin() as connection:
                    self._schema(connection)
            fairy = self._engine.raw_connection()
            stack.callback(fairy.close)
            self.connection = fairy.dbapi_connection
            self._resources = stack.pop_all()

    def close(self) -> None:
        """Close the connection, and drop the database if it was made for the tests."""
        if self._resources is not None:
            self._resources.close()

    def initialize(self, dialect: Dialect) -> None:
        """Let an engine's dialect learn what it asks a server at its first connect."""
        self._open()
        with uncounted(), self._engine.connect() as connection:
            # No transaction: SQLite has one writer.
            dialect.initialize(connection.execution_options(isolation_level="AUTOCOMMIT"))

    def create_tables(self, metadata: MetaData) -> None:
        """Create the missing tables, once and for all tests."""
        self._open()
        if metadata in self._tables:
            return
        if not self._kept and not self._stack:
            self._end(self.connection.rollback)
        if self._begun:
            raise self._noted(
                TestTransactionError(
                    "tables cannot be created once the test has begun to use the database: start "
                    "the server first, or create them in the fixture 'sanic_db_schema'",
                    entry="tables-too-late",
                )
            )
        with self._engine.begin() as connection:
            metadata.create_all(connection)
        self._tables.add(metadata)

    def execute(
        self, lent: LentConnection, statement: str, parameters: Any, *, many: bool, schema: float
    ) -> Outcome:
        """Run a statement of the app, in the savepoint that stands for its transaction."""
        self._open()
        self._check(lent)
        if lent.autocommit and lent not in self._stack:
            with self._by_itself(lent):
                return self._run(statement, parameters, many=many, schema=schema)
        if lent not in self._stack:
            self._begin(lent)
        return self._run(statement, parameters, many=many, schema=schema)

    def _check(self, lent: LentConnection) -> None:
        if lent.closed:
            raise TestTransactionError(
                "the connection was given back already", entry="connection-given-back"
            )
        if lent.undone:
            raise self._noted(
                TestTransactionError(
                    "a transaction was undone with the one around it, inside of which it began",
                    entry="undone-with-the-one-around",
                )
            )

    @contextmanager
    def _by_itself(self, lent: LentConnection) -> Iterator[None]:
        """A transaction around one statement, which is undone if it was only to read."""
        self._begin(lent)
        try:
            if lent.read_only:
                self._savepoints.read_only()
            yield
        except BaseException:
            self.rollback(lent)
            raise
        else:
            (self.rollback if lent.read_only else self.commit)(lent)
        finally:
            if lent.read_only:
                self._savepoints.read_write()

    def _run(self, statement: str, parameters: Any, *, many: bool, schema: float) -> Outcome:
        cursor = self.connection.cursor()
        try:
            if hasattr(cursor, "_invalidate_schema_cache_asof"):
                cursor._invalidate_schema_cache_asof = schema
            (cursor.executemany if many else cursor.execute)(statement, parameters)
            return Outcome(
                cursor.description,
                deque(cursor.fetchall() if cursor.description else ()),
                cursor.rowcount,
                getattr(cursor, "lastrowid", None),
            )
        finally:
            cursor.close()

    def _fetch(self, statement: str) -> list[Any]:
        return list(self._run(statement, None, many=False, schema=0).rows)

    def _begin(self, lent: LentConnection) -> None:
        if not self._begun:
            if self._savepoints.begin:
                self._fetch(self._savepoints.begin)
            self._fetch(f"SAVEPOINT {OUTERMOST}")
            self._begun = True
        lent.number = self._stack[-1].number + 1 if self._stack else 1
        self._fetch(f"SAVEPOINT {lent.savepoint}")
        self._stack.append(lent)

    def commit(self, lent: LentConnection) -> None:
        """Keep what was done, unless something around it is rolled back."""
        self._check(lent)
        if self._stack[-1] is not lent:
            # What began inside of it goes on, in a savepoint above.
            self._forget(lent)
            self._kept = True
            return
        try:
            if len(self._stack) == 1:
                self._savepoints.check_deferred()
            self._fetch(f"RELEASE SAVEPOINT {lent.savepoint}")
        except BaseException:
            self.rollback(lent)
            raise
        self._forget(lent)
        self._kept = True
        if not self.testing and not self._stack:
            self._end(self.connection.commit)

    def rollback(self, lent: LentConnection) -> None:
        """Undo what was done, and all that began inside of it."""
        if lent not in self._stack:
            return
        savepoint = lent.savepoint
        for inner in self._stack[self._stack.index(lent) + 1 :]:
            self._forget(inner, undone=True)
        self._forget(lent)
        self._fetch(f"ROLLBACK TO SAVEPOINT {savepoint}")
        self._fetch(f"RELEASE SAVEPOINT {savepoint}")
        if not self.testing and not self._stack:
            self._end(self.connection.commit if self._kept else self.connection.rollback)

    def _forget(self, lent: LentConnection, *, undone: bool = False) -> None:
        self._stack.remove(lent)
        lent.number = 0
        lent.undone = undone

    def _end(self, end: Callable[[], None]) -> None:
        self._begun = self._kept = False
        end()

    def end_test(self) -> None:
        """Undo all that the test did."""
        self.testing = False
        for lent in list(self._stack):
            self._forget(lent, undone=True)
        if not self._begun:
            return
        error = self._undo()
        self._end(self.connection.rollback)
        if error is not None:
            self._noted(
                TestTransactionError(
                    "something has ended the test's transaction, and what it did is there for good "
                    f"({error}). In MariaDB and MySQL every statement that creates or alters a "
                    "table does so, and everywhere a COMMIT that is written as SQL.",
                    entry="test-transaction-ended",
                )
            )

    def _undo(self) -> Exception | None:
        try:
            self._fetch(f"ROLLBACK TO SAVEPOINT {OUTERMOST}")
        except Exception as error:
            return error
        return None
