"""Spans of statements are children of their route, and metrics come with them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from itertools import count
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from sanic import HTTPResponse, Request, empty, json
from sanic.exceptions import NotFound
from sanic.response import ResponseStream
from sanic.views import HTTPMethodView
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from websockets.asyncio.client import connect

from sanic_db_bp import AsyncReadSession, Database, DatabaseUnavailable, transactional
from sanic_db_bp.contrib import errors, opentelemetry, sql_comments
from tests.databases import on_postgresql, on_sqlite
from tests.serving import serving
from tests.shop import (
    Base,
    Observer,
    Shop,
    SlowQuery,
    asgi_serving,
    doom,
    eventually,
    make_app,
    raw_client,
)

TRACE_ID = "0af7651916cd43dd8448eb211c80319c"
TRACEPARENT = f"00-{TRACE_ID}-b7ad6b7169203331-01"


class Telemetry:
    """Everything that was recorded."""

    def __init__(self) -> None:
        self._exporter = InMemorySpanExporter()
        self.tracers = TracerProvider()
        self.tracers.add_span_processor(SimpleSpanProcessor(self._exporter))
        self._reader = InMemoryMetricReader()
        self.meters = MeterProvider([self._reader])

    def install(self, app: Shop, **options: Any) -> None:
        opentelemetry.install(
            app, tracer_provider=self.tracers, meter_provider=self.meters, **options
        )

    @property
    def spans(self) -> list[ReadableSpan]:
        """The spans that have ended, without those of the start."""
        return [
            span
            for span in self._exporter.get_finished_spans()
            if span.kind is SpanKind.SERVER or span.parent is not None
        ]

    @property
    def routes(self) -> list[ReadableSpan]:
        return [span for span in self.spans if span.kind is SpanKind.SERVER]

    def statements(self, route: ReadableSpan) -> list[str]:
        """The statements that ran below a route, as far as they are SELECTs."""
        found = [span for span in self.spans if span.parent == route.context]
        texts = [str(dict(span.attributes or {})["db.statement"]) for span in found]
        return [each for each in texts if each.startswith("SELECT")]

    def metrics(self) -> dict[tuple[str, ...], Any]:
        """The values, by the name and its attributes."""
        data = self._reader.get_metrics_data()
        return {
            (metric.name, *map(str, (point.attributes or {}).values())): point
            for resource in (data.resource_metrics if data else [])
            for scope in resource.scope_metrics
            for metric in scope.metrics
            for point in metric.data.data_points
        }


@pytest.fixture
def telemetry() -> Iterator[Telemetry]:
    recorded = Telemetry()
    yield recorded
    recorded.tracers.shutdown()
    recorded.meters.shutdown()


class Dependency:
    """A dependency that uses a session."""

    def __init__(self, session: Session) -> None:
        self.number = session.scalar(text("SELECT 12"))


class View(HTTPMethodView):
    """A class-based view."""

    async def get(self, request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(text("SELECT 1"))
        return empty()


def traced_app(database_url: str, telemetry: Telemetry, **options: Any) -> Shop:
    app = make_app(database_url, create_tables=False)
    telemetry.install(app, **options)

    @app.get("/plain/<number:int>")
    def plain(request: Request, number: int, session: Session) -> HTTPResponse:
        session.execute(text("SELECT 1"))
        session.execute(text("SELECT 2"))
        return empty()

    @app.get("/asyncio/<number:int>")
    async def asynchronous(
        request: Request, number: int, session: AsyncSession, reads: AsyncReadSession
    ) -> HTTPResponse:
        await session.execute(text("SELECT 1"))
        await asyncio.create_task(reads.execute(text("SELECT 2")))
        return empty()

    @app.get("/block/<number:int>")
    async def block(request: Request, number: int, db: Database) -> HTTPResponse:
        async with db.session() as session:
            await session.execute(text("SELECT 1"))
        await db.run_sync(lambda session: session.execute(text("SELECT 2")))
        return empty()

    app.add_route(View.as_view(), "/view")
    return app


@pytest.mark.parametrize("path", ["plain", "asyncio", "block"])
async def test_statements_are_children_of_their_route(
    database_url: str, telemetry: Telemetry, path: str
) -> None:
    """Whatever the kind of session; the spans of simultaneous requests do not mix."""
    async with serving(traced_app(database_url, telemetry)) as client:
        await asyncio.gather(*(client.get(f"/{path}/{number}") for number in range(3)))
    assert sorted(str((span.attributes or {})["url.path"]) for span in telemetry.routes) == [
        f"/{path}/{number}" for number in range(3)
    ]
    for route in telemetry.routes:
        assert route.name == f"GET /{path}/<number:int>"
        assert (route.attributes or {})["http.response.status_code"] == 204
        assert telemetry.statements(route) == ["SELECT 1", "SELECT 2"]
        assert route.parent is None


async def test_the_trace_of_the_client_goes_on(database_url: str, telemetry: Telemetry) -> None:
    """For the request that names one, and not for the next on the same connection."""
    async with serving(traced_app(database_url, telemetry)) as client:
        await client.get("/plain/1", headers={"traceparent": TRACEPARENT})
        await client.get("/plain/2")
    first, second = telemetry.routes
    assert first.parent is not None
    assert f"{first.context.trace_id:032x}" == TRACE_ID
    assert first.parent.span_id == 0xB7AD6B7169203331
    assert second.parent is None
    assert second.context.trace_id != first.context.trace_id


async def test_views_are_traced_too(database_url: str, telemetry: Telemetry) -> None:
    """A view is one route for all its methods."""
    async with serving(traced_app(database_url, telemetry)) as client:
        assert (await client.get("/view")).status_code == 204
    (route,) = telemetry.routes
    assert route.name == "GET /view"
    assert telemetry.statements(route) == ["SELECT 1"]


@on_sqlite
async def test_a_span_that_is_there_is_the_parent(database_url: str, telemetry: Telemetry) -> None:
    """Another instrumentation, such as that of ASGI, may have made the request's span."""
    app = traced_app(database_url, telemetry)
    tracer = telemetry.tracers.get_tracer("other")
    async with asgi_serving(app) as server:
        with tracer.start_as_current_span("request") as outer:
            answer = await server.request("GET", "/asyncio/1")
        assert answer.status == 204
    assert telemetry.routes == []
    statements = [span for span in telemetry.spans if span.parent == outer.get_span_context()]
    assert len(statements) >= 2


