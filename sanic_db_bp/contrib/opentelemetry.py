"""Spans and metrics for OpenTelemetry; needs the extra ``opentelemetry``."""

from __future__ import annotations

import functools
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from typing import Any

from sanic import Request, Sanic
from sanic.response import BaseHTTPResponse
from sqlalchemy.ext.asyncio import AsyncEngine

from ..database import Database
from ..exceptions import ConfigurationError
from ..handling.plan import PLANS
from ..observers import status_of
from ..registry import observers_of
from ._usage import Outcome, PoolName, UsageObserver

try:
    from opentelemetry import metrics, propagate, trace
    from opentelemetry.instrumentation.sqlalchemy.engine import EngineTracer
    from opentelemetry.metrics import Meter, MeterProvider
    from opentelemetry.semconv.metrics import MetricInstruments
    from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, TracerProvider
except ImportError as error:
    raise ConfigurationError(
        "OpenTelemetry needs the package opentelemetry-instrumentation-sqlalchemy. Install it "
        "with: pip install 'sanic-db-bp[opentelemetry]'",
        entry="missing-package",
    ) from error

SCOPE = "sanic_db_bp"
"""The name of this instrumentation."""

_trace_engine: Callable[..., object] = EngineTracer

AFTER_SANIC_EXT = -1003
"""Of the listeners of the start: sanic-ext has read the handlers' signatures by then."""


def install(
    app: Sanic[Any, Any],
    *,
    routes: bool = True,
    tracer_provider: TracerProvider | None = None,
    meter_provider: MeterProvider | None = None,
) -> None:
    """Make a span of each statement, a child of the span of its route, and count.

    The spans of statements are those of opentelemetry-instrumentation-sqlalchemy. Do not switch
    that on for the whole process as well, or every statement has two spans.

    Args:
        app: the app; all its databases are observed.
        routes: make a span of each call of a handler, COMMIT included, where nothing else has made
            one of the request. It continues the trace that the client names in ``traceparent``.
        tracer_provider: who makes the spans; by default the global one.
        meter_provider: who makes the metrics; by default the global one.
    """
    tracer = trace.get_tracer(SCOPE, tracer_provider=tracer_provider)
    meter = metrics.get_meter(SCOPE, meter_provider=meter_provider)
    observers_of(app).append(_Telemetry(tracer, meter))
    if routes:

        async def trace_routes(app: Sanic[Any, Any]) -> None:
            for route in app.router.routes:
                # The others are websockets, and routes of sanic-ext that are made only once.
                if hasattr(route.handler, PLANS):
                    route.handler = _traced(tracer, route.handler)

        app.before_server_start(trace_routes, priority=AFTER_SANIC_EXT)


def traceparent() -> str | None:
    """Return the current span as the header ``traceparent`` names it, or None if there is none.

    For comments in SQL: ``sql_comments.install(app, values={"traceparent": traceparent})``.
    """
    carrier: dict[str, str] = {}
    propagate.inject(carrier)
    return carrier.get("traceparent")


class _Telemetry(UsageObserver):
    def __init__(self, tracer: Tracer, meter: Meter) -> None:
        self._tracer = tracer
        # The names are those of the semantic conventions, as far as they have any.
        self._connections = meter.create_up_down_counter(
            MetricInstruments.DB_CLIENT_CONNECTIONS_USAGE, unit="connections"
        )
        self._wait = meter.create_histogram("db.client.connection.wait_time", unit="s")
        self._hold = meter.create_histogram("db.client.connection.use_time", unit="s")
        self._timeouts = meter.create_counter("db.client.connection.timeouts", unit="{timeout}")
        self._transactions = meter.create_counter("sanic_db.transactions", unit="{transaction}")
        self._retries = meter.create_counter("sanic_db.transaction.retries", unit="{retry}")

    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        # Not by SQLAlchemyInstrumentor: it exists once in a process, takes its engines once, and
        # refuses SQLAlchemy 2.1.
        _trace_engine(self._tracer, engine.sync_engine, self._connections)
        super().engine_made(database, engine, read_only=read_only)

    def given_back(self, pool: PoolName, held: float) -> None:
        self._hold.record(held, _attributes(pool))

    def waited(self, pool: PoolName, seconds: float, found: bool) -> None:
        self._wait.record(seconds, _attributes(pool))
        if not found:
            self._timeouts.add(1, _attributes(pool))

    def transaction_ended(self, database: str, outcome: Outcome) -> None:
        self._transactions.add(1, {"db.client.connection.pool.name": database, "outcome": outcome})

    def retried(self, database: Database) -> None:
        self._retries.add(1, {"db.client.connection.pool.name": database.name})


def _attributes(pool: PoolName) -> dict[str, str]:
    return {"db.client.connection.pool.name": pool.database, "sanic_db.engine": pool.engine}


def _traced(tracer: Tracer, handler: Callable[..., Any]) -> Callable[..., Awaitable[Any]]:
    async def call(request: Request, *args: Any, **kwargs: Any) -> Any:
        async def answer() -> Any:
            response = handler(request, *args, **kwargs)
            return await response if isawaitable(response) else response

        if trace.get_current_span().get_span_context().is_valid:
            return await answer()
        with tracer.start_as_current_span(
            f"{request.method} {request.uri_template}",
            context=propagate.extract(request.headers),
            kind=SpanKind.SERVER,
            attributes={
                "http.request.method": request.method,
                "http.route": request.uri_template or "",
                "url.path": request.path,
            },
            record_exception=False,
            set_status_on_exception=False,
        ) as span:
            try:
                response = await answer()
            except BaseException as error:
                span.set_attribute("error.type", type(error).__qualname__)
                _set_status(span, status_of(observers_of(request.app), error), error)
                raise
            _set_status(span, _status(request, response))
            return response

    return functools.update_wrapper(call, handler)


def _status(request: Request, response: Any) -> int | None:
    if request.responded and request.stream is not None:
        response = request.stream.response
    return response.status if isinstance(response, BaseHTTPResponse) else None


def _set_status(span: Span, status: int | None, error: BaseException | None = None) -> None:
    if status is None:
        return
    span.set_attribute("http.response.status_code", status)
    if status >= 500:
        span.set_status(StatusCode.ERROR)
        if error is not None:
            span.record_exception(error)
