"""A proxy between an app and its database, to make the faults of a network on purpose."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import make_url
from sqlalchemy.ext.asyncio import AsyncSession

from tests.shop import eventually


class Proxy:
    """Delays, holds back, freezes, cuts, refuses and counts what goes through it.

    A SQLite database has no line: there the COMMIT itself can be held back, and nothing else.

    Args:
        database_url: the database behind it.
    """

    def __init__(self, database_url: str) -> None:
        self._url = make_url(database_url)
        self._server: asyncio.Server | None = None
        self._port = 0
        self._lines: set[_Line] = set()
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._held = asyncio.Event()
        self._let_go = threading.Event()
        self._let_go.set()
        self._hold = False
        self.there = 0.0
        """Seconds that each message to the database is late."""
        self.back = 0.0
        """Seconds that each answer is late."""
        self.commit = 0.0
        """Seconds that the answer to a COMMIT is late, beside that."""
        self.round_trips = 0
        """How many times an answer followed a question, on all lines together."""

    @property
    def url(self) -> str:
        """The URL of the database behind the proxy."""
        if self.is_file:
            return self._url.render_as_string(hide_password=False)
        return self._url.set(port=self._port).render_as_string(hide_password=False)

    @property
    def is_file(self) -> bool:
        """Whether the database is a file."""
        return self._url.host is None

    @property
    def lines(self) -> int:
        """How many connections go through it."""
        return len(self._lines)

    async def up(self) -> None:
        """Let connections through."""
        if not self.is_file:
            self._server = await asyncio.start_server(self._serve, "127.0.0.1", self._port)
            self._port = self._server.sockets[0].getsockname()[1]

    async def down(self) -> None:
        """Cut every connection and refuse new ones."""
        self.release()
        self.thaw()
        if self._server is not None:
            self._server.close()
        self.cut()

    def cut(self) -> None:
        """Cut every connection; new ones are let through."""
        for line in list(self._lines):
            line.cut()

    def say(self, data: bytes) -> None:
        """Send something to the app that it has not asked for, on every connection."""
        for line in self._lines:
            line.say(data)

    def freeze(self) -> None:
        """Let nothing through any more, and close nothing, as a network that lost its way."""
        self._thawed.clear()

    def thaw(self) -> None:
        """Let everything through again, what was sent meanwhile too."""
        self._thawed.set()

    def hold_commits(self) -> None:
        """Hold back the answer to the next COMMIT."""
        self._held.clear()
        self._hold = True
        self._let_go.clear()

    async def held(self) -> None:
        """Wait until a COMMIT is under way."""
        await asyncio.wait_for(self._held.wait(), 5)

    def release(self) -> None:
        """Let the answer through."""
        self._hold = False
        self._let_go.set()

    async def watch(self, session: AsyncSession) -> None:
        """Have the next COMMIT of a file held back."""
        if self.is_file:
            loop = asyncio.get_running_loop()

            def trace(statement: str) -> None:
                if self._hold and statement == "COMMIT":
                    loop.call_soon_threadsafe(self._held.set)
                    self._let_go.wait(5)

            raw: Any = await (await session.connection()).get_raw_connection()
            await raw.driver_connection.set_trace_callback(trace)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._thawed.wait()
            back = await asyncio.open_connection(self._url.host, self._url.port)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()
            return
        line = _Line(self, (reader, writer), back)
        self._lines.add(line)
        try:
            await line.run()
        finally:
            self._lines.discard(line)

    async def before_database(self, line: _Line, data: bytes) -> None:
        """Wait before a message goes to the database."""
        # MariaDB's drivers begin with SET AUTOCOMMIT.
        line.commits = b"COMMIT" in data.replace(b"AUTOCOMMIT", b"")
        if line.commits and self._hold:
            line.held = True
            self._held.set()
        line.asked = True
        await asyncio.sleep(self.there)
        await self._thawed.wait()

    async def before_app(self, line: _Line) -> None:
        """Wait before an answer goes to the app."""
        self.round_trips += line.asked
        line.asked = False
        await asyncio.sleep(self.back + (self.commit if line.commits else 0))
        line.commits = False
        if line.held:
            await eventually(self._let_go.is_set, within=5)
            line.held = False
        await self._thawed.wait()


Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Line:
    """One connection through the proxy."""

    def __init__(self, proxy: Proxy, app: Stream, database: Stream) -> None:
        self._proxy = proxy
        self._app = app
        self._database = database
        self.asked = False
        self.commits = False
        self.held = False

    async def run(self) -> None:
        """Carry what comes, until either side leaves."""
        try:
            await asyncio.gather(self._ask(), self._answer())
        except (ConnectionError, asyncio.CancelledError):
            pass
        finally:
            self.cut()

    def cut(self) -> None:
        """Close both sides at once."""
        for _, writer in (self._app, self._database):
            writer.transport.abort()

    def say(self, data: bytes) -> None:
        """Send something to the app."""
        self._app[1].write(data)

    async def _ask(self) -> None:
        source, target = self._app[0], self._database[1]
        while data := await source.read(65536):
            await self._proxy.before_database(self, data)
            target.write(data)
        target.close()

    async def _answer(self) -> None:
        source, target = self._database[0], self._app[1]
        while data := await source.read(65536):
            await self._proxy.before_app(self)
            target.write(data)
        target.close()


@asynccontextmanager
async def proxied(database_url: str) -> AsyncIterator[Proxy]:
    """Put a proxy before a database."""
    proxy = Proxy(database_url)
    await proxy.up()
    try:
        yield proxy
    finally:
        await proxy.down()
