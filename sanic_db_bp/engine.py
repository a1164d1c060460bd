"""From settings to an engine: read-write, or for reading alone. Nothing is connected here."""

from __future__ import annotations

import asyncio
import logging
from contextvars import Context
from reprlib import Repr
from typing import Any, cast

from sqlalchemy import Dialect, event
from sqlalchemy.engine import URL
from sqlalchemy.exc import ArgumentError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from .bridge import await_only, run_in_bridge
from .connections.commit import guard_commits
from .connections.liveness import watch
from .connections.pool import FairPool
from .connections.unobserved import UnobservedConnection
from .dialects import CONNECT_TIMEOUT, Backend, backend_of
from .exceptions import ConfigurationError, DatabaseUnavailable
from .observers import Execution, FindOrigin, on_execution
from .passwords import rotate
from .settings import DatabaseSettings

logger = logging.getLogger("sanic.root.db")

_SHORT = Repr()
_SHORT.maxdict = _SHORT.maxtuple = _SHORT.maxlist = 20
_SHORT.maxstring = _SHORT.maxother = 100


def make_engine(
    settings: DatabaseSettings,
    url: URL,
    *,
    name: str = "db",
    read_only: bool = False,
    connections: int | None = None,
    origin: FindOrigin = lambda: None,
) -> AsyncEngine:
    """Build an engine.

    Args:
        settings: how the database is used.
        url: where it is, with the driver to use.
        name: the database's name in errors and logs.
        read_only: an engine on which every statement is a transaction of its own and the database
            refuses to write ("Engine Disposal" and "Understanding the DBAPI-Level Autocommit
            Isolation Level" in SQLAlchemy's documentation).
        connections: at most so many; by default ``POOL_SIZE`` + ``MAX_OVERFLOW``.
        origin: tells on whose behalf a slow statement ran.

    Returns:
        The engine; it connects when it is first used.
    """
    backend = backend_of(url)
    url, connect_args = backend.connect_args(url, settings, read_only=read_only)
    options = {
        **_pool_options(settings, backend, connections, read_only=read_only),
        **_isolation(settings, read_only=read_only),
        **backend.engine_options(settings, read_only=read_only),
        "echo": settings.echo,
        "pool_logging_name": name,
        "connect_args": backend.with_users(connect_args, settings.connect_args),
        **settings.engine_options,
    }
    try:
        engine = create_async_engine(url, **options)
    except (TypeError, ArgumentError) as error:
        raise ConfigurationError(
            f"ENGINE_OPTIONS: SQLAlchemy refuses them: {error}", entry="engine-options"
        ) from None
    backend.prepare(engine.sync_engine, settings, read_only=read_only)
    if password := settings.rotating_password(read_only=read_only):
        rotate(engine.dialect, password)
    engine.sync_engine._connection_cls = UnobservedConnection
    transactions = not read_only or settings.pgbouncer
    if not backend.one_writer:
        patience = settings.pool_timeout
        stop = watch(engine.sync_engine, name, patience, transactions=transactions)
        if isinstance(engine.pool, FairPool):
            type(engine.pool).on_dispose += (stop,)
    _explain_failed_connects(engine, name)
    if transactions:
        guard_commits(engine, backend)
    if settings.slow_query_ms is not None:
        _log_slow_statements(engine, settings, name, origin)
    return engine


def _pool_options(
    settings: DatabaseSettings, backend: Backend, connections: int | None, *, read_only: bool
) -> dict[str, Any]:
    options: dict[str, Any] = {"pool_recycle": settings.pool_recycle}
    if settings.pool_pre_ping:
        options["pool_pre_ping"] = True
    if "poolclass" in settings.engine_options or "pool" in settings.engine_options:
        return options
    size, overflow = settings.pool_size, settings.max_overflow
    if connections is not None:
        size = min(size, connections)
        overflow = min(overflow, connections - size)
    if backend.one_writer and not read_only:
        size, overflow = 1, 0
    return {
        **options,
        "poolclass": type(
            "FairPool",
            (FairPool,),
            {"is_closed": staticmethod(backend.is_closed), "under_way": set()},
        ),
        "pool_size": size,
        "max_overflow": overflow,
        "pool_timeout": settings.pool_timeout,
    }


