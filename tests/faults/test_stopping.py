"""A server is stopped, killed or started again with requests in flight."""

from __future__ import annotations

import asyncio
import os
import signal
from dataclasses import dataclass

import httpx
import pytest

from tests.faults.databases import DRIVERS, SERVERS, Target
from tests.faults.serving import AppServer, Way, served
from tests.shop import eventually

IN_FLIGHT = 10
GRACE = 1.0
STOPPED_WITHIN = 10.0
GONE_WITHIN = 5.0
"""Seconds that a database has to notice that a killed client is gone."""


@dataclass(frozen=True)
class Outcome:
    """What a client learned of its request: a status, or 0 if the connection was closed."""

    name: str
    status: int


async def _write(client: httpx.AsyncClient, name: str, query: str) -> Outcome:
    try:
        response = await client.post(f"/write/session/{name}?{query}")
    except httpx.TransportError:
        return Outcome(name, 0)
    return Outcome(name, response.status_code)


async def _in_flight(server: AppServer, target: Target, query: str) -> list[asyncio.Task[Outcome]]:
    """Send the requests, each on a connection of its own, and wait until they are at work."""
    client = server.client(limits=httpx.Limits(max_keepalive_connections=0))
    tasks = [asyncio.create_task(_write(client, str(n), query)) for n in range(IN_FLIGHT)]
    asyncio.gather(*tasks).add_done_callback(lambda _: asyncio.ensure_future(client.aclose()))
    if target.is_file:
        # One writes, the others wait for it.
        await eventually(target.observer.open_transactions, within=10)
    else:
        at_work = IN_FLIGHT
        await eventually(lambda: target.observer.open_transactions() == at_work, within=10)
    return tasks


def _agree(target: Target, outcomes: list[Outcome]) -> None:
    """What was answered with 200 is stored, and nothing that was answered otherwise."""
    stored = target.observer.names()
    names = {name.partition("/")[0] for name in stored}
    assert len(stored) == 2 * len(names), "a half-done transaction was committed"
    assert names == {outcome.name for outcome in outcomes if outcome.status == 200}


async def _nothing_left(target: Target) -> None:
    if not target.is_file:
        await eventually(lambda: target.observer.connections() == 0, within=GONE_WITHIN)
    await eventually(lambda: target.observer.open_transactions() == 0, within=GONE_WITHIN)


@pytest.mark.parametrize(
    ("way", "target"),
    [("native", "asyncpg"), ("native", "sqlite"), ("workers", "asyncpg"), ("asgi", "asyncpg")],
    indirect=["target"],
)
async def test_requests_within_the_grace_period_are_finished(target: Target, way: Way) -> None:
    """They are committed and answered before the server ends."""
    async with served(target, way, graceful_shutdown_timeout=10) as server:
        tasks = await _in_flight(server, target, "pause=0.1" if target.is_file else "pause=0.8")
        server.terminate()
        outcomes = await asyncio.gather(*tasks)
        await server.wait()
    assert [outcome.status for outcome in outcomes] == [200] * IN_FLIGHT
    _agree(target, outcomes)
    await _nothing_left(target)


@pytest.mark.parametrize(
    ("way", "target"),
    [
        *(("native", driver) for driver in DRIVERS),
        ("workers", "asyncpg"),
        ("asgi", "asyncpg"),
    ],
    indirect=["target"],
)
async def test_requests_beyond_the_grace_period_are_rolled_back(target: Target, way: Way) -> None:
    """Their clients get no success, their rows are not there, and no query goes on."""
    # uvicorn logs each request that it cancels with a traceback.
    tracebacks = way == "asgi"
    async with served(
        target, way, tracebacks=tracebacks, graceful_shutdown_timeout=GRACE
    ) as server:
        tasks = await _in_flight(server, target, "pause=30")
        server.terminate()
        await server.wait()
        outcomes = await asyncio.gather(*tasks)
    assert 200 not in {outcome.status for outcome in outcomes}
    _agree(target, outcomes)
    await _nothing_left(target)


@pytest.mark.parametrize("target", SERVERS, indirect=True)
async def test_queries_beyond_the_grace_period_are_ended(target: Target) -> None:
    """The database does not go on with what nobody waits for."""
    async with (
        served(target, graceful_shutdown_timeout=GRACE) as server,
        server.client() as client,
    ):
        tasks = [asyncio.create_task(_write(client, str(n), "query=30")) for n in range(IN_FLIGHT)]
        sleeping = target.observer.slow_queries
        await eventually(lambda: sleeping() == IN_FLIGHT, within=10)
        server.terminate()
        await server.wait()
        outcomes = await asyncio.gather(*tasks)
    assert 200 not in {outcome.status for outcome in outcomes}
    _agree(target, outcomes)
    await _nothing_left(target)


@pytest.mark.parametrize(
    ("way", "target"),
    [*(("native", driver) for driver in DRIVERS), ("workers", "asyncpg")],
    indirect=["target"],
)
@pytest.mark.parametrize("query", ["", "?query=1"])
async def test_background_tasks_are_rolled_back(target: Target, way: Way, query: str) -> None:
    """Sanic cancels them, and would wait for their ROLLBACK with a loop that stands still."""
    app = "tests.faults.background_app:app"
    in_query = query and not target.is_file
    at_work = target.observer.slow_queries if in_query else target.observer.open_transactions
    async with served(target, way, app=app) as server:
        # For an open connection Sanic would let the loop run.
        async with server.client() as client:
            assert (await client.post(f"/background/a{query}")).status_code == 200
        await eventually(lambda: at_work() == 1, within=10)
        server.terminate()
        await server.wait(STOPPED_WITHIN)
    assert target.observer.names() == []
    await _nothing_left(target)


@pytest.mark.parametrize("target", ["asyncpg", "asyncmy"], indirect=True)
async def test_a_killed_worker_leaves_nothing_behind(target: Target) -> None:
    """Its transactions are rolled back by the database, and the other worker goes on."""
    async with served(target, "workers") as server:
        tasks = await _in_flight(server, target, "pause=1.5")
        os.kill(await _busy_worker(server), signal.SIGKILL)
        outcomes = await asyncio.gather(*tasks)
        assert {outcome.status for outcome in outcomes} <= {0, 200}
        assert 0 in {outcome.status for outcome in outcomes}
        _agree(target, outcomes)
        # The server may need a moment to see that its clients are gone.
        await eventually(lambda: target.observer.open_transactions() == 0, within=5)
        async with server.client() as client:
            assert (await client.post("/write/session/after")).status_code == 200
    await _nothing_left(target)


async def _busy_worker(server: AppServer) -> int:
    """Return the process number of a worker that has a request in flight."""
    while True:
        status = await server.status()
        if status["live"]:
            return int(status["pid"])


@pytest.mark.parametrize("target", ["asyncpg"], indirect=True)
async def test_a_worker_that_is_started_again_finishes_its_requests(target: Target) -> None:
    """It has connections of its own, and the old one leaves none."""
    app = "tests.faults.busy_app:app"
    async with served(target, "workers", app=app, graceful_shutdown_timeout=10) as server:
        tasks = await _in_flight(server, target, "pause=0.8")
        async with server.client() as client:
            await client.post("/restart")
            outcomes = await asyncio.gather(*tasks)
            _agree(target, outcomes)
            await server.wait_for("ready to serve", count=3)
            assert (await client.post("/write/session/after")).status_code == 200
    await _nothing_left(target)
