"""How the app tells of its work: each line is an optional part, and any of them may go."""

import os
from typing import Any

from sanic import Sanic

from sanic_db_bp.contrib import (
    held_connections,
    n_plus_one,
    prometheus,
    server_timing,
    sql_comments,
)


def install(app: Sanic[Any, Any]) -> None:
    """All but the traces are always on here; `SANIC_DB_SLOW_QUERY_MS` adds slow statements."""
    n_plus_one.install(app)
    held_connections.install(app, limit=2)
    server_timing.install(app)
    sql_comments.install(app)
    prometheus.install(app, path="/metrics")
    if "TRACES" in os.environ:
        print_traces(app)


def print_traces(app: Sanic[Any, Any]) -> None:
    """Print the spans; an app in earnest sends them to a collector."""
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor

    from sanic_db_bp.contrib import opentelemetry

    provider = TracerProvider()
    provider.add_span_processor(SimpleSpanProcessor(ConsoleSpanExporter()))
    opentelemetry.install(app, tracer_provider=provider)
