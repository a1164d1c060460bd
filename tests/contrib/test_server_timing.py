"""The figures of a request: on its context and in a header."""

import asyncio
import re

import pytest
from sanic import HTTPResponse, Request, empty, json
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import AsyncReadSession, DatabaseBlueprint
from sanic_db_bp.contrib import server_timing
from tests.databases import on_sqlite
from tests.serving import serving
from tests.shop import Shop, make_app


class Second(Session):
    """The plain session of the second database."""


class AsyncSecond(AsyncSession):
    """The asyncio session of the second database."""


class Reads(AsyncReadSession):
    """Nobody asks for it."""


class Dependency:
    """Executes a statement before any middleware runs."""

    def __init__(self, session: Session) -> None:
        session.execute(text("SELECT 1"))


def timed_app(database_url: str, *, header: bool = True) -> Shop:
    app = make_app(database_url, create_tables=False)
    server_timing.install(app, header=header)

    @app.get("/<number:int>")
    async def handle(
        request: Request, number: int, session: AsyncSession, reads: AsyncReadSession
    ) -> HTTPResponse:
        for _ in range(number):
            await session.execute(text("SELECT 1"))
            await reads.execute(text("SELECT 1"))
        usage = request.ctx.db_usage["db"]
        return json([usage.queries, usage.seconds])

    @app.get("/fails")
    async def fails(request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(text("SELECT nothing"))
        return empty()

    @app.exception(DBAPIError)
    async def explain(request: Request, error: DBAPIError) -> HTTPResponse:
        return json([usage.queries for usage in request.ctx.db_usage.values()])

    return app


async def test_statements_are_counted_and_timed(database_url: str) -> None:
    """Those of both engines, for each request by itself, on one connection too."""
    async with serving(timed_app(database_url)) as client:
        for number in (3, 1, 3):
            answer = await client.get(f"/{number}")
            queries, seconds = answer.json()
            assert queries == 2 * number
            shown = re.fullmatch(
                rf'db;dur=([\d.]+);desc="{queries} queries"', answer.headers["Server-Timing"]
            )
            assert shown is not None
            assert float(shown[1]) == pytest.approx(seconds * 1000, abs=0.051)
            assert seconds > 0


async def test_a_request_without_statements_has_no_header(database_url: str) -> None:
    """There is nothing to tell, and its counters are at zero."""
    async with serving(timed_app(database_url)) as client:
        answer = await client.get("/0")
        assert answer.json() == [0, 0.0]
        assert "Server-Timing" not in answer.headers


async def test_the_header_can_be_left_out(database_url: str) -> None:
    """The figures are for the app alone then."""
    async with serving(timed_app(database_url, header=False)) as client:
        answer = await client.get("/2")
        assert answer.json()[0] == 4
        assert "Server-Timing" not in answer.headers


async def test_a_statement_that_fails_counts(database_url: str) -> None:
    """The answer to an error has the figures too."""
    async with serving(timed_app(database_url)) as client:
        answer = await client.get("/fails")
        assert answer.json() == [1]
        assert answer.headers["Server-Timing"].endswith('desc="1 query"')


@on_sqlite
async def test_simultaneous_requests_have_counters_of_their_own(database_url: str) -> None:
    """A statement counts for the request that has executed it."""
    async with serving(timed_app(database_url)) as client:
        answers = await asyncio.gather(*(client.get(f"/{number}") for number in range(8)))
    assert [answer.json()[0] for answer in answers] == [2 * number for number in range(8)]


@on_sqlite
async def test_what_a_dependency_executes_counts(database_url: str) -> None:
    """Dependencies are made before the middleware runs."""
    app = timed_app(database_url)
    app.ext.add_dependency(Dependency)

    @app.get("/dependent")
    async def dependent(request: Request, dependency: Dependency) -> HTTPResponse:
        return json(request.ctx.db_usage["db"].queries)

    async with serving(app) as client:
        assert (await client.get("/dependent")).json() == 1


@on_sqlite
async def test_each_database_has_figures_of_its_own(database_url: str) -> None:
    """A database that is registered after the installation is observed all the same."""
    app = timed_app(database_url)
    app.blueprint(
        DatabaseBlueprint(
            "second",
            url="sqlite://",
            session_class=Second,
            async_session_class=AsyncSecond,
            async_read_session_class=Reads,
            read_session_class=type("PlainReads", (Reads.sync_session_class,), {}),
        )
    )

    @app.get("/both")
    async def both(request: Request, session: Session, second: Second) -> HTTPResponse:
        session.execute(text("SELECT 1"))
        second.execute(text("SELECT 1"))
        second.execute(text("SELECT 2"))
        return empty()

    async with serving(app) as client:
        header = (await client.get("/both")).headers["Server-Timing"]
    assert re.fullmatch(r'db;dur=\S+;desc="1 query", second;dur=\S+;desc="2 queries"', header)
