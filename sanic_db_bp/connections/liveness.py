"""A server that is not heard of any more: nobody waits for it for ever.

The kernel gives up on a peer that acknowledges nothing (see :func:`keep_alive`). A host that hangs,
or a middlebox that lost its way, acknowledges and says nothing: who waits for long has the server
asked over a new connection, and is cut off if that is not answered either.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from contextlib import suppress
from contextvars import Context
from time import monotonic
from typing import TYPE_CHECKING, Any

from sqlalchemy import event

from ..bridge import bridged_task, current_task, run_in_bridge

if TYPE_CHECKING:
    from sqlalchemy import Engine

logger = logging.getLogger("sanic.root.db")

LOOK_EVERY = 1.0
"""Seconds between two looks at a statement that takes long."""

ANSWER_WITHIN = 3.5
"""Seconds that a server has to accept a new connection before it counts as gone."""

KEEPALIVE_IDLE, KEEPALIVE_INTERVAL, KEEPALIVE_COUNT = 30, 10, 3
"""Seconds without traffic before the kernel asks the peer, between its questions, and how many."""

UNACKNOWLEDGED_WITHIN = 30
"""Seconds after which what was sent must have been acknowledged, or the connection is closed."""

_OPTIONS = {
    "TCP_KEEPIDLE": KEEPALIVE_IDLE,
    "TCP_KEEPINTVL": KEEPALIVE_INTERVAL,
    "TCP_KEEPCNT": KEEPALIVE_COUNT,
    "TCP_USER_TIMEOUT": UNACKNOWLEDGED_WITHIN * 1000,
}


def watch(
    engine: Engine, name: str, patience: float, *, transactions: bool = True
) -> Callable[[], None]:
    """See to it that no statement, COMMIT, ROLLBACK or close waits for a server that is gone.

    Args:
        engine: of a database that is reached over a network.
        name: the database's name in logs.
        patience: seconds that a statement may take before the server is asked whether it is there;
            while it answers, the statement goes on.
        transactions: whether there is a COMMIT or ROLLBACK to wait for, other than in autocommit.

    Returns:
        What ends the watch, to be called when the engine is disposed.
    """
    server = _Server(engine, name, patience)
    dialect: Any = engine.dialect
    for method in ("do_execute", "do_execute_no_params", "do_executemany"):
        setattr(dialect, method, server.watched(getattr(dialect, method), _connection_of_cursor))
    for method in ("do_commit", "do_rollback", "do_close") if transactions else ("do_close",):
        setattr(dialect, method, server.watched(getattr(dialect, method), _connection_of_adapter))
    for method in ("do_close", "do_terminate"):
        setattr(dialect, method, _to_the_socket(getattr(dialect, method)))
    event.listen(engine, "connect", _keep_alive)
    return server.stop


_Wait = tuple[Any, Callable[[Any], Any], "asyncio.Task[Any]", int, float]
"""The arguments of a :class:`_Watch`: of most calls one is never made."""


class _Server:
    """What is known of the server of one engine, and who waits for it."""

    def __init__(self, engine: Engine, name: str, patience: float) -> None:
        self._patience = patience
        self._name = name
        self._dialect = engine.dialect
        self._waiting: set[_Wait] = set()
        self._watches: dict[_Wait, _Watch] = {}
        self._doubting: set[_Wait] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._way: tuple[Any, Any] = ((), {})
        self._question: asyncio.Task[None] | None = None
        event.listen(engine, "do_connect", self._remember)

    def _remember(self, _dialect: object, _record: object, args: Any, arguments: Any) -> None:
        self._way = (args, arguments)

    def stop(self) -> None:
        """Look no more, and ask no more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._question is not None:
            self._question.cancel()

    def watched(
        self, method: Callable[..., Any], connection_of: Callable[[Any], Any]
    ) -> Callable[..., Any]:
        """Return the method of a dialect that is watched while it waits."""
        waiting = self._waiting

        def call(subject: Any, *args: Any) -> Any:
            task = bridged_task()
            if task is None:
                # The garbage collector cleans up: nothing can wait here.
                return method(subject, *args)
            wait = (subject, connection_of, task, task.cancelling(), monotonic())
            waiting.add(wait)
            if self._timer is None:
                self._look_later()
            try:
                return method(subject, *args)
            finally:
                waiting.discard(wait)

        return call

    def _look_later(self) -> None:
        # One timer for all, in an empty context: a timer outlives its cancellation, and in the
        # context of a request would keep its body in memory.
        self._timer = asyncio.get_running_loop().call_later(
            min(LOOK_EVERY, self._patience), self._look, context=Context()
        )

    def _look(self) -> None:
        self._timer = None
        now = monotonic()
        self._watches = {wait: self._watches.get(wait) or _Watch(*wait) for wait in self._waiting}
        for wait, watch in self._watches.items():
            if watch.lets_go():
                watch.cut()
            elif now >= watch.since + self._patience:
                self._ask(wait)
        if self._waiting:
            self._look_later()

    def _ask(self, wait: _Wait) -> None:
        """Find out whether the server is there; all who doubt it get the same answer."""
        self._doubting.add(wait)
        if self._question is None:
            loop = asyncio.get_running_loop()
            self._question = loop.create_task(self._connect_within_bound(), context=Context())
            self._question.add_done_callback(self._answered)

    async def _connect_within_bound(self) -> None:
        async with asyncio.timeout(ANSWER_WITHIN):
            await run_in_bridge(self._connect)

    def _connect(self) -> None:
        args, arguments = self._way
        # Not of the pool, which may be full of those who wait.
        self._dialect.do_terminate(self._dialect.connect(*args, **arguments))

    def _answered(self, question: asyncio.Task[None]) -> None:
        self._question = None
        waiting = [self._watches[wait] for wait in self._doubting & self._waiting]
        self._doubting.clear()
        if question.cancelled():
            return
        gone = isinstance(question.exception(), OSError)
        if gone and waiting:
            logger.error(
                "The database '%s' has not answered for %g s, and does not answer a new connection "
                "either: connections in use are cut: %d",
                self._name,
                self._patience,
                len(waiting),
            )
        for watch in waiting:
            if gone:
                watch.cut()
            else:
                watch.since = monotonic()


