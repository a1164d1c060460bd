"""Under what conditions a run was made."""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.ext.asyncio import create_async_engine

from .databases import ONE_WAY, Databases
from .rounds import Plan
from .server import ROOT

PACKAGES = (
    "sanic-db-bp",
    "sanic",
    "sanic-ext",
    "sqlalchemy",
    "greenlet",
    "asyncpg",
    "aiosqlite",
    "uvloop",
    "httptools",
    "fastapi",
    "litestar",
    "advanced-alchemy",
    "uvicorn",
)


def conditions(databases: Databases, plan: Plan, arguments: Sequence[str]) -> dict[str, str]:
    """Describe the machine, the versions, the settings and the command."""
    return {
        "Command": shlex.join(["python", "-m", "benchmarks", *arguments]),
        "Commit": _commit(),
        "Date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "Machine": f"{os.cpu_count()} x {_processor()}, {platform.system()} {platform.release()}",
        "Load of the machine before": ", ".join(f"{load:.1f}" for load in os.getloadavg()),
        "Python": f"{platform.python_implementation()} {platform.python_version()}",
        "Packages": ", ".join(filter(None, map(_version, PACKAGES))),
        "PostgreSQL": asyncio.run(_postgresql(databases.url("postgresql"))),
        "Client": _client(plan),
        "Rounds": (
            f"{plan.rounds} rounds of {plan.seconds:g} s, each in a new process after "
            f"{plan.warm_up:g} s of warm-up, one contender after another in each round"
        ),
        "Settings": (
            f"one worker, pools of {plan.pool_size} connections without overflow, no access log, "
            f"16 requests in flight unless said otherwise; the distant database is "
            f"{ONE_WAY * 1000:g} ms away in each direction, and has one request in flight"
        ),
    }


def _commit() -> str:
    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--", "sanic_db_bp", "benchmarks")
    return (git("rev-parse", "--short=12", "HEAD") or "none") + (" with changes" if changed else "")


def _processor() -> str:
    found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return found[1] if found else platform.machine()


def _version(package: str) -> str | None:
    try:
        return f"{package} {version(package)}"
    except PackageNotFoundError:
        return None


async def _postgresql(url: str) -> str:
    engine = create_async_engine(url)
    async with engine.connect() as connection:
        server = await connection.scalar(text("SHOW server_version"))
        fsync = await connection.scalar(text("SHOW fsync"))
    await engine.dispose()
    return f"{server} on the same machine, fsync {fsync}"


def _client(plan: Plan) -> str:
    if plan.client.__name__ != "wrk" or not shutil.which("wrk"):
        return "asyncio, in Python"
    about = subprocess.run(["wrk", "--version"], capture_output=True, text=True).stdout
    return " ".join(about.split()[:2]) + ", one thread"
