"""No request is kept in memory by the connections that were opened for it."""

from __future__ import annotations

import pytest

from tests.faults.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")

UPLOADS = 10
BODY = bytes(5_000_000)


async def test_uploads_on_fresh_connections(app: Served) -> None:
    """Each upload opens a connection to the database, and is gone when it is answered."""
    async with app.server.client() as client:
        for number in range(UPLOADS):
            await client.post("/fresh")
            answer = await client.post(f"/upload/fresh-{number}", content=BODY)
            assert answer.json() == {"bytes": len(BODY)}
    assert len(app.stored("fresh")) == UPLOADS
    await app.server.forgotten("/upload/")
