"""A small shop for the tests: its tables, its apps, and other ways to look at them."""

import asyncio
import gc
import json
import logging
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import httpx
import pytest
from sanic import Sanic
from sqlalchemy import (
    Connection,
    ForeignKeyConstraint,
    String,
    select,
    text,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.pool import NullPool, Pool

from sanic_db_bp import DatabaseBlueprint
from tests.servers import blocking_engine
from tests.serving import make_light

Shop = Sanic[Any, Any]

_names = count(1)

_SLOW_QUERIES = {
    "postgresql": "SELECT pg_sleep(5)",
    "mysql": "SELECT SLEEP(5)",
    "sqlite": "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n WHERE x < 500) "
    "SELECT count(nap()) FROM n",
}


class Base(DeclarativeBase):
    pass


class Item(Base):
    __tablename__ = "item"

    id: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(String(100), unique=True)
    stock: Mapped[int] = mapped_column(default=0)


class Part(Base):
    """A part of an item, which need not exist before the COMMIT (MariaDB cannot defer that)."""

    __tablename__ = "part"
    __table_args__ = (
        ForeignKeyConstraint(
            ["item_id"], ["item.id"], deferrable=True, initially="DEFERRED"
        ).ddl_if(callable_=lambda *_, dialect, **__: dialect.name != "mysql"),
    )

    id: Mapped[int] = mapped_column(primary_key=True)
    item_id: Mapped[int]


def make_app(database_url: str, **settings: Any) -> Shop:
    """Make an app of its own name with the shop's tables in the database."""
    app: Shop = Sanic(f"shop-{next(_names)}")
    make_light(app)
    values = {"url": database_url, "create_tables": True, "pool_size": 3, **settings}
    app.blueprint(DatabaseBlueprint(metadata=Base.metadata, **values))
    return app


class Observer:
    """Another client of the database, blocking: for a look in the middle of a request."""

    def __init__(self, database_url: str, *, poolclass: type[Pool] = NullPool) -> None:
        self._engine = blocking_engine(database_url, poolclass=poolclass)
        self.kind = self._engine.url.get_backend_name()
        self._open = 0
        self._looked = 0.0

    def close(self) -> None:
        """Close the connection, if one is kept."""
        self._engine.dispose()

    @contextmanager
    def transaction(self, isolation_level: str | None = None) -> Iterator[Connection]:
        """Open a transaction that is rolled back unless it is committed by hand."""
        with self._engine.connect() as connection:
            if isolation_level is not None:
                connection.execution_options(isolation_level=isolation_level)
            if self.kind == "sqlite":
                connection.exec_driver_sql("BEGIN IMMEDIATE")
            yield connection

    def run(self, statement: str) -> None:
        """Run a statement by itself."""
        with self._engine.connect() as connection:
            connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql(statement)

    def scalar(self, statement: str) -> Any:
        """Give the first value that a statement finds."""
        with self._engine.connect() as connection:
            return connection.exec_driver_sql(statement).scalar()

    def names(self) -> list[str]:
        """Give the names of the items that are stored."""
        with self._engine.connect() as connection:
            return list(connection.scalars(select(Item.name).order_by(Item.id)))

    def open_transactions(self) -> int:
        """Count the transactions that wait for their client or hold a lock."""
        if self.kind == "postgresql":
            return int(
                self.scalar(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid() AND state LIKE 'idle in transaction%%'"
                )
            )
        if self.kind == "mysql":
            # InnoDB makes this table anew only if nobody has read it for 0.1 s.
            if time.monotonic() - self._looked > 0.15:
                self._open = int(
                    self.scalar(
                        "SELECT count(*) FROM information_schema.innodb_trx t JOIN "
                        "information_schema.processlist p ON p.id = t.trx_mysql_thread_id "
                        "WHERE p.db = database()"
                    )
                )
                self._looked = time.monotonic()
            return self._open
        try:
            with self.transaction():
                return 0
        except Exception:
            return 1

    def slow_queries(self) -> int:
        """Count the slow queries that the server runs just now."""
        if self.kind == "postgresql":
            return int(
                self.scalar(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND state = 'active' AND query LIKE 'SELECT pg_sleep%%'"
                )
            )
        return int(
            self.scalar(
                "SELECT count(*) FROM information_schema.processlist WHERE db = database() "
                "AND info LIKE 'SELECT SLEEP%%'"
            )
        )

    def connections(self) -> int:
        """Count the connections of others to this database."""
        if self.kind == "postgresql":
            return int(
                self.scalar(
                    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
                    "AND pid <> pg_backend_pid()"
                )
            )
        return int(
            self.scalar(
                "SELECT count(*) FROM information_schema.processlist WHERE db = database() "
                "AND id <> connection_id()"
            )
        )

    def kill(self, connection_id: int) -> None:
        """End a connection of somebody else."""
        statement = "KILL {}" if self.kind == "mysql" else "SELECT pg_terminate_backend({})"
        self.run(statement.format(connection_id))


async def connection_id(session: AsyncSession) -> int:
    """Give the server's number of the connection of a session."""
    mysql = session.get_bind().dialect.name == "mysql"
    asked = "SELECT connection_id()" if mysql else "SELECT pg_backend_pid()"
    connection = await session.connection()
    return int((await connection.exec_driver_sql(asked)).scalar_one())


async def doom(session: AsyncSession, observer: Observer) -> None:
    """Do something after which the COMMIT of a session's transaction fails."""
    if observer.kind == "mysql":
        observer.kill(await connection_id(session))
    else:
        session.add(Part(item_id=-1))
        await session.flush()


class SlowQuery:
    """A query that takes five seconds, and tells when it is under way."""

    def __init__(self, observer: Observer) -> None:
        self._observer = observer
        self._begun = threading.Event()

    async def run(self, session: AsyncSession) -> None:
        """Run it."""
        if self._observer.kind == "sqlite":
            raw: Any = await (await session.connection()).get_raw_connection()
            await raw.driver_connection.create_function("nap", 0, self._nap)
        await session.execute(text(_SLOW_QUERIES[self._observer.kind]))

    def _nap(self) -> None:
        self._begun.set()
        time.sleep(0.01)

    async def begun(self) -> None:
        """Wait until the database works at it."""
        if self._observer.kind == "sqlite":
            await eventually(self._begun.is_set, within=5)
        else:
            await eventually(lambda: self._observer.slow_queries() == 1, within=5)


def errors(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """Give what was logged as an error or worse."""
    return [record for record in caplog.records if record.levelno >= logging.ERROR]


@contextmanager
def without_garbage_collector() -> Iterator[None]:
    """Nothing may be left to the garbage collector."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def eventually(condition: Callable[[], object], *, within: float = 1.0) -> None:
    """Wait until something is so, or fail."""
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not come about in time"
        await asyncio.sleep(0.01)


def checked_out(app: Shop) -> int:
    """Count the connections that are out of the pool."""
    return int(app.ctx.db.pool_status()["checked_out"])


async def settled(app: Shop, observer: Observer, *, within: float = 1.0) -> None:
    """Wait until no connection is out and no transaction is open."""
    await eventually(lambda: checked_out(app) == 0, within=within)
    await eventually(lambda: observer.open_transactions() == 0, within=within)


@dataclass
class RawClient:
    """A client that can leave whenever it wants."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    def send(self, head: str, body: bytes = b"") -> None:
        """Send a request, or a part of one."""
        lines = [*head.splitlines(), "Host: shop", "", ""]
        self.writer.write("\r\n".join(lines).encode() + body)

    async def answer(self) -> tuple[int, bytes]:
        """Read one answer; the connection stays open."""
        head = await self.reader.readuntil(b"\r\n\r\n")
        lines = head.decode().lower().splitlines()
        length = next((line for line in lines if line.startswith("content-length:")), ":0")
        body = await self.reader.readexactly(int(length.partition(":")[2]))
        return int(lines[0].split()[1]), body

    def leave(self) -> None:
        """Close the connection."""
        self.writer.close()


@asynccontextmanager
async def raw_client(client: httpx.AsyncClient) -> AsyncIterator[RawClient]:
    """Connect to the server of another client."""
    host, port = client.base_url.host, client.base_url.port
    reader, writer = await asyncio.open_connection(host, port)
    try:
        yield RawClient(reader, writer)
    finally:
        writer.close()


Message = dict[str, Any]


@dataclass
class ASGIAnswer:
    """What an app has sent to an ASGI server."""

    messages: list[Message] = field(default_factory=list)

    @property
    def status(self) -> int:
        """The status, or 0 if there was none."""
        starts = [each for each in self.messages if each["type"] == "http.response.start"]
        return int(starts[0]["status"]) if starts else 0

    @property
    def body(self) -> bytes:
        """What there is of the body."""
        return b"".join(each.get("body", b"") for each in self.messages)

    @property
    def complete(self) -> bool:
        """Whether the body was ended."""
        return bool(self.messages) and self.messages[-1].get("more_body", True) is False

    @property
    def json(self) -> Any:
        """The body as JSON."""
        return json.loads(self.body)


class ASGIServer:
    """Calls an app as an ASGI server does, message by message."""

    def __init__(self, app: Shop) -> None:
        self.app = app

    async def request(
        self,
        method: str,
        path: str,
        *received: Message,
        headers: dict[str, str] | None = None,
        send: Callable[[Message], Awaitable[None]] | None = None,
    ) -> ASGIAnswer:
        """Send one request; without messages it has an empty body."""
        answer = ASGIAnswer()
        left = list(received or [{"type": "http.request", "body": b"", "more_body": False}])

        async def receive() -> Message:
            return left.pop(0) if left else {"type": "http.disconnect"}

        async def take(message: Message) -> None:
            if send is not None:
                await send(message)
            answer.messages.append(message)

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": method,
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "query_string": b"",
            "headers": [(k.encode(), v.encode()) for k, v in (headers or {}).items()],
            "client": ("127.0.0.1", 1),
            "server": ("127.0.0.1", 80),
        }
        # A server runs each request in a task of its own.
        await asyncio.get_running_loop().create_task(self.app(scope, receive, take))
        return answer


@asynccontextmanager
async def asgi_serving(app: Shop) -> AsyncIterator[ASGIServer]:
    """Run an app with all its listeners under the ASGI protocol."""
    make_light(app)
    inbox: asyncio.Queue[Message] = asyncio.Queue()
    outbox: asyncio.Queue[Message] = asyncio.Queue()

    async def say(message: str) -> None:
        await inbox.put({"type": f"lifespan.{message}"})
        answer = await asyncio.wait_for(outbox.get(), 10)
        assert answer["type"] == f"lifespan.{message}.complete", answer

    lifespan = asyncio.create_task(app({"type": "lifespan"}, inbox.get, outbox.put))
    async with AsyncExitStack() as stack:
        stack.push_async_callback(asyncio.wait_for, lifespan, 10)
        stack.push_async_callback(say, "shutdown")
        await say("startup")
        yield ASGIServer(app)
