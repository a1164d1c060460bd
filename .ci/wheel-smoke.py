"""Serve the README's first sample with the installed wheel and ask it for one route."""

import os
import re
import socket
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.error import HTTPError
from urllib.request import urlopen

ROUTE = "/items/1"
# The sample's table is there and empty.
EXPECTED_STATUS = 404
START_TIMEOUT = 30.0


def main() -> None:
    """Leave with an error unless the sample answers as expected."""
    with TemporaryDirectory() as folder:
        Path(folder, "sample.py").write_text(first_sample(Path(sys.argv[1])))
        port = free_port()
        server = serve(folder, port)
        try:
            status = wait_for_status(server, f"http://127.0.0.1:{port}{ROUTE}")
        finally:
            # Sanic can miss a SIGTERM that comes right after its start.
            server.kill()
            server.wait()
    if status != EXPECTED_STATUS:
        raise SystemExit(f"{ROUTE} answered {status}, not {EXPECTED_STATUS}")
    print(f"the README's sample works with the wheel: {ROUTE} answered {status}")


def first_sample(readme: Path) -> str:
    """Take the first block of Python code out of a Markdown file."""
    block = re.search(r"^```python\n(.*?)^```", readme.read_text(), re.DOTALL | re.MULTILINE)
    if not block:
        raise SystemExit(f"no Python code in {readme}")
    return block[1]


def free_port() -> int:
    """Pick a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def serve(folder: str, port: int) -> subprocess.Popen[bytes]:
    """Start the sample, in a folder without the project's source, on a SQLite file of its own."""
    settings = {"SANIC_DB_URL": f"sqlite:///{folder}/sample.db", "SANIC_DB_CREATE_TABLES": "true"}
    options = ["--single-process", "--host=127.0.0.1", f"--port={port}"]
    command = [sys.executable, "-m", "sanic", "sample:app", *options]
    return subprocess.Popen(command, cwd=folder, env=os.environ | settings)


def wait_for_status(server: subprocess.Popen[bytes], url: str) -> int:
    """Ask until the server answers."""
    deadline = time.monotonic() + START_TIMEOUT
    while server.poll() is None and time.monotonic() < deadline:
        try:
            with urlopen(url, timeout=START_TIMEOUT) as response:
                status: int = response.status
                return status
        except HTTPError as error:
            return error.code
        except OSError:
            time.sleep(0.1)
    raise SystemExit(f"the sample did not come up (exit status {server.poll()})")


main()
