"""A contender in a process of its own: started, checked, loaded, and looked at from outside."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO

from .load import HOST, Client, ask
from .serve import Arguments
from .workloads import PLAIN, Call

ROOT = Path(__file__).parents[1]
START_WITHIN = 60.0
STOP_WITHIN = 15.0


class ContenderFailed(Exception):
    """A contender did not start, or answered with an error."""


@dataclass(frozen=True)
class Sample:
    """One round of one contender.

    Args:
        requests_per_second: that were answered.
        cpu_us: microseconds of processor time of the server's processes for each request.
        mean_ms: milliseconds of an answer, the mean.
        p99_ms: milliseconds in which 99 of 100 answers came.
        memory_mb: megabytes of the server's processes after the round.
    """

    requests_per_second: float
    cpu_us: float
    mean_ms: float
    p99_ms: float
    memory_mb: float


class RunningServer:
    """The process of a contender, while it serves."""

    def __init__(self, process: subprocess.Popen[bytes], arguments: Arguments, log: IO[bytes]):
        self.arguments = arguments
        self._process = process
        self._log = log
        self._launched = time.perf_counter()

    def wait_until_up(self) -> float:
        """Wait for the first good answer; gives the seconds from the launch until then."""
        end = time.perf_counter() + START_WITHIN
        while time.perf_counter() < end and self._process.poll() is None:
            with suppress(OSError, EOFError):
                if ask(self.arguments.port, PLAIN)[0] == 200:
                    return time.perf_counter() - self._launched
            time.sleep(0.01)
        raise ContenderFailed(f"{self.arguments.name} does not start:\n{self._last_lines()}")

    def answer(self, call: Call) -> bytes:
        """Give the body of the good answer to a request."""
        status, body = ask(self.arguments.port, call)
        if status >= 300:
            raise ContenderFailed(
                f"{self.arguments.name} answers {status} to {call.path}:\n{self._last_lines()}"
            )
        return body

    def measure(self, client: Client, call: Call, connections: int, seconds: float) -> Sample:
        """Load the server once."""
        before = self._cpu_seconds()
        load = client(self.arguments.port, call, connections, seconds)
        spent = self._cpu_seconds() - before
        if load.failed or not load.requests:
            raise ContenderFailed(
                f"{self.arguments.name}: {load.failed} requests to {call.path} failed, "
                f"{load.requests} were answered:\n{self._last_lines()}"
            )
        return Sample(
            requests_per_second=load.requests / load.seconds,
            cpu_us=spent / load.requests * 1e6,
            mean_ms=load.mean_ms,
            p99_ms=load.p99_ms,
            memory_mb=self._memory_mb(),
        )

    def _cpu_seconds(self) -> float:
        """User and system time of all threads that the processes have had."""
        # The clock of clock_getcpuclockid(3) is exact, where /proc/<pid>/stat counts in 10 ms.
        return sum(time.clock_gettime((~pid << 3) | 2) for pid in self._processes())

    def _memory_mb(self) -> float:
        pages = sum(
            int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in self._processes()
        )
        return pages * os.sysconf("SC_PAGE_SIZE") / 1e6

    def _processes(self) -> list[int]:
        """The process with its children: its workers, if there are several."""
        found = [self._process.pid]
        for pid in found:
            for children in Path(f"/proc/{pid}/task").glob("*/children"):
                found += map(int, children.read_text().split())
        return found

    def stop(self) -> None:
        """End the process in good order."""
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_WITHIN)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _last_lines(self) -> str:
        self._log.seek(0)
        return "\n".join(self._log.read().decode(errors="replace").splitlines()[-30:])


def environment() -> dict[str, str]:
    """Give the environment of what is measured: without settings, with bytecode that is kept."""
    left_out = ("SANIC_", "DATABASE_", "PYTHONDONTWRITEBYTECODE")
    return {name: value for name, value in os.environ.items() if not name.startswith(left_out)}


@contextmanager
def launched(
    name: str, url: str, *, pool_size: int = 16, more_routes: int = 0, workers: int = 1
) -> Iterator[RunningServer]:
    """Start a contender in a process of its own, in an environment without settings."""
    arguments = Arguments(name, _free_port(), workers, url, pool_size, more_routes)
    command = [sys.executable, "-m", "benchmarks.serve", json.dumps(asdict(arguments))]
    with TemporaryFile() as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdin=subprocess.DEVNULL, stdout=log, stderr=log
        )
        server = RunningServer(process, arguments, log)
        try:
            yield server
        finally:
            server.stop()


@contextmanager
def serving(name: str, url: str) -> Iterator[RunningServer]:
    """Serve a contender."""
    with launched(name, url) as server:
        server.wait_until_up()
        yield server


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
