"""The bridge: plain ``Session`` code over the asyncio engine, the event loop never blocked.

SQLAlchemy's asyncio extension runs its synchronous code in a greenlet that switches out whenever
it has to wait ("Synopsis - asyncio", *greenlet_spawn* and *await_*). Here whole coroutines run
that way: a handler steps inside one greenlet, and what it awaits is handed on to the event loop.
The greenlets are used again and again.
"""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Awaitable, Callable, Coroutine, Generator
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast
from weakref import WeakSet

from greenlet import getcurrent, greenlet
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

__all__ = [
    "await_only",
    "bridged",
    "deliver_cancellation",
    "in_greenlet",
    "run_in_bridge",
    "uninterrupted",
]

P = ParamSpec("P")
T = TypeVar("T")


async def run_in_bridge(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a plain function so that what it does with a ``Session`` never blocks the event loop."""
    return await _run(partial(function, *args, **kwargs))


async def bridged(coroutine: Coroutine[Any, Any, T]) -> T:
    """Await a coroutine in whose own frames a plain ``Session`` may be used."""
    return await _run(partial(_step_to_end, coroutine))


class _Worker(greenlet):
    """A greenlet that runs one job after another.

    A new greenlet costs more than most handlers: Python maps memory for its frames.
    """

    __sqlalchemy_greenlet_provider__ = True
    """Tells SQLAlchemy's ``await_`` that it may switch to the parent with what it waits for."""

    def __init__(self) -> None:
        super().__init__(self._work)
        self.result: Any = None
        self.raised: BaseException | None = None

    def _work(self, job: Callable[[], Any]) -> None:
        while True:
            try:
                self.result = job()
            except BaseException as error:
                self.raised = error
            del job
            assert self.parent is not None
            job = self.parent.switch(_DONE)


class _Idle(threading.local):
    def __init__(self) -> None:
        self.workers: list[_Worker] = []


_DONE = object()
_idle = _Idle()

MOST_IDLE = 128
"""Workers that are kept for later; each holds about 20 KiB."""


async def _run(job: Callable[[], T]) -> T:
    workers = _idle.workers
    worker = workers.pop() if workers else _Worker()
    worker.parent = driver = getcurrent()
    worker.gr_context = driver.gr_context
    waits_for = worker.switch(job)
    while waits_for is not _DONE:
        try:
            value = await waits_for
        except BaseException:
            waits_for = worker.throw(*sys.exc_info())
        else:
            waits_for = worker.switch(value)
    result, error = worker.result, worker.raised
    worker.result = worker.raised = worker.gr_context = None
    if len(workers) < MOST_IDLE:
        workers.append(worker)
    if error is None:
        return cast(T, result)
    context = error.__context__
    try:
        raise error
    finally:
        # Raised here, it would get for its context what the caller handles.
        error.__context__ = context
        # Errors kept here would make a reference cycle with their own tracebacks.
        del error, context


class _Suspension:
    """Hands the future that a bridged coroutine waits for to the task that runs the bridge."""

    __slots__ = ("_waits_for",)

    def __init__(self, waits_for: object) -> None:
        self._waits_for = [waits_for]

    def __await__(self) -> Generator[Any, None, None]:
        # A future that is kept would hold, with its error, the frames of its own traceback.
        yield self._waits_for.pop()


def _step_to_end(coroutine: Coroutine[Any, Any, T]) -> T:
    resume: Callable[[Any], Any] = coroutine.send
    argument: Any = None
    while True:
        try:
            waits_for = resume(argument)
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            # As above.
            argument = None
        suspension = _Suspension(waits_for)
        del waits_for
        try:
            await_only(suspension)
            resume = coroutine.send
        except BaseException as error:
            argument, resume = error, coroutine.throw


async def uninterrupted(awaitable: Awaitable[T], *, within: float) -> T:
    """Await something to its end even if the awaiting task is cancelled meanwhile.

    A cancellation is held back until the end. It is delivered by :func:`deliver_cancellation`, once
    the caller has finished its bookkeeping, or else at the task's next suspension.

    Args:
        awaitable: what has to reach its end; it runs in a task of its own.
        within: seconds that it may still take once the cancellation has come; after them it is
            cancelled itself, and the cancellation goes on.
    """
    task = asyncio.ensure_future(awaitable)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if task.cancelled():
            raise
        held_back = 1 + await _wait_despite_cancellation(task, within)
        if not task.done():
            task.cancel()
            raise
        _deliver_again(held_back)
        return task.result()


async def _wait_despite_cancellation(task: asyncio.Future[Any], within: float) -> int:
    """Wait for the task, at most so many seconds; returns how many cancellations came meanwhile."""
    loop = asyncio.get_running_loop()
    deadline = loop.time() + within
    cancellations = 0
    while not task.done() and (left := deadline - loop.time()) > 0:
        try:
            await asyncio.wait({task}, timeout=left)
        except asyncio.CancelledError:
            cancellations += 1
    return cancellations


_held_back: WeakSet[asyncio.Task[Any]] = WeakSet()


def _deliver_again(cancellations: int) -> None:
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    _held_back.add(task)
    for _ in range(cancellations):
        task.uncancel()
        task.cancel()


def deliver_cancellation() -> None:
    """Raise a cancellation that :func:`uninterrupted` has held back; runs in the bridge.

    One that was taken back meanwhile, such as by ``asyncio.timeout``, is dropped: before Python
    3.13 it would come up at some later suspension.
    """
    if not _held_back:
        return
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    if task in _held_back:
        _held_back.discard(task)
        try:
            await_only(asyncio.sleep(0))
        except asyncio.CancelledError:
            if task.cancelling():
                raise
