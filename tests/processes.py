"""A server in a process of its own, with its workers."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import httpx

import sanic_db_bp
from tests.forkserver import ForkedProcess
from tests.manager import MAY_STOP

PATIENCE = 30.0
"""Seconds that a process may take on a busy machine."""


class Process:
    """A server in a process group of its own, its output in a file.

    Args:
        folder: where it runs.
        command: the module that Python runs, and its arguments.
        environment: what it has in its environment beside what is there.
        cold: whether it is started by a new interpreter, as users do.
    """

    def __init__(
        self, folder: Path, command: list[str], environment: dict[str, str], *, cold: bool = False
    ) -> None:
        self.cold = cold
        self.folder = folder
        self.command = command
        self.environment = environment
        self.port = free_port()
        self._process: subprocess.Popen[bytes] | ForkedProcess
        self.client = httpx.Client(base_url=f"http://127.0.0.1:{self.port}", timeout=5)

    def __enter__(self) -> Self:
        command = [*self.command, "--port", str(self.port)]
        with (self.folder / "output").open("wb") as output:
            self._process = (
                self._start_cold(command, output)
                if self.cold
                else ForkedProcess(
                    command, cwd=self.folder, env=self._environment(), stdout=output.fileno()
                )
            )
        return self

    def _start_cold(self, command: list[str], output: BinaryIO) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.manager", *command],
            cwd=self.folder,
            env=self._environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )

    def _environment(self) -> dict[str, str]:
        inherited = {
            name: value for name, value in os.environ.items() if not name.startswith("SANIC_")
        }
        package = str(Path(sanic_db_bp.__file__).parents[1])
        return {**inherited, "PYTHONPATH": package, "PYTHONUNBUFFERED": "1", **self.environment}

    def __exit__(
        self,
        error: type[BaseException] | None,
        value: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.client.close()
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    @property
    def output(self) -> str:
        """Everything that the server and its workers have written."""
        return (self.folder / "output").read_text(errors="replace")

    @property
    def words(self) -> str:
        """The output as one line, without the frames that Sanic draws round its errors."""
        return " ".join(self.output.replace("▐", " ").replace("│", " ").split())

    def wait_for(self, *texts: str, times: int = 1) -> None:
        """Wait until the server has written a text."""
        self._wait(lambda: all(self.words.count(text) >= times for text in texts), texts)

    def wait_for_end(self) -> int:
        """Wait until the server has ended; returns its exit code."""
        self._wait(lambda: self._process.poll() is not None, "the end")
        assert self._process.returncode is not None
        return self._process.returncode

    def wait_until_served(self, path: str = "/alive") -> None:
        """Wait until the server answers."""

        def answers() -> bool:
            with suppress(httpx.TransportError):
                return self.client.get(path).status_code == 200
            return False

        self._wait(answers, path)

    def _wait(self, condition: Callable[[], bool], what: object) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            if time.monotonic() > deadline:
                raise AssertionError(f"waited in vain for {what}:\n{self.output}")
            time.sleep(0.02)

    def stop(self) -> int:
        """Ask the server to stop; returns its exit code."""
        if self.command[0] == "sanic" and "--single-process" not in self.command:
            self.wait_for(MAY_STOP)
        self._process.terminate()
        return self.wait_for_end()

    def wait_until_nobody_is_left(self) -> None:
        """Wait until no process of the server's group runs any more."""

        def nobody() -> bool:
            command = ["ps", "-eo", "pgid=,stat="]
            listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            processes = [line.split() for line in listing.splitlines()]
            return not any(
                int(group) == self._process.pid and not state.startswith("Z")
                for group, state in processes
            )

        self._wait(nobody, "the end of all workers")


def free_port() -> int:
    """Pick a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
