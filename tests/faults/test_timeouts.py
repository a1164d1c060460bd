"""The limits in time that a connection has of its own, on each database."""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import httpx
import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError

from sanic_db_bp import Database, DatabaseSettings
from sanic_db_bp.connections.liveness import (
    KEEPALIVE_COUNT,
    KEEPALIVE_IDLE,
    KEEPALIVE_INTERVAL,
    UNACKNOWLEDGED_WITHIN,
    socket_of,
)
from sanic_db_bp.exceptions import DatabaseUnavailable
from tests.faults.databases import SERVERS, Target
from tests.faults.serving import served
from tests.proxy import proxied
from tests.servers import HOST
from tests.slow_sql import sleep_for

LIMIT = 0.5
SLACK = 3.0
"""Seconds that a busy machine takes on top."""

NETWORKED = pytest.mark.parametrize("target", SERVERS, indirect=True)


@asynccontextmanager
async def _database(url: str, **settings: object) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=url, **settings))
    try:
        yield database
    finally:
        await database.dispose(within=0)


async def _sleep(database: Database, seconds: float) -> None:
    async with database.session() as session:
        await session.execute(sleep_for(database, seconds))


async def _dawdle(database: Database, seconds: float) -> None:
    async with database.session() as session:
        await session.execute(text("INSERT INTO kept VALUES (1)"))
        await asyncio.sleep(seconds)
        await session.execute(text("INSERT INTO kept VALUES (2)"))


@NETWORKED
async def test_the_server_ends_a_statement_that_takes_too_long(target: Target) -> None:
    """``STATEMENT_TIMEOUT``; the connection is as good as before."""
    async with _database(target.url, statement_timeout=LIMIT) as database:
        started = time.monotonic()
        with pytest.raises(DBAPIError):
            await _sleep(database, 10)
        assert LIMIT <= time.monotonic() - started < LIMIT + SLACK
        assert target.observer.slow_queries() == 0
        assert await database.ping() < SLACK


@NETWORKED
async def test_the_server_ends_a_transaction_in_which_nothing_happens(target: Target) -> None:
    """``IDLE_IN_TRANSACTION_TIMEOUT``; its connection is replaced."""
    target.observer.run("CREATE TABLE kept (id integer)")
    async with _database(target.url, idle_in_transaction_timeout=1) as database:
        with pytest.raises(DBAPIError):
            await _dawdle(database, 2.5)
        assert target.observer.open_transactions() == 0
        assert await database.ping() < SLACK


@NETWORKED
async def test_a_server_that_says_nothing_is_no_server(target: Target) -> None:
    """``connect_timeout``, also where the connection is accepted, and nothing more."""
    with socket.create_server((HOST, 0)) as silent:
        url = make_url(target.url).set(port=silent.getsockname()[1])
        url = url.update_query_dict({"connect_timeout": "2"})
        async with _database(url.render_as_string(hide_password=False)) as database:
            started = time.monotonic()
            with pytest.raises(DatabaseUnavailable):
                await database.ping()
            assert time.monotonic() - started < 2 + SLACK


@NETWORKED
async def test_opening_a_connection_counts_as_waiting_for_one(target: Target) -> None:
    """``POOL_TIMEOUT`` is the longest wait, and not the time limit of connecting."""
    async with proxied(target.url) as proxy, _database(proxy.url, pool_timeout=LIMIT) as database:
        proxy.freeze()
        started = time.monotonic()
        with pytest.raises(DatabaseUnavailable, match="POOL_TIMEOUT"):
            await database.ping()
        assert LIMIT <= time.monotonic() - started < LIMIT + SLACK
        proxy.thaw()
        await database.wait_until_up()


@NETWORKED
async def test_the_kernel_asks_whether_the_server_is_there(target: Target) -> None:
    """Keepalives and ``TCP_USER_TIMEOUT``, on every driver."""
    async with _database(target.url) as database, database.engine.connect() as connection:
        raw = await connection.get_raw_connection()
        own = socket_of(raw.driver_connection)
        assert own is not None
        with own:
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            options = [
                own.getsockopt(socket.IPPROTO_TCP, option)
                for option in (
                    socket.TCP_KEEPIDLE,
                    socket.TCP_KEEPINTVL,
                    socket.TCP_KEEPCNT,
                    socket.TCP_USER_TIMEOUT,
                )
            ]
        user_timeout = UNACKNOWLEDGED_WITHIN * 1000
        assert options == [KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT, user_timeout]


@NETWORKED
async def test_a_slow_statement_of_a_server_that_answers_goes_on(target: Target) -> None:
    """Longer than ``POOL_TIMEOUT``: the server is asked whether it is there, and it is."""
    async with _database(target.url, pool_timeout=LIMIT) as database:
        started = time.monotonic()
        await _sleep(database, 4 * LIMIT)
        assert time.monotonic() - started >= 4 * LIMIT


RESPONSE_TIMEOUT = 1
DISTANCE = 0.2
"""Seconds of one round trip."""
COLD_CLIENTS = 40
TURNS = 15
"""How many times the clients ask, most of them in vain at first."""


@NETWORKED
async def test_a_cold_app_far_from_its_database_comes_up(target: Target) -> None:
    """Opening a connection takes longer than a request may, and yet soon every client is served."""
    async with proxied(target.url) as proxy:
        proxy.there = proxy.back = DISTANCE / 2
        behind = replace(target, url=proxy.url)
        async with (
            served(behind, db_pool_size=COLD_CLIENTS, response_timeout=RESPONSE_TIMEOUT) as server,
            server.client(limits=httpx.Limits(max_connections=None)) as client,
        ):
            for _ in range(TURNS):
                asking = [client.get("/read/none") for _ in range(COLD_CLIENTS)]
                answers = await asyncio.gather(*asking)
                good = sum(response.status_code == 200 for response in answers)
                if good >= 0.9 * COLD_CLIENTS:
                    return
        pytest.fail(f"of {COLD_CLIENTS} clients, {good} were served in the end")
