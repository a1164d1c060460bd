"""An event loop that outlives those of the servers that a test starts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from ...bridge import await_only, in_greenlet

T = TypeVar("T")

NAME = "sanic-db-tests"
"""The name of the thread."""


def in_loop_thread() -> bool:
    """Whether the caller runs in the thread of the tests' connections."""
    return threading.current_thread().name == NAME


class LoopThread:
    """An event loop in a thread of its own.

    A driver's connection belongs to the loop in which it was opened, and ``app.test_client`` runs
    every request in a new one.
    """

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=NAME, daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread, from a greenlet of the bridge or from blocking code.

        A greenlet lets its event loop go on meanwhile. If its task is cancelled, the coroutine
        still runs to its end.
        """
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return await_only(_result(future)) if in_greenlet() else future.result()

    def run_blocking(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine in the thread, and block the caller whatever it is."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def close(self) -> None:
        """End the loop and the thread."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _result(future: Future[T]) -> T:
    return await asyncio.shield(asyncio.wrap_future(future))
