"""Metrics of pools and transactions for Prometheus; needs the extra ``prometheus``."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from sanic import HTTPResponse, Request, Sanic
from sanic.response import raw

from ..database import Database
from ..exceptions import ConfigurationError
from ..registry import observers_of
from ._usage import Outcome, PoolName, UsageObserver

try:
    from prometheus_client import (
        CONTENT_TYPE_LATEST,
        REGISTRY,
        CollectorRegistry,
        Counter,
        Gauge,
        Histogram,
        generate_latest,
    )
    from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
except ImportError as error:
    raise ConfigurationError(
        "Prometheus metrics need the package prometheus-client. Install it with: "
        "pip install 'sanic-db-bp[prometheus]'",
        entry="missing-package",
    ) from error

POOL = PoolName._fields

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""The bounds of the histograms."""


def install(
    app: Sanic[Any, Any], *, path: str | None = None, registry: CollectorRegistry = REGISTRY
) -> None:
    """Count what pools and transactions do.

    With several workers set ``PROMETHEUS_MULTIPROC_DIR`` to a folder that is empty at the start
    ("Multiprocess Mode" in the documentation of prometheus-client): whichever worker answers then
    tells the sums of all.

    Args:
        app: the app; all its databases are observed.
        path: a route that tells the metrics, such as ``/metrics``; by default there is none.
        registry: where the metrics are registered.
    """
    observers_of(app).append(_Metrics(_instruments_of(registry)))
    app.register_listener(_forget_worker, "after_server_stop")
    if path is not None:

        async def metrics(_request: Request) -> HTTPResponse:
            body = await asyncio.to_thread(_exposition, registry)
            return raw(body, content_type=CONTENT_TYPE_LATEST)

        app.add_route(metrics, path, name="db_metrics")


_collect_all: Callable[[CollectorRegistry], object] = MultiProcessCollector
_forget_process: Callable[[int], None] = mark_process_dead


def _is_multiprocess() -> bool:
    return "PROMETHEUS_MULTIPROC_DIR" in os.environ


def _exposition(registry: CollectorRegistry) -> bytes:
    if _is_multiprocess():
        registry = CollectorRegistry()
        _collect_all(registry)
    return generate_latest(registry)


async def _forget_worker(_app: Sanic[Any, Any]) -> None:
    if _is_multiprocess():
        _forget_process(os.getpid())


class _Instruments:
    """The metrics in one registry; several apps of a process share them."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.connections = Gauge(
            "sanic_db_pool_connections",
            "Open connections, in use or idle.",
            POOL,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.in_use = Gauge(
            "sanic_db_pool_connections_in_use",
            "Connections that are out of the pool.",
            POOL,
            registry=registry,
            multiprocess_mode="livesum",
        )
        self.wait = Histogram(
            "sanic_db_pool_wait_seconds",
            "Time until a connection was there.",
            POOL,
            registry=registry,
            buckets=SECONDS,
        )
        self.hold = Histogram(
            "sanic_db_pool_hold_seconds",
            "Time that a connection was out of the pool.",
            POOL,
            registry=registry,
            buckets=SECONDS,
        )
        self.failures = Counter(
            "sanic_db_pool_failures",
            "Waits that ended without a connection.",
            POOL,
            registry=registry,
        )
        self.transactions = Counter(
            "sanic_db_transactions",
            "Transactions of sessions by how they ended.",
            ("database", "outcome"),
            registry=registry,
        )
        self.retries = Counter(
            "sanic_db_transaction_retries",
            "Transactions that ran again after they had lost a race.",
            ("database",),
            registry=registry,
        )


_instruments: WeakKeyDictionary[CollectorRegistry, _Instruments] = WeakKeyDictionary()


def _instruments_of(registry: CollectorRegistry) -> _Instruments:
    if registry not in _instruments:
        _instruments[registry] = _Instruments(registry)
    return _instruments[registry]


class _Metrics(UsageObserver):
    def __init__(self, instruments: _Instruments) -> None:
        self._to = instruments

    def opened(self, pool: PoolName) -> None:
        self._to.connections.labels(*pool).inc()

    def closed(self, pool: PoolName) -> None:
        self._to.connections.labels(*pool).dec()

    def taken(self, pool: PoolName) -> None:
        self._to.in_use.labels(*pool).inc()

    def given_back(self, pool: PoolName, held: float) -> None:
        self._to.in_use.labels(*pool).dec()
        self._to.hold.labels(*pool).observe(held)

    def waited(self, pool: PoolName, seconds: float, found: bool) -> None:
        self._to.wait.labels(*pool).observe(seconds)
        if not found:
            self._to.failures.labels(*pool).inc()

    def transaction_ended(self, database: str, outcome: Outcome) -> None:
        self._to.transactions.labels(database, outcome.replace(" ", "_")).inc()

    def retried(self, database: Database) -> None:
        self._to.retries.labels(database.name).inc()
