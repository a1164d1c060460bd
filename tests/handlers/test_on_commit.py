"""on_commit runs after the COMMIT of a request, and never after a rollback."""

import asyncio
from typing import Any

import pytest
from sanic import HTTPResponse, Request, text
from sqlalchemy.ext.asyncio import AsyncSession

from sanic_db_bp import on_commit, transactional
from tests.databases import on_postgresql
from tests.handlers.helpers import Rival, racing_app, stock_apples
from tests.serving import serving
from tests.shop import Item, Observer, Shop, checked_out, doom, errors


async def test_on_commit_runs_after_the_commit(app: Shop, observer: Observer) -> None:
    """A callback sees the row, before the answer is sent; after a rollback there is no call."""
    calls: list[Any] = []

    async def call() -> None:
        calls.append((observer.names(), checked_out(app)))

    @app.post("/<status:int>")
    async def add(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        on_commit(call)
        on_commit(lambda: calls.append("plain"))
        session.add(Item(name="apple"))
        await session.flush()
        return text("answered", status)

    async with serving(app) as client:
        await client.post("/400")
        assert calls == []
        await client.post("/200")
        assert calls == [(["apple"], 0), "plain"]


async def test_on_commit_is_forgotten_when_the_commit_fails(app: Shop, observer: Observer) -> None:
    """A callback is not called if the transaction was not stored."""
    calls: list[int] = []

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        on_commit(lambda: calls.append(1))
        await doom(session, observer)
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code >= 500
        assert calls == []


async def test_on_commit_runs_once_after_retries(database_url: str, observer: Observer) -> None:
    """A callback of a run that was rolled back is forgotten."""
    app = racing_app(database_url)
    rival = Rival(observer, times=2)
    calls: list[int] = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        on_commit(lambda: calls.append(1))
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 200
        assert calls == [1]


@on_postgresql
async def test_an_error_in_on_commit_changes_nothing(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The client still reads of the success, and the error is logged."""

    def fail() -> None:
        raise ValueError("no mail")

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        on_commit(fail)
        session.add(Item(name="apple"))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple"]
        [line] = errors(caplog)
        assert "on_commit" in line.getMessage()
        assert line.exc_info is not None


@on_postgresql
async def test_a_callback_that_waits_for_something_cancelled_changes_nothing(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """It is logged as an error of the callback; the request is not cancelled, and the rest runs."""
    calls: list[int] = []

    async def wait() -> None:
        task = asyncio.ensure_future(asyncio.sleep(5))
        task.cancel()
        await task

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        on_commit(wait)
        on_commit(lambda: calls.append(1))
        session.add(Item(name="apple"))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["apple"]
        assert calls == [1]
        [line] = errors(caplog)
        assert "on_commit" in line.getMessage()
