"""The database server is away: at the start, between two requests, and in the middle of them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import httpx
import pytest

from tests.conftest import or_skip
from tests.faults.databases import Target, database_on
from tests.faults.serving import AppServer, served
from tests.servers import MariaDBServer, PostgreSQLServer, Server
from tests.shop import eventually

KINDS = {"asyncpg": PostgreSQLServer, "psycopg": PostgreSQLServer, "asyncmy": MariaDBServer}

CLIENTS = 30
POOL_SIZE = 20
AWAY = 2.0
STARTUP_TIMEOUT = 1.0


@dataclass(frozen=True)
class Own:
    """A server of the test's own, and a database on it."""

    server: Server
    target: Target


@pytest.fixture(params=KINDS)
def own(request: pytest.FixtureRequest) -> Iterator[Own]:
    """A server that the test may end and start again: the test runs once for each driver."""
    driver = request.param
    for server in or_skip(KINDS[driver]()):
        with database_on(server.url, driver) as target:
            yield Own(server, target)


@dataclass(frozen=True)
class Answer:
    """What a client was told, when it had asked, and when it was answered."""

    name: str
    asked: float
    answered: float
    status: int
    retry_after: str | None


@asynccontextmanager
async def load(server: AppServer) -> AsyncIterator[list[Answer]]:
    """Let every client write one name after another, for the length of the block."""
    answers: list[Answer] = []
    async with server.client(limits=httpx.Limits(max_connections=CLIENTS)) as client:
        going_on = True

        async def ask(number: int) -> None:
            count = 0
            while going_on:
                name, asked = f"{number}-{count}", time.monotonic()
                response = await client.post(f"/write/session/{name}?pause=0.02")
                header = response.headers.get("retry-after")
                status = response.status_code
                answers.append(Answer(name, asked, time.monotonic(), status, header))
                count += 1
                if status != 200:
                    await asyncio.sleep(0.1)

        asking = asyncio.gather(*map(ask, range(CLIENTS)))
        try:
            yield answers
        finally:
            going_on = False
            await asking


@pytest.mark.parametrize("own", ["psycopg", "asyncmy"], indirect=True)
async def test_a_start_without_a_database_fails(own: Own) -> None:
    """The server waits, says why it gives up, and ends with an exit status that is not 0."""
    environment = {
        "SANIC_DB_URL": own.target.url,
        "SANIC_DB_STARTUP_TIMEOUT": str(STARTUP_TIMEOUT),
    }
    own.server.stop()
    try:
        started = time.monotonic()
        app = AppServer("native", "tests.faults.app:app", environment)
        try:
            assert await app.wait() != 0
        finally:
            app.kill()
        assert time.monotonic() - started > STARTUP_TIMEOUT
        log = "\n".join(app.log)
        assert log.count("waiting for it to come up") == 1
        assert "The database 'db' is unavailable: connecting failed" in log
        app.judge(tracebacks=True)
    finally:
        own.server.start()


async def test_a_restart_of_the_database_between_requests_is_not_noticed(own: Own) -> None:
    """Every connection of a full, idle pool is dead, and no request fails."""
    async with (
        served(own.target, db_pool_size=POOL_SIZE) as server,
        server.client() as client,
    ):
        for turn in range(2):
            paths = [f"/write/session/{turn}-{n}?query=0.5" for n in range(POOL_SIZE)]
            responses = await asyncio.gather(*map(client.post, paths))
            assert [response.status_code for response in responses] == [200] * POOL_SIZE
            assert (await server.at_rest())["idle"] == POOL_SIZE
            await asyncio.to_thread(own.server.stop)
            await asyncio.to_thread(own.server.start)
        assert [line for line in server.log if "ERROR" in line] == []


async def test_clients_are_told_to_come_again_while_the_database_is_away(own: Own) -> None:
    """Each failure is one line in the log; once the database is back, nothing fails any more."""
    async with served(own.target, db_pool_size=POOL_SIZE) as server:
        async with load(server) as answers:
            await asyncio.sleep(0.5)
            await asyncio.to_thread(own.server.kill)
            gone = time.monotonic()
            await asyncio.sleep(AWAY)
            # On a busy machine the clients take their time.
            await eventually(
                lambda: len(_between(answers, gone, time.monotonic())) > CLIENTS, within=60
            )
            comes = time.monotonic()
            await asyncio.to_thread(own.server.start)
            back = time.monotonic()
            await asyncio.sleep(1)
        assert {answer.status for answer in answers if answer.asked > back} == {200}
        away = _between(answers, gone, comes)
        assert {answer.status for answer in away} == {503}
        failures = [answer for answer in answers if answer.status != 200]
        assert {answer.status for answer in failures} <= {500, 503}
        assert all(answer.retry_after for answer in failures if answer.status == 503)
        errors = [line for line in server.log if "ERROR" in line]
        assert len(errors) == len(failures)
        assert sum("COMMIT failed" in line for line in errors) == sum(
            answer.status == 500 for answer in failures
        )
        await server.at_rest()
        _agree(own.target, answers)


def _between(answers: list[Answer], begin: float, end: float) -> list[Answer]:
    return [each for each in answers if begin < each.asked and each.answered < end]


def _agree(target: Target, answers: list[Answer]) -> None:
    """What was told to be stored is stored, and no other but where a COMMIT was cut off."""
    stored = target.observer.names()
    told = {answer.name for answer in answers if answer.status == 200}
    unknown = {answer.name for answer in answers if answer.status == 500}
    names = {name.partition("/")[0] for name in stored}
    assert len(stored) == 2 * len(names)
    assert told <= names <= told | unknown