def share_of(settings: DatabaseSettings, workers: int, *, read_only: bool) -> int | None:
    """Return how many of ``MAX_CONNECTIONS`` an engine has, or None if there is no such limit.

    Raises:
        ConfigurationError: there are too few for so many workers.
    """
    if settings.max_connections is None:
        return None
    share = settings.max_connections // workers
    if share < 2:
        raise ConfigurationError(
            f"MAX_CONNECTIONS is {settings.max_connections}, and each of {workers} "
            "workers needs two at least: one to write and one to read",
            entry="max-connections",
        )
    return share // 2 if read_only else share - share // 2


def pool_limit(
    settings: DatabaseSettings, backend: Backend, connections: int | None, *, read_only: bool
) -> int | None:
    """Return how many connections an engine opens at most, or None if nobody can tell."""
    ours = _pool_options(settings, backend, connections, read_only=read_only)
    options = {**ours, **settings.engine_options}
    size, overflow = options.get("pool_size", 0), options.get("max_overflow", 0)
    return size + overflow if size > 0 and overflow >= 0 else None


def _isolation(settings: DatabaseSettings, *, read_only: bool) -> dict[str, Any]:
    if read_only and not settings.pgbouncer:
        return {"isolation_level": "AUTOCOMMIT", "skip_autocommit_rollback": True}
    return {"isolation_level": settings.isolation_level} if settings.isolation_level else {}


def _explain_failed_connects(engine: AsyncEngine, name: str) -> None:
    @event.listens_for(engine.sync_engine, "do_connect")
    def connect(dialect: Dialect, _record: object, args: Any, arguments: dict[str, Any]) -> Any:
        limit = arguments.get("connect_timeout") or arguments.get("timeout") or CONNECT_TIMEOUT

        async def attempt() -> Any:
            # Some drivers bound the way to the server alone, and not its answer. They may also
            # succeed after a cancellation, and wait_for() would then lose the connection.
            async with asyncio.timeout(float(limit)):
                return await run_in_bridge(dialect.connect, *args, **arguments)

        # asyncio keeps the context in which a socket was opened, or a timer set, for as long as
        # these live: in a request's own, its body would stay in memory.
        task = asyncio.get_running_loop().create_task(attempt(), context=Context())
        try:
            return await_only(task)
        except asyncio.CancelledError:
            if task.done() and not task.cancelled() and task.exception() is None:
                dialect.do_terminate(task.result())
            raise
        except Exception as error:
            reason = " ".join(str(error).split()) or "no answer"
            raise DatabaseUnavailable(
                name, f"connecting failed: {type(error).__name__}: {reason}"
            ) from error


def _log_slow_statements(
    engine: AsyncEngine, settings: DatabaseSettings, name: str, origin: FindOrigin
) -> None:
    def report(execution: Execution) -> None:
        took = execution.seconds * 1000
        if took < cast(float, settings.slow_query_ms):
            return
        route, request_id = origin() or (None, None)
        details = {"database": name, "duration_ms": took, "rows": execution.rows}
        details |= {"route": route, "request_id": request_id}
        rows = "" if execution.rows is None else f", {execution.rows} rows"
        place = "" if route is None else f" in {route}, request {request_id}"
        parameters = ""
        if settings.slow_query_parameters:
            parameters = f" with {_SHORT.repr(execution.parameters)}"
        logger.warning(
            "slow statement (%.0f ms%s)%s: %s%s",
            *(took, rows, place, execution.statement, parameters),
            extra=details,
        )

    on_execution(engine, report)
