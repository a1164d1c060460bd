"""The network lets nothing through any more, and closes nothing."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import make_url

from tests.faults.databases import SERVERS, Target, database_on
from tests.faults.serving import AppServer, served
from tests.proxy import proxied
from tests.shop import eventually

CLIENTS = 10
POOL_TIMEOUT = 2.0
GRACE = 1.0
ANSWERED_WITHIN = POOL_TIMEOUT + 5
STOPPED_WITHIN = GRACE + 8
BEAT = 1.0
"""Seconds that the event loop may be busy at most, on a machine that does other things too."""


async def _ask(client: httpx.AsyncClient, path: str) -> tuple[httpx.Response, float]:
    started = time.monotonic()
    response = await client.post(path)
    return response, time.monotonic() - started


async def _fill_pool(server: AppServer, size: int) -> None:
    """Open every connection of the pool."""
    paths = [f"/write/session/first{n}?query=0.3" for n in range(size)]
    async with server.client() as client:
        await asyncio.gather(*map(client.post, paths))
    assert (await server.at_rest())["idle"] == size
    # The beats of the start are not judged.
    await server.status()


@pytest.fixture
def targets(request: pytest.FixtureRequest) -> Iterator[list[Target]]:
    """A database for each driver: most of the time is waited, so all are tried at once."""
    with ExitStack() as stack:
        yield [
            stack.enter_context(database_on(request.getfixturevalue(server), driver))
            for driver, server in SERVERS.items()
        ]


async def _at_once(check: Callable[[Target], Awaitable[None]], targets: list[Target]) -> None:
    async with asyncio.TaskGroup() as group:
        for target in targets:
            group.create_task(_named(check, target))


async def _named(check: Callable[[Target], Awaitable[None]], target: Target) -> None:
    try:
        await check(target)
    except AssertionError as error:
        error.add_note(f"on {make_url(target.url).drivername}")
        raise


async def test_requests_on_a_frozen_network_are_answered(targets: list[Target]) -> None:
    """Those that have a connection and those that wait for one; after the thaw all is well."""
    await _at_once(_freeze_requests, targets)


async def _freeze_requests(target: Target) -> None:
    async with proxied(target.url) as proxy:
        behind = replace(target, url=proxy.url)
        size = CLIENTS // 2
        async with served(behind, db_pool_size=size, db_pool_timeout=POOL_TIMEOUT) as server:
            await _fill_pool(server, size)
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
                again = [f"{path}again" for path in paths[:size]]
                answers = await asyncio.gather(*(_ask(client, path) for path in again))
                assert [answer.status_code for answer, _ in answers] == [200] * len(again)


async def test_a_commit_on_a_frozen_network_is_answered(targets: list[Target]) -> None:
    """Nobody can know what became of it: the client gets an error, and soon."""
    await _at_once(_freeze_commits, targets)


async def _freeze_commits(target: Target) -> None:
    async with proxied(target.url) as proxy:
        behind = replace(target, url=proxy.url)
        async with served(behind, db_pool_size=CLIENTS, db_pool_timeout=POOL_TIMEOUT) as server:
            await _fill_pool(server, CLIENTS)
            proxy.commit = 20.0
            async with server.client() as client:
                paths = [f"/write/session/commit{n}" for n in range(CLIENTS)]
                asking = [asyncio.create_task(_ask(client, path)) for path in paths]
                await eventually(lambda: len(target.observer.names()) == 4 * CLIENTS, within=15)
                proxy.freeze()
                frozen = time.monotonic()
                answers = await asyncio.gather(*asking)
                assert time.monotonic() - frozen < ANSWERED_WITHIN
            assert all(answer.status_code >= 500 for answer, _ in answers)
            status = await server.at_rest()
            assert status["longest_gap"] < BEAT
            # What is logged before an answer may be read after it.
            await server.wait_for("COMMIT failed", count=CLIENTS, within=5)
            assert sum("COMMIT failed" in line for line in server.log) == CLIENTS
            async with server.client() as client:
                called = (await client.get("/commits")).json()
                assert [name for name in called if name.startswith("commit")] == []


async def test_a_server_on_a_frozen_network_stops(targets: list[Target]) -> None:
    """With requests in a statement, idle connections, and nobody to say goodbye to."""
    await _at_once(_freeze_and_stop, targets)


async def _freeze_and_stop(target: Target) -> None:
    async with proxied(target.url) as proxy:
        behind = replace(target, url=proxy.url)
        async with served(behind, db_pool_size=CLIENTS, graceful_shutdown_timeout=GRACE) as server:
            await _fill_pool(server, CLIENTS)
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
