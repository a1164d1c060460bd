"""More clients than connections: they wait their turn, or are told to come again."""

from __future__ import annotations

import asyncio
import time

import pytest

from tests.faults.clients import connected
from tests.faults.databases import Target
from tests.faults.serving import AppServer, served

APP = "tests.faults.busy_app:app"

CLIENTS = 200
POOL_SIZE = 5
POOL_TIMEOUT = 1.0
SLACK = 5.0
"""Seconds that a machine takes for 200 answers at once, when it does other things too."""


async def _ask_all(server: AppServer, paths: list[str]) -> list[tuple[int, float]]:
    """Send requests at once; returns their statuses, and the seconds that each took."""

    async def ask(path: str) -> tuple[int, float]:
        async with connected(server.port) as client:
            started = time.monotonic()
            client.send(f"POST {path} HTTP/1.1")
            status, _ = await client.answer()
            return status, time.monotonic() - started

    return await asyncio.gather(*map(ask, paths))


async def _recovers(server: AppServer) -> None:
    await server.at_rest()
    answers = await _ask_all(server, [f"/write/session/after{n}" for n in range(POOL_SIZE)])
    assert [status for status, _ in answers] == [200] * POOL_SIZE


async def test_clients_without_a_connection_are_told_to_come_again(target: Target) -> None:
    """They wait for ``POOL_TIMEOUT``, and get a 503 each, with one line in the log."""
    async with served(target, db_pool_size=POOL_SIZE, db_pool_timeout=POOL_TIMEOUT) as server:
        paths = [f"/write/session/{n}?query=0.4" for n in range(CLIENTS)]
        answers = await _ask_all(server, paths)
        statuses = [status for status, _ in answers]
        assert set(statuses) == {200, 503}
        assert max(seconds for _, seconds in answers) < POOL_TIMEOUT + SLACK
        assert sum("ERROR" in line for line in server.log) == statuses.count(503)
        assert len(target.observer.names()) == 2 * statuses.count(200)
        await _recovers(server)


@pytest.mark.parametrize("target", ["asyncpg", "sqlite"], indirect=True)
async def test_handlers_of_several_sessions_do_not_wait_for_each_other(target: Target) -> None:
    """Read sessions have a pool of their own, and ``on_commit`` comes when the rest is returned."""
    patience = 10 * POOL_TIMEOUT
    async with served(target, app=APP, db_pool_size=POOL_SIZE, db_pool_timeout=patience) as server:
        answers = await _ask_all(server, [f"/several/{n}" for n in range(4 * POOL_SIZE)])
        assert [status for status, _ in answers] == [200] * 4 * POOL_SIZE
        assert len(target.observer.names()) == 2 * 4 * POOL_SIZE
        await server.at_rest()


@pytest.mark.parametrize("target", ["asyncpg", "asyncmy"], indirect=True)
async def test_handlers_that_need_two_connections_each_do_not_lock_up(target: Target) -> None:
    """All hold one connection and wait for another: the time limit of the pool frees them."""
    async with served(
        target, app=APP, db_pool_size=POOL_SIZE, db_pool_timeout=POOL_TIMEOUT
    ) as server:
        answers = await _ask_all(server, [f"/two/{n}" for n in range(4 * POOL_SIZE)])
        statuses = [status for status, _ in answers]
        assert set(statuses) <= {200, 503}
        assert 503 in statuses
        assert max(seconds for _, seconds in answers) < 2 * POOL_TIMEOUT + SLACK
        assert len(target.observer.names()) == 2 * statuses.count(200)
        await _recovers(server)
