"""Thousands of mixed requests: what the app holds does not grow.

``SOAK=1`` sends 20 000.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections import Counter
from typing import Any

import httpx
import pytest

from tests.faults.clients import leave_after
from tests.faults.databases import Target
from tests.faults.serving import AppServer, served

APP = "tests.faults.busy_app:app"

REQUESTS = 20_000 if os.environ.get("SOAK") == "1" else 2_000
WARM_UP = REQUESTS // 4
CLIENTS = 20
POOL_SIZE = 10
GROWTH = 8 * 2**20
"""Bytes that the memory may grow after the warm-up: fragments, and the names that the app keeps."""

KINDS = {
    "read": 30,
    "ping": 20,
    "write": 20,
    "stream": 5,
    "fail": 10,
    "doom": 5,
    "leave": 10,
}
GOOD = ("read", "ping", "write", "stream")
STATUSES = {**dict.fromkeys(GOOD, 200), "fail": 409, "doom": 500}


async def _request(server: AppServer, client: httpx.AsyncClient, kind: str, name: str) -> None:
    if kind == "leave":
        await leave_after(
            server.port, f"POST /write/session/{name}?pause=0.03 HTTP/1.1", random.uniform(0, 0.05)
        )
        return
    requests: dict[str, tuple[str, str]] = {
        "read": ("GET", f"/read/{name}"),
        "ping": ("GET", "/ping"),
        "write": ("POST", f"/write/async/{name}"),
        "stream": ("POST", f"/stream/respond/{name}"),
        "fail": ("POST", f"/fail/{name}"),
        "doom": ("POST", f"/write/session/{name}?doom=constraint"),
    }
    response = await client.request(*requests[kind])
    assert response.status_code == STATUSES[kind], (kind, response.text)


async def _send(server: AppServer, numbers: range) -> dict[str, Any]:
    """Send requests from several clients; returns the app's state when all is over."""
    left = iter(numbers)
    kinds: Counter[str] = Counter()

    async def run(client: httpx.AsyncClient) -> None:
        for number in left:
            (kind,) = random.choices(list(KINDS), list(KINDS.values()))
            kinds[kind] += 1
            await _request(server, client, kind, str(number))

    async with server.client() as client:
        await asyncio.gather(*(run(client) for _ in range(CLIENTS)))
    assert set(kinds) == set(KINDS)
    await server.forgotten()
    return await server.at_rest()


@pytest.mark.parametrize("target", ["asyncpg", "sqlite"], indirect=True)
async def test_what_the_app_holds_does_not_grow(target: Target) -> None:
    """Memory, tasks, file descriptors and connections are after the load what they were before."""
    async with served(target, app=APP, db_pool_size=POOL_SIZE, db_pool_timeout=20) as server:
        before = await _send(server, range(WARM_UP))
        after = await _send(server, range(WARM_UP, REQUESTS))
        print("after the warm-up", before, "at the end", after)
        assert after["checked_out"] == 0
        assert after["tasks"] <= before["tasks"]
        # Both pools may have grown meanwhile.
        opened = 2 * POOL_SIZE - before["idle"] - before["read_idle"]
        assert after["fds"] <= before["fds"] + opened
        assert after["rss"] - before["rss"] < GROWTH
