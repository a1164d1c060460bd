"""RESPONSE_TIMEOUT ends requests in a query, and their clients leave on top."""

from __future__ import annotations

import random

from tests.faults.clients import at_once, leave_after
from tests.faults.databases import Target
from tests.faults.serving import served
from tests.shop import eventually

REQUESTS = 200
TIMEOUT = 1.0


async def test_a_timeout_with_a_disconnect_on_top(target: Target) -> None:
    """Who stays reads 503; nothing is stored, and the queries are gone from the server."""
    async with served(target, response_timeout=TIMEOUT, db_pool_size=20) as server:

        async def ask(number: int) -> bytes:
            kind = ("session", "async")[number % 2]
            patience = 20 if number % 4 < 2 else random.uniform(0.8, 1.2) * TIMEOUT
            head = f"POST /write/{kind}/timeout-{number}?query=30 HTTP/1.1"
            return await leave_after(server.port, head, patience)

        answers = await at_once(map(ask, range(REQUESTS)), limit=REQUESTS)

        stayed = [answer for number, answer in enumerate(answers) if number % 4 < 2]
        assert [answer[:12] for answer in stayed] == [b"HTTP/1.1 503"] * len(stayed)
        await server.at_rest()
        await eventually(lambda: target.observer.open_transactions() == 0, within=8)
        if not target.is_file:
            await eventually(lambda: target.observer.slow_queries() == 0, within=8)
        assert target.observer.names() == []
        await server.forgotten("/write/")
