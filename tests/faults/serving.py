"""The app of ``tests.faults.app``, served in a process of its own; its whole output is judged."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import httpx

from tests.faults.databases import SECRET, Target
from tests.forkserver import ForkedProcess
from tests.manager import MAY_STOP
from tests.servers import HOST, free_port
from tests.shop import eventually

ROOT = Path(__file__).parents[2]
APP = "tests.faults.app:app"
START_WITHIN = 120.0
STOP_WITHIN = 60.0
REST_WITHIN = 8.0
"""Seconds; far less on a machine that does nothing else, and what leaks stays for longer."""
FORGET_WITHIN = 10.0
"""Seconds; asyncio keeps cancelled timers, and so the context of a request, until they are due."""

Way = Literal["native", "workers", "asgi"]

COMMANDS: dict[Way, tuple[str, ...]] = {
    "native": ("sanic", "--single-process", "--no-access-logs"),
    "workers": ("sanic", "--workers=2", "--no-access-logs"),
    "asgi": ("uvicorn", "--no-access-log", "--timeout-graceful-shutdown=2"),
}
READY: dict[Way, dict[str, int]] = {
    "native": {"ready to serve": 1},
    "workers": {"ready to serve": 2, MAY_STOP: 1},
    "asgi": {"Uvicorn running": 1},
}
"""What is logged by then, and how often."""

NEVER = (
    SECRET,
    "garbage collector is trying to clean up",
    "Task was destroyed",
    "never retrieved",
    "never awaited",
    "ResourceWarning",
)
"""What no test may see in an app's output."""


class AppServer:
    """A server process: its log, its state, and the signals that end it.

    Args:
        way: how Sanic is run: ``native`` in one process, two ``workers``, or ``asgi`` (uvicorn).
        app: the module of the app, and its name there.
        environment: the settings, by their names in the environment.
    """

    def __init__(self, way: Way, app: str, environment: dict[str, str]) -> None:
        self.way = way
        self.port = free_port()
        self.log: list[str] = []
        self._seen = 0
        self._news = threading.Condition()
        module, *options = COMMANDS[way]
        address = (f"--host={HOST}", f"--port={self.port}")
        self.process = ForkedProcess(
            [module, app, *options, *address],
            cwd=ROOT,
            env=os.environ | {"PYTHONUNBUFFERED": "1", **environment},
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @property
    def url(self) -> str:
        """Where the app answers."""
        return f"http://{HOST}:{self.port}"

    def _read(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as output:
            for line in output:
                with self._news:
                    self.log.append(line.rstrip("\n"))
                    self._news.notify_all()

    async def wait_for(self, text: str, *, count: int = 1, within: float = START_WITHIN) -> None:
        """Wait until a text was logged so many times."""
        await asyncio.to_thread(self._wait_for, text, count, within)

    def _wait_for(self, text: str, count: int, within: float) -> None:
        deadline = time.monotonic() + within
        with self._news:
            while sum(line.count(text) for line in self.log) < count:
                left = deadline - time.monotonic()
                assert left > 0, f"not logged: {text}"
                assert self.process.poll() is None, f"ended with {self.process.returncode}"
                self._news.wait(min(left, 0.2))

    def new_lines(self) -> list[str]:
        """Return what was logged since the last call."""
        with self._news:
            lines = self.log[self._seen :]
            self._seen += len(lines)
        return lines

    def client(self, **options: Any) -> httpx.AsyncClient:
        """Return a client of the app."""
        return httpx.AsyncClient(base_url=self.url, timeout=20, verify=False, **options)

    async def status(self) -> dict[str, Any]:
        """Ask a worker how it is; see the app's ``/status``."""
        async with self.client() as client:
            status: dict[str, Any] = (await client.get("/status")).json()
            return status

    async def forgotten(self, path: str = "/", *, within: float = FORGET_WITHIN) -> None:
        """Wait until no request whose path begins so is in memory, but the one that asks."""
        deadline = time.monotonic() + within
        async with self.client() as client:
            while kept := [
                each for each in (await client.get("/requests")).json() if each.startswith(path)
            ]:
                assert time.monotonic() < deadline, f"still in memory: {kept}"
                await asyncio.sleep(0.1)

    async def at_rest(self, *, within: float = REST_WITHIN) -> dict[str, Any]:
        """Wait until nothing is checked out and no unit of work is open; returns the status."""
        deadline = time.monotonic() + within
        async with self.client() as client:
            while True:
                status: dict[str, Any] = (await client.get("/status")).json()
                if status["checked_out"] == status["live"] == 0:
                    return status
                assert time.monotonic() < deadline, f"still in use: {status}"
                await asyncio.sleep(0.02)

    def terminate(self) -> None:
        """Ask the server to stop."""
        self.process.send_signal(signal.SIGTERM)

    async def wait(self, within: float = STOP_WITHIN) -> int:
        """Wait until the server has ended; returns its exit status."""
        return await asyncio.to_thread(self._wait, within)

    def _wait(self, within: float) -> int:
        code = self.process.wait(within)
        self._reader.join(within)
        return code

    def kill(self) -> None:
        """End the server and its workers at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._wait(STOP_WITHIN)

    def judge(self, *, tracebacks: bool) -> None:
        """Look through all that was logged for what must never be there."""
        never = NEVER if tracebacks else (*NEVER, "Traceback (most recent call last)")
        bad = [line for line in self.log if any(text in line for text in never)]
        assert bad == []


@dataclass(frozen=True)
class Served:
    """The app, and the database behind it."""

    server: AppServer
    target: Target

    @property
    def writers(self) -> int:
        """How many transactions can write at once."""
        return 1 if self.target.is_file else 5

    async def is_clean(self, *, within: float = REST_WITHIN) -> None:
        """Wait until nothing is in use any more, neither in the app nor in the database."""
        await self.server.at_rest(within=within)
        await eventually(lambda: self.target.observer.open_transactions() == 0, within=within)

    def stored(self, prefix: str) -> list[str]:
        """Return the rows whose names begin so."""
        return [name for name in self.target.observer.names() if name.startswith(prefix)]

    async def committed(self, prefix: str) -> list[str]:
        """Return the requests whose names begin so of which ``on_commit`` was called."""
        async with self.server.client() as client:
            names: list[str] = (await client.get("/commits")).json()
        return [name for name in names if name.startswith(prefix)]


@asynccontextmanager
async def served(
    target: Target,
    way: Way = "native",
    *,
    app: str = APP,
    tracebacks: bool = False,
    **settings: object,
) -> AsyncIterator[AppServer]:
    """Serve the app on a database; at the end it must stop in order, with a clean log.

    Args:
        target: the database.
        way: how Sanic is run.
        app: the module of the app, and its name there.
        tracebacks: whether the test provokes errors that Sanic logs with a traceback.
        **settings: for the environment, in lower case and without ``SANIC_``.
    """
    values = {
        "SANIC_DB_URL": target.url,
        "SANIC_DB_PASSWORD": SECRET,
        "SANIC_DB_CREATE_TABLES": "true",
        "SANIC_GRACEFUL_SHUTDOWN_TIMEOUT": "1",
        **{f"SANIC_{name.upper()}": str(value) for name, value in settings.items()},
    }
    server = AppServer(way, app, values)
    try:
        for text, count in READY[way].items():
            await server.wait_for(text, count=count)
        yield server
        if server.process.poll() is None:
            server.terminate()
        # uvicorn ends itself with the signal that it got.
        assert await server.wait() in (0, -signal.SIGTERM)
        server.judge(tracebacks=tracebacks)
    except BaseException:
        print(*server.log, sep="\n")
        raise
    finally:
        server.kill()