class _Watch:
    """One call that has waited for the server for long enough to be looked at."""

    __slots__ = ("_cancellations", "_cancelled", "_connection_of", "_subject", "_task", "since")

    def __init__(
        self,
        subject: Any,
        connection_of: Callable[[Any], Any],
        task: asyncio.Task[Any],
        cancellations: int,
        since: float,
    ) -> None:
        self._subject = subject
        self._connection_of = connection_of
        self._task = task
        self._cancellations = cancellations
        self._cancelled = False
        self.since = since

    def lets_go(self) -> bool:
        """Whether the driver was cancelled before the last look, and waits all the same."""
        if self._cancelled:
            self._task.cancel()
            self._task.uncancel()
            return True
        self._cancelled = self._task.cancelling() > self._cancellations
        return False

    def cut(self) -> None:
        """Cut the connection: the driver's own error ends the call."""
        cut(self._connection_of(self._subject))


def _connection_of_cursor(cursor: Any) -> Any:
    return cursor._adapt_connection.driver_connection


def _connection_of_adapter(adapter: Any) -> Any:
    return adapter.driver_connection


def _to_the_socket(method: Callable[[Any], None]) -> Callable[[Any], None]:
    """Return the method of a dialect that closes a connection, with its socket.

    A TLS transport that was closed waits for the server's own farewell for half a minute. That is
    of no use to anybody, and an event loop that ends meanwhile leaves the socket open.
    """

    def close(adapter: Any) -> None:
        if current_task() is None:
            # The garbage collector cleans up, and the loop may be closed.
            method(adapter)
            return
        transport = _transport_of(adapter.driver_connection)
        try:
            method(adapter)
        finally:
            # One that is not being closed is a test's, lent to the app and taken back.
            if transport is not None and transport.is_closing():
                transport.abort()

    return close


def cut(driver_connection: Any) -> None:
    """Close a connection's socket as the other side would, whatever its driver waits for."""
    transport = _transport_of(driver_connection)
    if transport is not None and transport.is_closing():
        # What it waits for, if anything, is the farewell of TLS.
        transport.abort()
        return
    own = socket_of(driver_connection)
    if own is not None:
        with own, suppress(OSError):
            own.shutdown(socket.SHUT_RDWR)


def _keep_alive(dbapi_connection: Any, _record: object) -> None:
    own = None if _has_libpq(dbapi_connection) else socket_of(dbapi_connection.driver_connection)
    if own is None:
        return
    with own:
        if own.family in (socket.AF_INET, socket.AF_INET6):
            own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in _OPTIONS.items():
                # Not every system has every one.
                if hasattr(socket, option):
                    own.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _has_libpq(dbapi_connection: Any) -> bool:
    # It sets the options itself, from the connect arguments.
    return hasattr(dbapi_connection.driver_connection, "pgconn")


def socket_of(driver_connection: Any) -> socket.socket | None:
    """Return a socket object of our own for a connection's socket, or None if it has none."""
    descriptor = -1
    if hasattr(driver_connection, "pgconn"):
        if not driver_connection.closed:
            descriptor = driver_connection.fileno()
    else:
        transport = _transport_of(driver_connection)
        if transport is not None and not transport.is_closing():
            descriptor = transport.get_extra_info("socket").fileno()
    return None if descriptor < 0 else socket.socket(fileno=os.dup(descriptor))


def _transport_of(driver_connection: Any) -> Any:
    """Return a connection's asyncio transport, or None if it has none."""
    # asyncpg; asyncmy, whose protocol has it for longer than the connection; aiomysql.
    holder = getattr(driver_connection, "_proto", None) or getattr(
        driver_connection, "_writer", None
    )
    return getattr(driver_connection, "_transport", None) or getattr(holder, "transport", None)
