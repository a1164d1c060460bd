"""Many write to one SQLite file: none is locked out, and no update is lost."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter
from dataclasses import dataclass

import httpx
import pytest

from tests.faults.databases import Target
from tests.faults.serving import AppServer, served

pytestmark = pytest.mark.parametrize("target", ["sqlite"], indirect=True)

APP = "tests.faults.busy_app:app"

WRITERS = 50
WRITES = 500 if os.environ.get("SOAK") == "1" else 200
PATIENCE = 5.0
"""Seconds that a writer may have to wait for those of another worker."""


@dataclass
class Counted:
    """What the writers have found: their statuses, and how one of them had to wait at most."""

    statuses: Counter[int]
    seconds: float = 0.0
    others: int = 0
    """Writes of others that came to their end meanwhile."""


async def _count(server: AppServer, writes: int) -> Counted:
    """Let the writers count."""
    counted = Counted(Counter())
    left = writes
    latest = 0
    async with server.client(limits=httpx.Limits(max_connections=WRITERS)) as client:

        async def write() -> None:
            nonlocal latest, left
            while left > 0:
                left -= 1
                started, before = time.monotonic(), latest
                response = await client.post("/count/number")
                counted.seconds = max(counted.seconds, time.monotonic() - started)
                counted.statuses[response.status_code] += 1
                if response.status_code == 200:
                    latest = max(latest, response.json())
                    counted.others = max(counted.others, response.json() - before - 1)

        await asyncio.gather(*(write() for _ in range(WRITERS)))
    return counted


def _insert_number(target: Target) -> None:
    target.observer.run("INSERT INTO item (name, stock) VALUES ('number', 0)")


def _number(target: Target) -> int:
    return int(target.observer.scalar("SELECT stock FROM item WHERE name = 'number'"))


async def test_writers_of_one_worker_come_first_come_first_served(target: Target) -> None:
    """Nobody waits for more than about one write of each other, whatever that takes."""
    async with served(target, app=APP) as server:
        _insert_number(target)
        counted = await _count(server, WRITES)
        assert counted.statuses == {200: WRITES}
        assert _number(target) == WRITES
        assert counted.others < 1.5 * WRITERS


async def test_writers_of_two_workers_share_one_file(target: Target) -> None:
    """Between processes it is SQLite that waits, and long enough."""
    async with served(target, "workers", app=APP) as server:
        _insert_number(target)
        counted = await _count(server, WRITES // 2)
        assert counted.statuses == {200: WRITES // 2}
        assert _number(target) == WRITES // 2
        assert counted.seconds < 2 * PATIENCE
