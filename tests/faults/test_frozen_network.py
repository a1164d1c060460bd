"""The network lets nothing through any more, and closes nothing."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace

import httpx
import pytest

from tests.faults.databases import SERVERS, Target
from tests.faults.serving import AppServer, served
from tests.proxy import proxied
from tests.shop import eventually

pytestmark = pytest.mark.parametrize("target", SERVERS, indirect=True)

CLIENTS = 10
POOL_TIMEOUT = 1.0
GRACE = 1.0
ANSWERED_WITHIN = POOL_TIMEOUT + 5
STOPPED_WITHIN = GRACE + 8
BEAT = 1.0
"""Seconds that the event loop may be busy at most, on a machine that does other things too."""


async def _ask(client: httpx.AsyncClient, path: str) -> tuple[httpx.Response, float]:
    started = time.monotonic()
    response = await client.post(path)
    return response, time.monotonic() - started


async def _fill_pool(server: AppServer, target: Target) -> None:
    """Open every connection of the pool, and see each transaction end."""
    async with server.client() as client:
        await asyncio.gather(
            *(client.post(f"/write/session/first{n}?query=0.3") for n in range(CLIENTS))
        )
    assert len(target.observer.names()) == 2 * CLIENTS
    # The beats of the start are not judged.
    await server.status()


@pytest.mark.parametrize("pool_size", [CLIENTS // 2, CLIENTS])
async def test_requests_on_a_frozen_network_are_answered(target: Target, pool_size: int) -> None:
    """Those that have a connection and those that wait for one; after the thaw all is well."""
    async with proxied(target.url) as proxy:
        behind = replace(target, url=proxy.url)
        async with served(behind, db_pool_size=pool_size, db_pool_timeout=POOL_TIMEOUT) as server:
            await _fill_pool(server, target)
            proxy.freeze()
            async with server.client() as client:
                paths = [f"/write/session/frozen{n}" for n in range(CLIENTS)]
                answers = await asyncio.gather(*(_ask(client, path) for path in paths))
                assert [answer.status_code for answer, _ in answers] == [503] * CLIENTS
                assert all("retry-after" in answer.headers for answer, _ in answers)
                assert max(seconds for _, seconds in answers) < ANSWERED_WITHIN
                status = await server.at_rest()
                assert status["longest_gap"] < BEAT
                proxy.thaw()
                answers = await asyncio.gather(*(_ask(client, f"{path}again") for path in paths))
                assert [answer.status_code for answer, _ in answers] == [200] * CLIENTS


async def test_a_commit_on_a_frozen_network_is_answered(target: Target) -> None:
    """Nobody can know what became of it: the client gets an error, and soon."""
    async with proxied(target.url) as proxy:
        behind = replace(target, url=proxy.url)
        async with served(behind, db_pool_size=CLIENTS, db_pool_timeout=POOL_TIMEOUT) as server:
            proxy.commit = 5.0
            async with server.client() as client:
                paths = [f"/write/session/commit{n}" for n in range(CLIENTS)]
                asking = [asyncio.create_task(_ask(client, path)) for path in paths]
                await eventually(lambda: len(target.observer.names()) == 2 * CLIENTS, within=4)
                proxy.freeze()
                answers = await asyncio.gather(*asking)
            assert all(answer.status_code >= 500 for answer, _ in answers)
            assert max(seconds for _, seconds in answers) < ANSWERED_WITHIN
            status = await server.at_rest()
            assert status["longest_gap"] < BEAT
            lines = [line for line in server.new_lines() if "COMMIT failed" in line]
            assert len(lines) == CLIENTS
            async with server.client() as client:
                assert (await client.get("/commits")).json() == []


async def test_a_server_on_a_frozen_network_stops(target: Target) -> None:
    """With requests in a statement, idle connections, and nobody to say goodbye to."""
    async with proxied(target.url) as proxy:
        behind = replace(target, url=proxy.url)
        async with served(behind, db_pool_size=CLIENTS, graceful_shutdown_timeout=GRACE) as server:
            await _fill_pool(server, target)
            proxy.freeze()
            async with server.client() as client:
                paths = [f"/write/session/stop{n}" for n in range(CLIENTS // 2)]
                asking = [asyncio.create_task(_ask(client, path)) for path in paths]
                await asyncio.sleep(0.3)
                started = time.monotonic()
                server.terminate()
                assert await server.wait() == 0
                took = time.monotonic() - started
                assert took < STOPPED_WITHIN
                await asyncio.gather(*asking, return_exceptions=True)
