"""Observers are told of everything that a database is made of, at each start."""

import logging
from typing import Any

import pytest
from sanic import HTTPResponse, Request, empty, text
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError, StatementError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import AsyncReadSession, Database, DatabaseSettings, ReadSession, observers
from sanic_db_bp.observers import Execution, on_execution
from sanic_db_bp.registry import observers_of
from tests.serving import serving
from tests.shop import Base, Observer, Shop, doom, make_app


class Register(observers.Observer):
    """Notes what it is told."""

    def __init__(self) -> None:
        self.engines: list[bool] = []
        self.session_classes: list[type[Session]] = []
        self.statements: list[str] = []

    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        self.engines.append(read_only)
        on_execution(engine, self.executed)

    def session_class_made(
        self, database: Database, session_class: type[Session], *, read_only: bool
    ) -> None:
        assert issubclass(session_class, ReadSession) is read_only
        self.session_classes.append(session_class)

    def executed(self, execution: Execution) -> None:
        self.statements.append(execution.statement)


def two_sessions(app: Shop) -> None:
    """Add a route that uses a session of either kind."""

    @app.get("/")
    async def handle(
        request: Request, session: AsyncSession, reads: AsyncReadSession
    ) -> HTTPResponse:
        await session.execute(sql("SELECT 41"))
        await reads.execute(sql("SELECT 42"))
        return empty()


async def test_an_observer_sees_both_engines_at_each_start(database_url: str) -> None:
    """Engines and session classes of a second start are new, and observed again."""
    app = make_app(database_url, create_tables=False)
    two_sessions(app)
    register = Register()
    observers_of(app).append(register)
    for start in (1, 2):
        async with serving(app) as client:
            assert (await client.get("/")).status_code == 204
        assert register.engines == [False, True] * start
        assert len(set(register.session_classes)) == 2 * start
        routers: list[Any] = [app.router, app.signal_router]
        for router in routers:
            router.reset()
    statements = [each for each in register.statements if each in ("SELECT 41", "SELECT 42")]
    assert statements == ["SELECT 41", "SELECT 42"] * 2


async def test_a_slow_statement_names_the_request(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The line in the log leads to the handler, and to the other lines of its request."""
    app = make_app(database_url, slow_query_ms=0.000001, create_tables=False)
    two_sessions(app)
    async with serving(app) as client:
        caplog.clear()
        await client.get("/", headers={"X-Request-ID": "r-17"})
        await app.ctx.db.run_sync(lambda session: session.execute(sql("SELECT 43")))
    found: dict[object, Any] = {
        record.args[-2]: record
        for record in caplog.records
        if record.levelno == logging.WARNING and isinstance(record.args, tuple)
    }
    for statement in ("SELECT 41", "SELECT 42"):
        route = f"GET / ({app.name}.handle)"
        assert f"in {route}, request r-17: {statement}" in found[statement].message
        assert (found[statement].route, found[statement].request_id) == (route, "r-17")
    assert found["SELECT 43"].route is None


async def test_requests_on_one_connection_are_told_apart(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Requests on a keep-alive connection share a context, and not their names."""
    app = make_app(database_url, slow_query_ms=0.000001, create_tables=False)

    @app.get("/<number:int>")
    async def handle(request: Request, number: int, session: Session) -> HTTPResponse:
        return text(str(session.scalar(sql(f"SELECT {number}"))))

    async with serving(app) as client:
        for number in (1, 2, 3):
            await client.get(f"/{number}")
            assert f"in GET /{number} ({app.name}.handle)" in caplog.messages[-1]


async def test_a_statement_that_was_never_sent_was_not_executed(database_url: str) -> None:
    """One that lacks a value fails before it reaches the driver."""
    register = Register()
    db = Database(DatabaseSettings(url=database_url, env_file=None), observers=[register])
    async with db.session() as session:
        with pytest.raises(StatementError, match="value is required"):
            await session.execute(sql("SELECT :number"))
    await db.dispose()
    assert not any("number" in each for each in register.statements)


async def test_a_commit_that_fails_is_no_statement(database_url: str) -> None:
    """Its error belongs to none that was executed."""
    register = Register()
    db = Database(DatabaseSettings(url=database_url, env_file=None), observers=[register])
    await db.create_missing_tables(Base.metadata)

    async def work() -> None:
        async with db.session() as session:
            await doom(session, Observer(database_url))
            register.statements.clear()

    with pytest.raises(DBAPIError):
        await work()
    await db.dispose()
    assert register.statements == []
