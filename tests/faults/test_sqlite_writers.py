"""Many write to one SQLite file: none is locked out, and no update is lost."""

from __future__ import annotations

import asyncio
import os
import time
from collections import Counter

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


async def _count(server: AppServer, writes: int) -> tuple[Counter[int], float]:
    """Let the writers count, and return their statuses and the time that the slowest took."""
    statuses: Counter[int] = Counter()
    slowest = 0.0
    left = writes
    async with server.client(limits=httpx.Limits(max_connections=WRITERS)) as client:

        async def write() -> None:
            nonlocal slowest, left
            while left > 0:
                left -= 1
                started = time.monotonic()
                response = await client.post("/count/number")
                slowest = max(slowest, time.monotonic() - started)
                statuses[response.status_code] += 1

        await asyncio.gather(*(write() for _ in range(WRITERS)))
    return statuses, slowest


def _insert_number(target: Target) -> None:
    target.observer.run("INSERT INTO item (name, stock) VALUES ('number', 0)")


def _number(target: Target) -> int:
    return int(target.observer.scalar("SELECT stock FROM item WHERE name = 'number'"))


async def test_writers_of_one_worker_come_first_come_first_served(target: Target) -> None:
    """None waits much longer than the others together take."""
    async with served(target, app=APP) as server:
        _insert_number(target)
        started = time.monotonic()
        statuses, slowest = await _count(server, WRITES)
        one_each = WRITERS * (time.monotonic() - started) / WRITES
        assert statuses == {200: WRITES}
        assert _number(target) == WRITES
        assert slowest < 2 * one_each


async def test_writers_of_two_workers_share_one_file(target: Target) -> None:
    """Between processes it is SQLite that waits, and long enough."""
    async with served(target, "workers", app=APP) as server:
        _insert_number(target)
        statuses, slowest = await _count(server, WRITES // 2)
        assert statuses == {200: WRITES // 2}
        assert _number(target) == WRITES // 2
        assert slowest < 2 * PATIENCE
