"""A line to a database that takes time, and counts its round trips: a process of its own."""

from __future__ import annotations

import asyncio
import json
import selectors
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial

from sqlalchemy import make_url

from .load import HOST


@dataclass(frozen=True)
class Line:
    """Where a line leads, and how long each direction takes, in seconds."""

    host: str
    port: int
    delay: float = 0.0


class Proxy:
    """Hands on what it reads, in order, after the delay.

    A round trip is something from the client after something from the server: what is sent in one
    go, or without waiting for an answer, counts once.
    """

    def __init__(self, line: Line) -> None:
        self._line = line
        self.round_trips = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hand on what one client sends, and its answers."""
        there, back = await asyncio.open_connection(self._line.host, self._line.port)
        waits_for_client = True

        def asked() -> None:
            nonlocal waits_for_client
            self.round_trips += waits_for_client
            waits_for_client = False

        def answered() -> None:
            nonlocal waits_for_client
            waits_for_client = True

        await asyncio.gather(
            self._hand_on(reader, back, asked), self._hand_on(there, writer, answered)
        )

    async def _hand_on(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        seen: Callable[[], None],
    ) -> None:
        loop = asyncio.get_running_loop()
        try:
            while data := await source.read(65536):
                seen()
                if self._line.delay:
                    loop.call_later(self._line.delay, target.write, data)
                else:
                    target.write(data)
        except ConnectionError:
            pass
        finally:
            loop.call_later(self._line.delay, target.close)


async def run(line: Line) -> None:
    """Print the port, then the round trips so far for each line that is read."""
    proxy = Proxy(line)
    server = await asyncio.start_server(proxy.serve, HOST)
    print(server.sockets[0].getsockname()[1], flush=True)
    loop = asyncio.get_running_loop()
    while await loop.run_in_executor(None, sys.stdin.readline):
        print(proxy.round_trips, flush=True)


def main(line: Line) -> None:
    """Run until the standard input ends.

    Of the selectors only `select` waits for less than a millisecond.
    """
    precise = partial(asyncio.SelectorEventLoop, selectors.SelectSelector())
    with asyncio.Runner(loop_factory=precise) as runner:
        runner.run(run(line))


class RunningProxy:
    """The process of a proxy, seen from outside."""

    def __init__(self, url: str, process: subprocess.Popen[str]) -> None:
        self._process = process
        port = int(self._next_line())
        self.url = make_url(url).set(host=HOST, port=port).render_as_string(hide_password=False)

    def round_trips(self) -> int:
        """Count the round trips so far."""
        assert self._process.stdin is not None
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        return int(self._next_line())

    def _next_line(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline()


@contextmanager
def proxied(url: str, *, delay: float = 0.0) -> Iterator[RunningProxy]:
    """Put a proxy before the database of a URL."""
    there = make_url(url)
    line = Line(there.host or HOST, there.port or 5432, delay)
    command = [sys.executable, "-m", "benchmarks.proxy", json.dumps(asdict(line))]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            yield RunningProxy(url, process)
        finally:
            process.terminate()


if __name__ == "__main__":
    main(Line(**json.loads(sys.argv[1])))
