"""The load: wrk, or a client in Python where wrk is missing."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .workloads import Call

HOST = "127.0.0.1"
ANSWER_WITHIN = 10.0
"""Seconds after which a request counts as failed."""

SCRIPT = """
wrk.method = "{method}"
wrk.body = {body}
wrk.headers["Content-Type"] = {content_type}
done = function(summary, latency)
  local errors = summary.errors
  local failed = errors.connect + errors.read + errors.write + errors.status + errors.timeout
  io.write(string.format(
    '\\nRESULT {{"requests": %d, "failed": %d, "seconds": %f, "mean_ms": %f, "p99_ms": %f}}\\n',
    summary.requests, failed, summary.duration / 1e6, latency.mean / 1e3,
    latency:percentile(99) / 1e3))
end
"""


@dataclass(frozen=True)
class Load:
    """What came of a load.

    Args:
        requests: that were answered.
        failed: of them, or besides them: an error of the connection, a status of 400 or more.
        seconds: that it took.
        mean_ms: milliseconds of an answer, the mean.
        p99_ms: milliseconds in which 99 of 100 answers came.
    """

    requests: int
    failed: int
    seconds: float
    mean_ms: float
    p99_ms: float


Client = Callable[[int, Call, int, float], Load]
"""Loads a port with a request, so many in flight, for so many seconds."""


def default_client() -> Client:
    """Give wrk if there is one."""
    return wrk if shutil.which("wrk") else python_client


def wrk(port: int, call: Call, connections: int, seconds: float) -> Load:
    """Load a server with wrk, in one thread."""
    with tempfile.NamedTemporaryFile("w", suffix=".lua") as script:
        body = json.dumps(call.body) if call.body else "nil"
        content_type = '"application/json"' if call.body else "nil"
        script.write(SCRIPT.format(method=call.method, body=body, content_type=content_type))
        script.flush()
        output = _run_wrk(Path(script.name), port, call, connections, seconds)
    return Load(**json.loads(output.rpartition("RESULT ")[2]))


def _run_wrk(script: Path, port: int, call: Call, connections: int, seconds: float) -> str:
    command = [
        "wrk",
        "--threads=1",
        f"--connections={connections}",
        # wrk takes whole seconds.
        f"--duration={max(1, round(seconds))}s",
        f"--timeout={round(ANSWER_WITHIN)}s",
        f"--script={script}",
        f"http://{HOST}:{port}{call.path}",
    ]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=seconds + 60)
    if finished.returncode != 0:
        raise RuntimeError(f"wrk: {finished.stdout}{finished.stderr}")
    return finished.stdout


def python_client(port: int, call: Call, connections: int, seconds: float) -> Load:
    """Load a server with asyncio: slower than wrk, so that it measures less of the server."""
    return asyncio.run(_load(port, call, connections, seconds))


async def _load(port: int, call: Call, connections: int, seconds: float) -> Load:
    started = time.perf_counter()
    clients = [_client(port, call, started + seconds) for _ in range(connections)]
    answers = [answer for answers in await asyncio.gather(*clients) for answer in answers]
    times = sorted(took for _, took in answers)
    return Load(
        requests=len(answers),
        failed=sum(status >= 400 for status, _ in answers),
        seconds=time.perf_counter() - started,
        mean_ms=sum(times) / len(times) * 1000,
        p99_ms=times[int(len(times) * 0.99)] * 1000,
    )


async def _client(port: int, call: Call, end: float) -> list[tuple[int, float]]:
    reader, writer = await asyncio.open_connection(HOST, port)
    answers = []
    while (asked := time.perf_counter()) < end:
        writer.write(request_bytes(call))
        status, _ = await asyncio.wait_for(read_answer(reader), ANSWER_WITHIN)
        answers.append((status, time.perf_counter() - asked))
    writer.close()
    await writer.wait_closed()
    return answers


def ask(port: int, call: Call) -> tuple[int, bytes]:
    """Send one request; gives the status and the body of its answer."""

    async def asking() -> tuple[int, bytes]:
        reader, writer = await asyncio.open_connection(HOST, port)
        writer.write(request_bytes(call))
        answer = await asyncio.wait_for(read_answer(reader), ANSWER_WITHIN)
        writer.close()
        return answer

    return asyncio.run(asking())


def request_bytes(call: Call) -> bytes:
    """Give the bytes of a request."""
    lines = [f"{call.method} {call.path} HTTP/1.1", f"Host: {HOST}"]
    if call.body:
        lines += ["Content-Type: application/json", f"Content-Length: {len(call.body)}"]
    return "\r\n".join([*lines, "", call.body]).encode()


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    """Read the status and the body of one answer, whose length is in its head."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
    length = head.partition("\r\ncontent-length:")[2].partition("\r\n")[0]
    return int(head.split()[1]), await reader.readexactly(int(length))
