"""Clients leave by the hundred, at every moment of a request."""

from __future__ import annotations

import random
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from itertools import count, product

import pytest
import pytest_asyncio

from tests.faults.clients import at_once, leave_after
from tests.faults.databases import Target
from tests.faults.serving import Served, served
from tests.proxy import proxied

pytestmark = pytest.mark.asyncio(loop_scope="module")

REQUESTS = 500
AT_ONCE = 100
POOL_SIZE = 20

KINDS = ("session", "async")
FAULTS = {"query": "?query=30", "pause": "?pause=30"}


async def _leave(app: Served, path: str) -> bool:
    """Send a request and leave it; returns whether it was answered before."""
    head = f"POST {path} HTTP/1.1"
    answer = await leave_after(app.server.port, head, random.uniform(0.05, 0.3))
    return answer.startswith(b"HTTP/1.1 200")


async def _seconds_for_a_read(app: Served) -> float:
    async with app.server.client() as client:
        start = time.monotonic()
        for _ in range(5):
            assert (await client.get("/read/none")).status_code == 200
        return (time.monotonic() - start) / 5


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def app(shared_target: Target) -> AsyncIterator[Served]:
    """The app on a database whose COMMIT takes its time."""
    async with proxied(shared_target.url) as proxy:
        proxy.commit = 0.1
        behind = replace(shared_target, url=proxy.url)
        async with served(behind, db_pool_size=POOL_SIZE, slow_commit=0.02) as server:
            yield Served(server, shared_target)


async def test_clients_that_leave_within_the_handler(app: Served) -> None:
    """Nothing that they had begun is stored or stays in use, in a query or in Python."""
    before = await _seconds_for_a_read(app)
    mix = product(range(REQUESTS // 4), KINDS, FAULTS)
    paths = (f"/write/{kind}/{fault}-{kind}-{n}{FAULTS[fault]}" for n, kind, fault in mix)

    answered = await at_once((_leave(app, path) for path in paths), limit=AT_ONCE)

    assert not any(answered)
    await app.is_clean()
    assert await _seconds_for_a_read(app) < 3 * before + 0.2
    for fault in FAULTS:
        assert app.stored(fault) == await app.committed(fault) == []


async def test_clients_that_leave_during_the_commit(app: Served) -> None:
    """Each COMMIT that has begun runs to its end, and the app knows of every one."""
    rounds = count()
    left: set[str] = set()
    while len(left.intersection(await app.committed("commit"))) < POOL_SIZE:
        assert next(rounds) < REQUESTS / POOL_SIZE, "no client left during a COMMIT"
        names = [f"commit-{random.getrandbits(64)}" for _ in range(POOL_SIZE)]
        paths = (f"/write/{random.choice(KINDS)}/{name}" for name in names)
        answered = await at_once((_leave(app, path) for path in paths), limit=POOL_SIZE)
        left |= {name for name, told in zip(names, answered, strict=True) if not told}

    await app.is_clean()
    committed = await app.committed("commit")
    assert sorted(app.stored("commit")) == sorted(
        f"{name}/{row}" for name in committed for row in (1, 2)
    )