@on_sqlite
async def test_spans_of_routes_can_be_left_out(database_url: str, telemetry: Telemetry) -> None:
    """Statements have spans all the same."""
    app = traced_app(database_url, telemetry, routes=False)

    @app.get("/own")
    async def own(request: Request, session: AsyncSession) -> HTTPResponse:
        with telemetry.tracers.get_tracer("own").start_as_current_span("mine") as mine:
            await session.execute(text("SELECT 1"))
        return json(mine.get_span_context().span_id)

    async with serving(app) as client:
        mine = (await client.get("/own")).json()
    assert telemetry.routes == []
    assert {span.parent.span_id for span in telemetry.spans if span.parent} == {mine}


async def test_a_failed_statement_is_an_error_of_both_spans(
    database_url: str, telemetry: Telemetry
) -> None:
    """The route's span has the exception."""
    app = traced_app(database_url, telemetry)

    @app.get("/fails")
    async def fails(request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(text("SELECT nothing"))
        return empty()

    async with serving(app) as client:
        assert (await client.get("/fails")).status_code == 500
    (route,) = telemetry.routes
    assert route.status.status_code is StatusCode.ERROR
    assert (route.attributes or {})["http.response.status_code"] == 500
    assert [each.name for each in route.events] == ["exception"]
    (failed,) = [
        span
        for span in telemetry.spans
        if span.parent == route.context and span.status.status_code is StatusCode.ERROR
    ]
    assert (failed.attributes or {})["db.statement"] == "SELECT nothing"


async def test_a_failed_commit_is_an_error_of_the_route(
    database_url: str, telemetry: Telemetry
) -> None:
    """COMMIT belongs to the span of the route."""
    app, observer = traced_app(database_url, telemetry), Observer(database_url)

    @app.before_server_start
    async def create(app: Shop) -> None:
        await app.ctx.db.create_missing_tables(Base.metadata)

    @app.get("/doomed")
    async def doomed(request: Request, session: AsyncSession) -> HTTPResponse:
        await doom(session, observer)
        return empty()

    async with serving(app) as client:
        assert (await client.get("/doomed")).status_code >= 500
    (route,) = telemetry.routes
    assert route.status.status_code is StatusCode.ERROR


@on_sqlite
async def test_an_error_that_is_answered_has_the_status_of_its_answer(
    database_url: str, telemetry: Telemetry
) -> None:
    """A row that is not there is a 404 by ``errors.install``, and no failure of the server."""
    app = traced_app(database_url, telemetry)
    errors.install(app)

    @app.get("/missing")
    async def missing(request: Request, session: AsyncSession) -> HTTPResponse:
        (await session.execute(text("SELECT 1 WHERE 1 = 0"))).one()
        raise AssertionError("not reached")

    async with serving(app) as client:
        assert (await client.get("/missing")).status_code == 404
    (route,) = telemetry.routes
    assert route.status.status_code is StatusCode.UNSET
    assert (route.attributes or {})["http.response.status_code"] == 404


@on_sqlite
async def test_an_answer_that_is_no_failure_is_no_error(
    database_url: str, telemetry: Telemetry
) -> None:
    """What a client asked for in vain is not what somebody should be woken up for."""
    app = traced_app(database_url, telemetry)

    @app.get("/missing")
    async def missing(request: Request, session: AsyncSession) -> HTTPResponse:
        raise NotFound

    @app.get("/streamed")
    async def streamed(request: Request, session: AsyncSession) -> None:
        response = await request.respond(status=202)
        await session.execute(text("SELECT 1"))
        await response.send("x")

    @app.get("/broken")
    async def broken(request: Request, session: AsyncSession) -> HTTPResponse:
        return empty(503)

    async with serving(app) as client:
        for path in ("missing", "streamed", "broken"):
            await client.get(f"/{path}")
    assert [(span.attributes or {})["http.response.status_code"] for span in telemetry.routes] == [
        *(404, 202, 503)
    ]
    assert [span.status.status_code for span in telemetry.routes] == [
        *(StatusCode.UNSET, StatusCode.UNSET, StatusCode.ERROR)
    ]
    assert telemetry.statements(telemetry.routes[1]) == ["SELECT 1"]


async def test_the_spans_of_a_client_that_leaves_come_to_an_end(
    database_url: str, telemetry: Telemetry
) -> None:
    """Both that of the statement and that of the route are exported."""
    app, query = traced_app(database_url, telemetry), SlowQuery(Observer(database_url))

    @app.get("/slow")
    async def slow(request: Request, session: AsyncSession) -> HTTPResponse:
        await query.run(session)
        return empty()

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("GET /slow HTTP/1.1")
        await query.begun()
        leaver.leave()
        await eventually(lambda: telemetry.routes, within=10)
    (route,) = telemetry.routes
    assert (route.attributes or {})["error.type"] == "CancelledError"
    assert any(span.parent == route.context for span in telemetry.spans)


async def test_metrics_of_pools_and_transactions(database_url: str, telemetry: Telemetry) -> None:
    """The names are those of the semantic conventions where they have one."""
    async with serving(traced_app(database_url, telemetry)) as client:
        for _ in range(3):
            await client.get("/plain/1")
        metrics = telemetry.metrics()
        assert metrics["sanic_db.transactions", "db", "committed"].value == 3
        assert metrics["db.client.connection.wait_time", "db", "write"].count >= 3
        assert metrics["db.client.connection.use_time", "db", "write"].sum > 0
        assert metrics["db.client.connections.usage", "db", "idle"].value == 1
        assert metrics["db.client.connections.usage", "db", "used"].value == 0


@on_postgresql
async def test_comments_in_sql_can_name_the_current_span(
    database_url: str, telemetry: Telemetry
) -> None:
    """The two parts work together: the database's log leads to the trace."""
    app = traced_app(database_url, telemetry)
    sql_comments.install(app, keys=(), values={"traceparent": opentelemetry.traceparent})

    @app.get("/own")
    async def own(request: Request, session: AsyncSession) -> HTTPResponse:
        own = "SELECT query FROM pg_stat_activity WHERE pid = pg_backend_pid()"
        return json(await session.scalar(text(own)))

    async with serving(app) as client:
        statement = (await client.get("/own")).json()
    (route,) = telemetry.routes
    assert re.search(
        rf"/\*traceparent='00-{route.context.trace_id:032x}-{route.context.span_id:016x}-0\d'\*/$",
        statement,
    )
    assert opentelemetry.traceparent() is None


async def test_a_second_start_is_traced_once(database_url: str, telemetry: Telemetry) -> None:
    """Handlers are wrapped anew at each start, and not twice."""
    app = traced_app(database_url, telemetry)
    for start in (1, 2):
        async with serving(app) as client:
            await client.get("/plain/1")
        assert len(telemetry.routes) == start
        assert telemetry.statements(telemetry.routes[-1]) == ["SELECT 1", "SELECT 2"]
        routers: list[Any] = [app.router, app.signal_router]
        for router in routers:
            router.reset()


@on_sqlite
async def test_a_websocket_has_no_span_of_its_own(database_url: str, telemetry: Telemetry) -> None:
    """It may stay open for days; the statements of its messages have spans."""
    app = traced_app(database_url, telemetry)

    async def talk(request: Request, socket: Any, db: Database) -> None:
        async for message in socket:
            async with db.session() as session:
                await socket.send(str(await session.scalar(text(message))))

    app.add_websocket_route(talk, "/socket")
    async with serving(app) as client:
        address = f"ws://{client.base_url.netloc.decode()}/socket"
        async with connect(address) as socket:
            await socket.send("SELECT 12")
            assert await socket.recv() == "12"
    assert telemetry.routes == []


@on_sqlite
async def test_a_stream_that_is_returned_runs_after_its_span(
    database_url: str, telemetry: Telemetry
) -> None:
    """Its statements still have spans; they belong to no route."""
    app = traced_app(database_url, telemetry)

    @app.get("/stream")
    async def stream(request: Request, session: AsyncSession) -> ResponseStream:
        async def rows(response: Any) -> None:
            await session.execute(text("SELECT 1"))
            await response.write("x")

        return ResponseStream(rows)

    async with serving(app) as client:
        assert (await client.get("/stream")).text == "x"
    assert len(telemetry.routes) == 1
    assert trace.get_current_span() is trace.INVALID_SPAN


@on_postgresql
async def test_vain_waits_and_retries_are_counted(database_url: str, telemetry: Telemetry) -> None:
    """A pool of one, and a transaction that has lost a race."""
    app = make_app(database_url, pool_size=1, max_overflow=0, pool_timeout=0.05)
    telemetry.install(app)
    observer, runs = Observer(database_url), count(1)

    @app.get("/again")
    @transactional(isolation="REPEATABLE READ", retries=2)
    async def again(request: Request, session: AsyncSession) -> HTTPResponse:
        stock = await session.scalar(text("SELECT stock FROM item"))
        if next(runs) == 1:
            observer.run("UPDATE item SET stock = 1")
        await session.execute(text("UPDATE item SET stock = stock + 1"))
        return json(stock)

    async with serving(app) as client:
        observer.run("INSERT INTO item (name, stock) VALUES ('plum', 0)")
        assert (await client.get("/again")).json() == 1
        async with app.ctx.db.session() as session:
            await session.execute(text("SELECT 1"))
            with pytest.raises(DatabaseUnavailable):
                await app.ctx.db.ping()
        metrics = telemetry.metrics()
    assert metrics["sanic_db.transaction.retries", "db"].value == 1
    assert metrics["db.client.connection.timeouts", "db", "write"].value == 1
