"""Sessions in the wrong task, in a thread, twice at once, after their end."""

from __future__ import annotations

import pytest

from tests.faults.faulty_app import MISUSES
from tests.faults.serving import Served

pytestmark = pytest.mark.asyncio(loop_scope="session")

REMEDY = "async with app.ctx.db.session()"
ERRORS = {
    "thread": ("SessionOutsideBridge", "in a thread"),
    "task": ("SessionOutsideBridge", "in a task or function of its own"),
    "two": ("ConcurrentSessionUse", REMEDY),
    "gather": ("ConcurrentSessionUse", REMEDY),
}


@pytest.mark.parametrize("how", MISUSES)
async def test_misuse_is_a_clear_error(app: Served, how: str) -> None:
    """It names the remedy, does no harm to the session, and the request ends clean."""
    async with app.server.client() as client:
        answer = await client.post(f"/misuse/{how}/misused-{how}")
        assert answer.status_code == 200
        error, told = ERRORS[how]
        assert answer.json()["error"] == error
        assert told in answer.json()["text"]
        assert app.stored(f"misused-{how}") == [f"misused-{how}"]

        assert (await client.post(f"/misuse/{how}/raised-{how}?raise=1")).status_code == 500
        assert app.stored(f"raised-{how}") == []
    await app.is_clean()


async def test_use_after_the_end_is_a_clear_error(app: Served) -> None:
    """Nothing is reopened for a task that was left behind."""
    async with app.server.client() as client:
        assert (await client.post("/late/late")).status_code == 200
        errors = (await client.get("/late")).json()
    assert len(errors) == 4
    assert all(error.startswith("SessionFinished: ") and REMEDY in error for error in errors)
    assert app.stored("late") == ["late"]
    await app.is_clean()
