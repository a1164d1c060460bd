"""The COMMIT fails, and the client is told."""

from __future__ import annotations

import pytest

from tests.faults.app import WRITERS
from tests.faults.serving import Served
from tests.shop import eventually

pytestmark = pytest.mark.asyncio(loop_scope="session")

DOOMS = {
    "sqlite": ("constraint", "full"),
    "postgresql": ("constraint", "killed"),
    "mysql": ("killed",),
}


def _errors(app: Served) -> list[str]:
    return [line for line in app.server.new_lines() if "ERROR" in line]


async def _error(app: Served) -> str:
    """The log may come later than the answer."""
    errors: list[str] = []

    def logged() -> list[str]:
        errors.extend(_errors(app))
        return errors

    await eventually(logged, within=10)
    assert len(errors) == 1
    return errors[0]


@pytest.mark.parametrize("kind", WRITERS)
async def test_a_failing_commit_reaches_the_client(app: Served, kind: str) -> None:
    """Nothing is stored, one line of the log has the route, and the next request is served."""
    app.server.new_lines()
    async with app.server.client() as client:
        for doom in DOOMS[app.target.observer.kind]:
            name = f"{doom}-{kind}"
            answer = await client.post(f"/write/{kind}/{name}?doom={doom}")
            await client.post("/room") if doom == "full" else None

            assert answer.status_code in (500, 503)
            assert app.stored(name) == await app.committed(name) == []
            assert f"POST /write/{kind}/{name} " in await _error(app)
            assert (await client.post(f"/write/{kind}/fine-{name}")).status_code == 200
            assert len(app.stored(f"fine-{name}")) == 2
    await app.is_clean()
    assert _errors(app) == []


@pytest.mark.parametrize("kind", WRITERS)
async def test_the_users_own_answer_wins(app: Served, kind: str) -> None:
    """An exception handler of the app sees the database's error."""
    async with app.server.client() as client:
        for doom in DOOMS[app.target.observer.kind]:
            answer = await client.post(f"/write/{kind}/own-{doom}-{kind}?doom={doom}&own=1")
            await client.post("/room") if doom == "full" else None
            assert answer.status_code == 418
    assert app.stored("own") == []
    await app.is_clean()
