"""Processes that need not import everything anew: forked from one that has imported it.

An interpreter takes more than a second to import what a served app needs, and the suite starts
hundreds of them. Between this process and each new one stands another one that waits for its end.
"""

from __future__ import annotations

import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import IO

from tests.manager import tell_when_it_may_stop

MODULES = (
    "aiomysql",
    "asyncmy",
    "asyncpg",
    "psycopg",
    "sanic.cli.app",
    "sanic_ext.extensions.openapi.blueprint",
    "sanic_db_bp.contrib.migrations",
    "sqlalchemy.dialects.mysql",
    "sqlalchemy.dialects.postgresql",
    "sqlalchemy.dialects.sqlite",
    "sqlalchemy.ext.asyncio",
    "tests.shop",
    "uvicorn.main",
)
"""None that keeps a part of the environment, and none with an app."""

ROOT = Path(__file__).parents[1]
MESSAGE = 2**20


class ForkServer:
    """The process that is forked. It ends with the one that has started it."""

    def __init__(self) -> None:
        self._socket, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with other:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", __name__, str(other.fileno())],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                pass_fds=[other.fileno()],
                start_new_session=True,
            )

    def stop(self) -> None:
        """End it; the processes that it has forked go on."""
        self._socket.close()
        self._process.wait()

    def fork(
        self, arguments: list[str], cwd: Path, environment: dict[str, str], *, output: int
    ) -> socket.socket:
        """Start ``python -m MODULE ...``; returns the socket that tells its number and its end."""
        told, teller = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        request = json.dumps([arguments, str(cwd), environment]).encode()
        with teller:
            socket.send_fds(self._socket, [request], [teller.fileno(), output])
        return told


@cache
def fork_server() -> ForkServer:
    """Give the process to fork from, which is started when it is first needed."""
    return ForkServer()


class ForkedProcess:
    """``python -m MODULE ...``, with what the tests use of the interface of ``subprocess.Popen``.

    Args:
        arguments: the module and its arguments.
        cwd: where it runs.
        env: its environment.
        stdout: the file for what it writes, also to stderr; ``PIPE`` unless given.
    """

    def __init__(
        self, arguments: list[str], *, cwd: Path, env: dict[str, str], stdout: int | None = None
    ) -> None:
        self.returncode: int | None = None
        self.stdout: IO[str] | None = None
        output = stdout
        if output is None:
            source, output = os.pipe()
            self.stdout = os.fdopen(source, errors="replace")
        self._socket = fork_server().fork(arguments, cwd, env, output=output)
        if stdout is None:
            os.close(output)
        self.pid = self._told()

    def _told(self) -> int:
        number: int = json.loads(self._socket.recv(MESSAGE))
        return number

    def poll(self) -> int | None:
        """Give the exit status, or nothing while it runs."""
        with suppress(subprocess.TimeoutExpired):
            self.wait(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the exit status."""
        if self.returncode is None:
            if not select.select([self._socket], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("forked", timeout or 0)
            self.returncode = os.waitstatus_to_exitcode(self._told())
            self._socket.close()
        return self.returncode

    def end(self, timeout: float) -> tuple[int, str]:
        """Wait for the end; returns the exit status and all output, of which there is little."""
        assert self.stdout is not None
        with self.stdout:
            return self.wait(timeout), self.stdout.read()

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


def serve(control: socket.socket) -> str:
    """Fork for each request; returns in the new process alone, the module that it has to run."""
    # Nobody waits for the processes that wait.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, MESSAGE, 2)
        if not message:
            sys.exit()
        if os.fork() == 0:
            control.close()
            break
        for each in descriptors:
            os.close(each)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    teller, output = socket.socket(fileno=descriptors[0]), descriptors[1]
    if process := os.fork():
        os.close(output)
        _tell_the_end_of(process, teller)
    # A whole group, so that no worker stays behind.
    os.setsid()
    with teller:
        teller.send(json.dumps(os.getpid()).encode())
    for standard in (1, 2):
        os.dup2(output, standard)
    os.close(output)
    (module, *arguments), cwd, environment = json.loads(message)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    sys.path.insert(0, cwd)
    sys.argv[1:] = arguments
    return str(module)


def _tell_the_end_of(process: int, teller: socket.socket) -> None:
    _, status = os.waitpid(process, 0)
    # The test may have ended.
    with suppress(BrokenPipeError):
        teller.send(json.dumps(status).encode())
    os._exit(0)


def main() -> None:
    """Import, and do what is asked."""
    control = socket.socket(fileno=int(sys.argv[1]))
    for name in MODULES:
        import_module(name)
    tell_when_it_may_stop()
    # What is never collected is not copied.
    gc.collect()
    gc.freeze()
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    runpy.run_module(serve(control), run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
