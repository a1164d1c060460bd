"""What is counted or timed without a load: round trips on the wire, imports, starts."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from statistics import median

from .databases import Databases
from .proxy import RunningProxy, proxied
from .server import ROOT, RunningServer, environment, launched, serving
from .workloads import WORKLOADS, Workload

ByContender = dict[str, dict[str, float]]
"""A number for each contender, and for each of its workloads."""

COUNTED = ("read-by-key", "write", "twenty-reads")
"""The workloads whose round trips are counted."""

FIRST = 5
"""Requests before the count, for which the driver has to prepare statements."""

REQUESTS = 20

STARTED = ("read-by-key", "plain", "routes-10", "routes-1000")
"""The workloads whose contenders are timed as they start."""

IMPORTS = {
    "Sanic, sanic-ext and SQLAlchemy": "import sanic, sanic_ext, sqlalchemy.ext.asyncio",
    "pydantic-settings, beside them": "import pydantic_settings",
    "sanic-db-bp, beside those": "import sanic_db_bp",
}


def round_trips(databases: Databases, contenders: Iterable[str]) -> ByContender:
    """Count the round trips of a request, by contender and workload."""
    counts: ByContender = {}
    with proxied(databases.url("postgresql")) as proxy:
        for name in contenders:
            asked = [WORKLOADS[each] for each in COUNTED if name in WORKLOADS[each].contenders]
            if not asked:
                continue
            with serving(name, proxy.url) as server:
                counts[name] = {each.name: _round_trips(each, server, proxy) for each in asked}
    return counts


def _round_trips(workload: Workload, server: RunningServer, proxy: RunningProxy) -> float:
    for _ in range(FIRST):
        server.answer(workload.call)
    before = proxy.round_trips()
    for _ in range(REQUESTS):
        server.answer(workload.call)
    return (proxy.round_trips() - before) / REQUESTS


def import_times(rounds: int) -> dict[str, float]:
    """Time imports one after another in a new process; medians, in milliseconds."""
    timed = "\n".join(f"begin()\n{statement}\nend()" for statement in IMPORTS.values())
    program = f"""
import time
def begin():
    global began
    began = time.perf_counter()
def end():
    print((time.perf_counter() - began) * 1000)
{timed}
"""
    command = [sys.executable, "-c", program]

    def times_of_run() -> list[str]:
        run = subprocess.run(
            command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=True
        )
        return run.stdout.split()

    times_of_run()  # In which Python perhaps compiles the packages.
    times = zip(*(times_of_run() for _ in range(rounds)), strict=True)
    return {what: median(map(float, of)) for what, of in zip(IMPORTS, times, strict=True)}


def start_times(databases: Databases, rounds: int) -> ByContender:
    """Time the launch of each contender until its first answer; medians, in seconds."""
    times: ByContender = {}
    for workload in map(WORKLOADS.__getitem__, STARTED):
        url = databases.url(workload.where)
        for name in workload.contenders:
            taken = [_start_time(name, url, workload.more_routes) for _ in range(rounds)]
            times.setdefault(name, {})[workload.name] = median(taken)
    return times


def _start_time(name: str, url: str, more_routes: int) -> float:
    with launched(name, url, more_routes=more_routes) as server:
        return server.wait_until_up()
