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
from contextlib import suppress
from contextvars import Context
from functools import partial
from typing import Any, ParamSpec, TypeVar, cast

from greenlet import getcurrent, greenlet
from sqlalchemy.util import await_only
from sqlalchemy.util.concurrency import in_greenlet

__all__ = [
    "await_only",
    "bridged",
    "bridged_task",
    "current_task",
    "deliver_cancellation",
    "held_back",
    "in_greenlet",
    "run_in_bridge",
    "uncancelled",
    "uninterrupted",
]

P = ParamSpec("P")
T = TypeVar("T")


async def run_in_bridge(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a plain function so that what it does with a ``Session`` never blocks the event loop."""
    return await _run(partial(function, **kwargs) if kwargs else function, args)


def bridged(coroutine: Coroutine[Any, Any, T]) -> Coroutine[Any, Any, T]:
    """Return a coroutine in whose own frames a plain ``Session`` may be used."""
    return _run(_step_to_end, (coroutine,))


class _Worker(greenlet):
    """A greenlet that calls one function after another.

    A new greenlet costs more than most handlers: Python maps memory for its frames.
    """

    __slots__ = ("raised", "result", "task", "uninterrupted_within")

    __sqlalchemy_greenlet_provider__ = True
    """Tells SQLAlchemy's ``await_`` that it may switch to the parent with what it waits for."""

    def __init__(self) -> None:
        super().__init__(self._work)
        self.task: asyncio.Task[Any] | None = None
        self.result: Any = None
        self.raised: BaseException | None = None
        self.uninterrupted_within: float | None = None

    def _work(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
        while True:
            try:
                self.result = function(*arguments)
            except BaseException as error:
                self.raised = error
            del function, arguments
            assert self.parent is not None
            function, arguments = self.parent.switch(_DONE)


class _Idle(threading.local):
    def __init__(self) -> None:
        self.workers: list[_Worker] = []


_DONE = object()
_idle = _Idle()

MOST_IDLE = 128
"""Workers that are kept for later; each holds about 20 KiB."""


async def _run(function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    workers = _idle.workers
    worker = workers.pop() if workers else _Worker()
    worker.parent = driver = getcurrent()
    worker.gr_context = driver.gr_context
    waits_for = worker.switch(function, arguments)
    while waits_for is not _DONE:
        within = worker.uninterrupted_within
        try:
            value = await (waits_for if within is None else _Uninterrupted(waits_for, within))
        except BaseException:
            waits_for = worker.throw(*sys.exc_info())
        else:
            waits_for = worker.switch(value)
    result, error = worker.result, worker.raised
    worker.task = worker.result = worker.raised = worker.gr_context = None
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


def current_task() -> asyncio.Task[Any] | None:
    """Return the task that runs, or None in a thread without an event loop."""
    try:
        return asyncio.current_task()
    except RuntimeError:
        return None


def bridged_task() -> asyncio.Task[Any] | None:
    """Return the task on whose behalf plain code runs in the bridge, or None outside of it."""
    worker = getcurrent()
    if type(worker) is _Worker:
        # asyncio's own look-up costs more, and this is asked for each statement.
        if worker.task is None:
            worker.task = current_task()
        return worker.task
    return current_task() if in_greenlet() else None


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
    driver = getcurrent().parent
    assert driver is not None
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
            # What await_only() does, without looking up where it is.
            driver.switch(suspension)
            resume = coroutine.send
        except BaseException as error:
            argument, resume = error, coroutine.throw


async def uninterrupted(awaitable: Awaitable[T], *, within: float) -> T:
    """Await something to its end even if the awaiting task is cancelled meanwhile.

    A cancellation is held back until the end. It is delivered by :func:`deliver_cancellation`, once
    the caller has finished its bookkeeping, or else at the task's next suspension.

    Args:
        awaitable: what has to reach its end.
        within: seconds that it may still take once the cancellation has come; after them it is
            cancelled itself, and the cancellation goes on.
    """
    return await _Uninterrupted(awaitable, within)


class _Uninterrupted(Awaitable[T]):
    """Steps through an awaitable in the task itself, which is cheaper than one more task.

    To the task it stands for the future that is waited for: what it is asked to cancel goes on.
    """

    __slots__ = (
        "_asyncio_future_blocking",
        "_awaitable",
        "_cancellations",
        "_future",
        "_is_late",
        "_timer",
        "_wake",
        "_within",
    )

    def __init__(self, awaitable: Awaitable[T], within: float) -> None:
        self._awaitable = awaitable
        self._within = within
        self._cancellations = 0
        self._future: Any = None
        self._is_late = False
        self._timer: asyncio.TimerHandle | None = None

    def __await__(self) -> Generator[Any, None, T]:
        steps = self._awaitable.__await__()
        future: asyncio.Future[Any] | None
        try:
            while True:
                future = self._future = next(steps)
                if future is None:
                    try:
                        yield
                    except asyncio.CancelledError:
                        self.cancel()
                    continue
                future._asyncio_future_blocking = False
                if not self._is_late:
                    self._asyncio_future_blocking = True
                    try:
                        yield self
                    except (Exception, asyncio.CancelledError):
                        # The error of the future comes out of the next step.
                        if not future.done():
                            raise
                if self._is_late and not future.done():
                    # The task that has held them back raises the first of them.
                    self._cancellations -= 1
                    _cancel(future, steps)
                    raise asyncio.CancelledError
        except StopIteration as end:
            value: T = end.value
            return value
        finally:
            # A future that is kept would hold, with its error, this very frame.
            future = self._future = None
            if self._timer is not None:
                self._timer.cancel()
            if self._cancellations:
                _deliver_again(self._cancellations)

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """As a future."""
        loop: asyncio.AbstractEventLoop = self._future.get_loop()
        return loop

    def done(self) -> bool:
        """As a future."""
        return bool(self._future.done())

    def add_done_callback(
        self, callback: Callable[[asyncio.Future[Any]], object], *, context: Context | None = None
    ) -> None:
        """As a future."""
        self._wake = callback, context
        self._future.add_done_callback(callback, context=context)

    def remove_done_callback(self, callback: Callable[[asyncio.Future[Any]], object]) -> int:
        """As a future."""
        return int(self._future.remove_done_callback(callback))

    def cancel(self, msg: object = None) -> bool:
        """Hold a cancellation back: the future goes on, for so many seconds."""
        self._cancellations += 1
        if self._timer is None:
            # Sanic cancels its tasks once more when the loop does not run any longer.
            loop = asyncio.get_running_loop() if self._future is None else self.get_loop()
            self._timer = loop.call_later(self._within, self._give_up, context=Context())
        return True

    def _give_up(self) -> None:
        self._is_late = True
        future = self._future
        if future is not None and not future.done():
            wake, context = self._wake
            future.remove_done_callback(wake)
            woken = future.get_loop().create_future()
            woken.set_result(None)
            woken.add_done_callback(wake, context=context)


_left_behind: set[asyncio.Task[None]] = set()


def _cancel(future: asyncio.Future[Any], steps: Generator[Any, None, Any]) -> None:
    """Cancel what is under way; it may need a while to notice, and nobody waits for that."""
    future.cancel()
    task = asyncio.ensure_future(_to_the_end(future, steps))
    _left_behind.add(task)
    task.add_done_callback(_left_behind.discard)


async def _to_the_end(future: asyncio.Future[Any], steps: Generator[Any, None, Any]) -> None:
    await asyncio.wait({future})
    with suppress(BaseException):
        await _Steps(steps)


class _Steps:
    """The rest of an awaitable that was begun."""

    __slots__ = ("_rest",)

    def __init__(self, rest: Generator[Any, None, Any]) -> None:
        self._rest = rest

    def __await__(self) -> Generator[Any, None, Any]:
        return self._rest


def uncancelled(method: Callable[[T], None], *, within: float) -> Callable[[T], None]:
    """Return a plain method that runs to its end even if the task is cancelled.

    Outside of the bridge it runs as it is: nothing can wait there.

    Args:
        method: of one argument, such as a dialect's for a connection.
        within: seconds that it may still take after a cancellation; see :func:`uninterrupted`.
    """

    def run(subject: T) -> None:
        worker = getcurrent()
        if isinstance(worker, _Worker) and worker.uninterrupted_within is None:
            worker.uninterrupted_within = within
            try:
                method(subject)
            finally:
                worker.uninterrupted_within = None
        elif in_greenlet():
            await_only(uninterrupted(run_in_bridge(method, subject), within=within))
        else:
            method(subject)

    return run


held_back: set[asyncio.Task[Any]] = set()
"""The tasks that :func:`deliver_cancellation` has something to deliver to."""


def _deliver_again(cancellations: int) -> None:
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    held_back.add(task)
    task.add_done_callback(held_back.discard)
    for _ in range(cancellations):
        task.uncancel()
        task.cancel()


def deliver_cancellation() -> None:
    """Raise a cancellation that :func:`uninterrupted` has held back; runs in the bridge.

    One that was taken back meanwhile, such as by ``asyncio.timeout``, is dropped: before Python
    3.13 it would come up at some later suspension.
    """
    if not held_back:
        return
    task = cast("asyncio.Task[Any]", asyncio.current_task())
    if task in held_back:
        held_back.discard(task)
        try:
            await_only(asyncio.sleep(0))
        except asyncio.CancelledError:
            if task.cancelling():
                raise
