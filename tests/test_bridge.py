"""Code in the bridge behaves as it would with a plain await, and the event loop stays free."""

from __future__ import annotations

import asyncio
import contextvars
import gc
import sys
import threading
import time
import traceback
import weakref
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest
from sqlalchemy import event, text
from sqlalchemy.orm import Session

from sanic_db_bp import Database, DatabaseSettings, on_commit
from sanic_db_bp.bridge import bridged, deliver_cancellation, run_in_bridge, uninterrupted
from tests.databases import on
from tests.slow_sql import all_are_free, make_slow_commit, sleep_for, teach_to_sleep

T = TypeVar("T")

Run = Callable[[Coroutine[Any, Any, Any]], Any]
Log = list[object]
Scenario = Callable[[Log], Coroutine[Any, Any, object]]

number: contextvars.ContextVar[int] = contextvars.ContextVar("number", default=0)


@pytest.fixture(params=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine on asyncio's event loop, and on uvloop's, which Sanic uses."""
    loops = pytest.importorskip("uvloop") if request.param == "uvloop" else asyncio
    with asyncio.Runner(loop_factory=loops.new_event_loop) as runner:
        yield runner.run


async def failing() -> None:
    await asyncio.sleep(0)
    raise LookupError("lost")


async def logging_steps(log: Log, name: str, steps: int = 3) -> str:
    for step in range(steps):
        log.append(f"{name} {step}")
        await asyncio.sleep(0)
    return name


async def awaits_nothing(log: Log) -> object:
    return log


async def raises_at_once(log: Log) -> object:
    raise LookupError("at once")


async def raises_after_waiting(log: Log) -> object:
    await asyncio.sleep(0.001)
    raise LookupError("later")


async def raises_stop_iteration(log: Log) -> object:
    await asyncio.sleep(0)
    raise StopIteration("odd")


async def yields_to_others(log: Log) -> object:
    other = asyncio.ensure_future(logging_steps(log, "other"))
    await logging_steps(log, "own")
    return await other


async def waits_for_an_event(log: Log) -> object:
    event = asyncio.Event()
    asyncio.get_running_loop().call_soon(event.set)
    return await event.wait()


async def gathers(log: Log) -> object:
    return await asyncio.gather(logging_steps(log, "a"), logging_steps(log, "b"))


async def gathers_errors(log: Log) -> object:
    results = await asyncio.gather(failing(), logging_steps(log, "b"), return_exceptions=True)
    return [repr(result) for result in results]


async def gathers_and_fails(log: Log) -> object:
    return await asyncio.gather(failing(), logging_steps(log, "b"))


async def has_a_failing_child(log: Log) -> object:
    try:
        async with asyncio.TaskGroup() as group:
            group.create_task(failing())
            await asyncio.sleep(5)
    except* LookupError as errors:
        log.append([repr(error) for error in errors.exceptions])
    await asyncio.sleep(0)
    return asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def times_out(log: Log) -> object:
    try:
        async with asyncio.timeout(0.01):
            await asyncio.sleep(5)
    except TimeoutError:
        log.append("timeout")
    await asyncio.sleep(0)
    return asyncio.current_task().cancelling()  # type: ignore[union-attr]


async def waits_at_most(log: Log) -> object:
    await asyncio.wait_for(asyncio.sleep(5), 0.01)
    return None


async def catches_a_cancellation(log: Log) -> object:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_soon(task.cancel, "enough")
    try:
        await asyncio.sleep(5)
    except asyncio.CancelledError as error:
        log.append(error.args)
        await asyncio.sleep(0)
    return task.uncancel()


async def cancels_itself(log: Log) -> object:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    log.append(task.uncancel())
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        log.append("cancelled")
    return "goes on"


async def shields(log: Log) -> object:
    inner = asyncio.ensure_future(logging_steps(log, "inner"))
    return await asyncio.shield(inner)


async def uses_an_executor(log: Log) -> object:
    loop = asyncio.get_running_loop()
    log.append(await loop.run_in_executor(None, sum, (1, 2)))
    number.set(3)
    log.append(await asyncio.to_thread(number.get))
    return await loop.run_in_executor(None, int, "x")


async def generates_asynchronously(log: Log) -> object:
    async def numbers() -> AsyncIterator[int]:
        try:
            for value in range(5):
                await asyncio.sleep(0)
                yield value
        finally:
            await asyncio.sleep(0)
            log.append("closed")

    generator = numbers()
    async for value in generator:
        log.append(value)
        if value == 2:
            break
    await generator.aclose()  # type: ignore[attr-defined]
    return [value async for value in numbers()]


async def generates(log: Log) -> object:
    def numbers() -> Iterator[int]:
        with suppress(KeyError):
            log.append((yield 1))
        yield 2

    generator: Any = numbers()
    log.append(next(generator))
    await asyncio.sleep(0)
    log.append(generator.throw(KeyError))
    return list(numbers())


async def passes_work_through_a_queue(log: Log) -> object:
    queue: asyncio.Queue[int] = asyncio.Queue(1)

    async def produce() -> None:
        for value in range(3):
            await queue.put(value)

    async with asyncio.TaskGroup() as group:
        group.create_task(produce())
        return [await queue.get() for _ in range(3)]


async def reraises_after_waiting(log: Log) -> object:
    try:
        raise LookupError("first")
    except LookupError:
        await asyncio.sleep(0)
        log.append(repr(sys.exc_info()[1]))
        raise


async def chains_errors(log: Log) -> object:
    try:
        await failing()
    except LookupError:
        await asyncio.sleep(0)
        raise ValueError("second")  # noqa: B904 - the context is what is looked at
    return None


async def has_no_error_left(log: Log) -> object:
    with suppress(LookupError):
        await failing()
    await asyncio.sleep(0)
    return sys.exc_info()


async def is_bridged_again(log: Log) -> object:
    log.append(await bridged(logging_steps(log, "inner")))
    return await bridged(raises_after_waiting(log))


async def awaits_an_own_awaitable(log: Log) -> object:
    class Twice:
        def __await__(self) -> Generator[Any, Any, str]:
            yield
            yield
            return "twice"

    return await Twice()


async def awaits_what_is_no_future(log: Log) -> object:
    class Odd:
        def __await__(self) -> Generator[Any, Any, None]:
            yield 42

    await Odd()
    return None


SCENARIOS: list[Scenario] = [
    awaits_nothing,
    raises_at_once,
    raises_after_waiting,
    raises_stop_iteration,
    yields_to_others,
    waits_for_an_event,
    gathers,
    gathers_errors,
    gathers_and_fails,
    has_a_failing_child,
    times_out,
    waits_at_most,
    catches_a_cancellation,
    cancels_itself,
    shields,
    uses_an_executor,
    generates_asynchronously,
    generates,
    passes_work_through_a_queue,
    reraises_after_waiting,
    chains_errors,
    has_no_error_left,
    is_bridged_again,
    awaits_an_own_awaitable,
    awaits_what_is_no_future,
]


async def plainly(coroutine: Coroutine[Any, Any, T]) -> T:
    return await coroutine


async def outcome(
    way: Callable[[Coroutine[Any, Any, object]], Awaitable[object]], scenario: Scenario
) -> object:
    """Run in a task of its own; tell what was logged, and the result or the error."""
    log: Log = []
    try:
        result = await asyncio.ensure_future(way(scenario(log)))
    except Exception as error:
        return log, type(error), error.args, repr(error.__context__)
    return log, result


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.__name__)
def test_behaves_as_a_plain_await(run: Run, scenario: Scenario) -> None:
    """What is logged, returned and raised is the same as without the bridge."""
    plain = run(outcome(plainly, scenario))
    assert run(outcome(bridged, scenario)) == plain


def test_runs_in_the_same_task(run: Run) -> None:
    """The current task is the one that awaits the bridge, before and after a wait."""

    async def tasks() -> list[asyncio.Task[Any] | None]:
        before = asyncio.current_task()
        await asyncio.sleep(0)
        return [before, asyncio.current_task()]

    async def main() -> None:
        own = asyncio.current_task()
        assert await bridged(tasks()) == [own, own]

    run(main())


def test_cancellation_of_the_task_reaches_the_coroutine(run: Run) -> None:
    """Clean-up that awaits is carried out, and the cancellation goes on."""
    log: Log = []

    async def main() -> None:
        started = asyncio.Event()

        async def work() -> None:
            try:
                started.set()
                await asyncio.sleep(5)
            finally:
                log.append(await logging_steps([], "cleaned up"))

        task = asyncio.ensure_future(bridged(work()))
        await started.wait()
        task.cancel("by the test")
        with pytest.raises(asyncio.CancelledError) as cancelled:
            await task
        assert cancelled.value.args == ("by the test",)

    run(main())
    assert log == ["cleaned up"]


def test_context_variables_are_those_of_the_task(run: Run) -> None:
    """A value is seen inside, changed inside, seen outside, and reset by its token."""

    async def inside() -> contextvars.Token[int]:
        assert number.get() == 1
        token = number.set(2)
        await asyncio.sleep(0)
        assert number.get() == 2
        assert await asyncio.ensure_future(asyncio.to_thread(number.get)) == 2
        assert await bridged(read()) == 2
        return token

    async def read() -> int:
        await asyncio.sleep(0)
        return number.get()

    async def main() -> None:
        number.set(1)
        token = await bridged(inside())
        assert number.get() == 2
        number.reset(token)
        assert number.get() == 1
        assert await asyncio.ensure_future(bridged(read())) == 1

    run(main())


def test_frames_of_the_user_are_in_the_traceback_in_order(run: Run) -> None:
    """The traceback leads from the handler to the line that failed."""

    async def handler() -> None:
        await helper()

    async def helper() -> None:
        await asyncio.sleep(0)
        await asyncio.ensure_future(deepest())

    async def deepest() -> None:
        await asyncio.sleep(0)
        raise LookupError("here")

    async def main() -> list[str]:
        try:
            await bridged(handler())
        except LookupError as error:
            return [frame.name for frame in traceback.extract_tb(error.__traceback__)]
        raise AssertionError

    names = run(main())
    assert [name for name in names if name in ("handler", "helper", "deepest")] == [
        "handler",
        "helper",
        "deepest",
    ]
    assert names[-1] == "deepest"


def test_the_context_of_an_error_is_kept(run: Run) -> None:
    """What an error came from is told, also where another error is being handled outside."""

    async def main() -> BaseException | None:
        try:
            try:
                raise KeyError("outer")
            except KeyError:
                await bridged(chains_errors([]))
        except ValueError as error:
            return error.__context__
        raise AssertionError

    assert type(run(main())) is LookupError


def test_a_coroutine_that_is_closed_is_cleaned_up(run: Run) -> None:
    """What closes a suspended task's coroutine runs its ``finally`` clauses."""
    log: Log = []

    async def work() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            log.append("cleaned up")

    async def main() -> None:
        coroutine = bridged(work())
        coroutine.send(None)
        coroutine.close()

    run(main())
    assert log == ["cleaned up"]


class Held:
    """Something that a frame holds."""


@contextmanager
def no_garbage_collector() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


async def fails_directly(held: Held) -> None:
    await asyncio.sleep(0)
    raise LookupError


async def fails_in_a_task(held: Held) -> None:
    await asyncio.ensure_future(failing())


async def fails_in_gather(held: Held) -> None:
    await asyncio.gather(failing(), asyncio.sleep(0))


async def fails_in_an_executor(held: Held) -> None:
    await asyncio.get_running_loop().run_in_executor(None, int, "x")


async def fails_after_a_timeout(held: Held) -> None:
    async with asyncio.timeout(0.001):
        await asyncio.sleep(5)


async def catches_what_fails(held: Held) -> None:
    with suppress(LookupError):
        await asyncio.ensure_future(failing())


@pytest.mark.parametrize(
    "work",
    [
        fails_directly,
        fails_in_a_task,
        fails_in_gather,
        fails_in_an_executor,
        fails_after_a_timeout,
        catches_what_fails,
    ],
    ids=lambda work: work.__name__,
)
def test_an_exception_keeps_no_frames_alive(
    run: Run, work: Callable[[Held], Coroutine[Any, Any, None]]
) -> None:
    """When it was handled, all is freed at once: nothing waits for the garbage collector."""

    async def attempt() -> weakref.ref[Held]:
        held = Held()
        with suppress(LookupError, ValueError, TimeoutError):
            await bridged(work(held))
        return weakref.ref(held)

    async def main() -> Held | None:
        reference = await attempt()
        # The executor's thread lets go of what it ran a moment after it has answered.
        deadline = time.monotonic() + 1
        while reference() is not None and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        return reference()

    with no_garbage_collector():
        assert run(main()) is None


@asynccontextmanager
async def opened(url: str, pool_size: int = 5) -> AsyncIterator[Database]:
    database = Database(DatabaseSettings(url=url, env_file=None, pool_size=pool_size))
    teach_to_sleep(database.engine, database.read_engine)
    try:
        yield database
    finally:
        await database.dispose(within=1)


def test_a_timeout_ends_a_statement(run: Run, database_url: str) -> None:
    """It fires although the code looks blocking, and the pool is clean afterwards."""

    async def main() -> None:
        async with opened(database_url) as database:

            async def handler(session: Session) -> None:
                async with asyncio.timeout(0.1):  # noqa: ASYNC100 - the statement waits
                    session.execute(sleep_for(database, 0.4))

            with pytest.raises(TimeoutError):
                async with database.block(plain=True) as unit:
                    await bridged(handler(unit.session))
            assert await all_are_free(database)
            assert await database.run_sync(lambda session: session.scalar(text("SELECT 1"))) == 1

    run(main())


def test_a_quick_statement_that_was_cut_off_holds_no_lock(run: Run, tmp_path: Path) -> None:
    """SQLite lets go of the one write lock at once, although the error is still looked at."""

    async def main() -> None:
        async with opened(f"sqlite:///{tmp_path / 'test.db'}") as database:
            begun = threading.Event()
            # Told by SQLite's own thread: its answer is on the way, and not there yet.
            listen(database, begun.set)

            async def work() -> None:
                async with database.session() as session:
                    await session.execute(text("SELECT tell() UNION ALL SELECT 1"))

            task = asyncio.ensure_future(work())
            while not begun.is_set():  # noqa: ASYNC110
                await asyncio.sleep(0)
            time.sleep(0.05)  # noqa: ASYNC251 - the event loop is busy when the answer comes
            task.cancel()
            with pytest.raises(asyncio.CancelledError) as held:
                await task
            async with asyncio.timeout(5):
                await database.run_sync(lambda session: session.scalar(text("SELECT 1")))
            assert held.value is not None

    run(main())


def listen(database: Database, function: Callable[[], None]) -> None:
    """Let SQLite call a function by the name of ``tell``."""

    @event.listens_for(database.engine.sync_engine, "connect")
    def connected(dbapi_connection: Any, _record: object) -> None:
        dbapi_connection.create_function("tell", 0, function)


def test_a_failing_sibling_ends_a_statement(run: Run, database_url: str) -> None:
    """A task group cancels the handler in the middle of a statement."""

    async def main() -> None:
        async with opened(database_url) as database:

            async def handler(session: Session) -> None:
                async with asyncio.TaskGroup() as group:
                    session.execute(text("SELECT 1"))
                    group.create_task(failing())
                    session.execute(sleep_for(database, 0.4))

            with pytest.raises(ExceptionGroup) as errors:
                async with database.block(plain=True) as unit:
                    await bridged(handler(unit.session))
            assert errors.group_contains(LookupError)
            assert await all_are_free(database)

    run(main())


def test_a_cancelled_task_leaves_a_clean_pool(run: Run, database_url: str) -> None:
    """The statement is given up, and the connection's place in the pool is free."""

    async def main() -> None:
        async with opened(database_url) as database:
            started = asyncio.Event()

            async def handler(session: Session) -> None:
                session.execute(text("SELECT 1"))
                started.set()
                session.execute(sleep_for(database, 0.4))

            async def work() -> None:
                async with database.block(plain=True) as unit:
                    await bridged(handler(unit.session))

            task = asyncio.ensure_future(work())
            await started.wait()
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await all_are_free(database)

    run(main())


def test_a_session_works_between_other_awaits(run: Run, database_url: str) -> None:
    """A handler mixes a plain session with gather, executors and generators."""

    async def main() -> None:
        async with opened(database_url) as database:

            def rows(session: Session) -> Iterator[int]:
                for value in range(3):
                    yield session.execute(text(f"SELECT {value}")).scalar_one()

            async def async_rows(session: Session) -> AsyncIterator[int]:
                for value in rows(session):
                    await asyncio.sleep(0)
                    yield value

            async def handler(session: Session) -> list[Any]:
                found: list[Any] = list(rows(session))
                found += await asyncio.gather(asyncio.sleep(0, "a"), asyncio.to_thread(str, "b"))
                found += [value async for value in async_rows(session)]
                found += [await bridged(nested(session))]
                context = contextvars.copy_context()
                return [*found, context.run(session.scalar, text("SELECT 9"))]

            async def nested(session: Session) -> Any:
                await asyncio.sleep(0)
                return session.scalar(text("SELECT 7"))

            async with database.block(plain=True) as unit:
                found = await bridged(handler(unit.session))
            assert found == [0, 1, 2, "a", "b", 0, 1, 2, 7, 9]

    run(main())


def test_an_error_of_a_statement_can_be_caught(run: Run, database_url: str) -> None:
    """It is raised on the line of the statement, and the handler goes on."""

    async def main() -> None:
        async with opened(database_url) as database:

            async def handler(session: Session) -> Any:
                with pytest.raises(Exception, match="no_such_table"):
                    session.execute(text("SELECT * FROM no_such_table"))
                session.rollback()
                return session.scalar(text("SELECT 1"))

            async with database.block(plain=True) as unit:
                assert await bridged(handler(unit.session)) == 1

    run(main())


async def heartbeat(gaps: list[float]) -> None:
    last = time.perf_counter()
    while True:
        await asyncio.sleep(0.01)
        now = time.perf_counter()
        gaps.append(now - last)
        last = now


def test_the_event_loop_is_never_blocked(run: Run, database_url: str) -> None:
    """A heartbeat keeps its beat while 100 calls each wait half a second in SQL."""

    async def main() -> list[float]:
        gaps: list[float] = []
        async with opened(database_url, pool_size=50) as database:
            beating = asyncio.ensure_future(heartbeat(gaps))

            def wait(session: Session) -> None:
                session.execute(sleep_for(database, 0.5))

            async def read() -> None:
                async with database.block(plain=True) as unit:
                    await run_in_bridge(wait, unit.read_session)

            # SQLite has one connection to write, and waits in parallel only when it reads.
            sqlite = database.backend.name == "sqlite"
            started = time.perf_counter()
            async with asyncio.timeout(20):
                await asyncio.gather(
                    *(read() if sqlite else database.run_sync(wait) for _ in range(100))
                )
            assert time.perf_counter() - started < 100 * 0.5 / 5
            beating.cancel()
        return gaps

    gaps = run(main())
    assert len(gaps) > 20
    assert sorted(gaps)[len(gaps) * 9 // 10] < 0.1
    # 100 calls that blocked would leave as many gaps of half a second; a busy machine leaves one.
    assert sum(gap > 0.4 for gap in gaps) <= 2


async def work_of(seconds: float, log: Log) -> str:
    await asyncio.sleep(seconds)
    log.append("done")
    return "result"


def test_uninterrupted_returns_the_result(run: Run) -> None:
    """Without a cancellation it is a plain await."""
    assert run(uninterrupted(work_of(0, []), within=1)) == "result"


def test_uninterrupted_may_be_cancelled_while_the_loop_stands_still() -> None:
    """Sanic cancels its tasks once more then; what they await goes on when the loop does."""
    log: Log = []
    with asyncio.Runner() as runner:
        loop = runner.get_loop()
        task = loop.create_task(uninterrupted(work_of(0.02, log), within=5))
        loop.run_until_complete(asyncio.sleep(0))
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            loop.run_until_complete(task)
    assert log == ["done"]


def test_uninterrupted_raises_the_error(run: Run) -> None:
    """Without a cancellation the error is that of a plain await."""
    with pytest.raises(LookupError, match="lost"):
        run(uninterrupted(failing(), within=1))


@pytest.mark.parametrize("times", [1, 3])
def test_uninterrupted_outlasts_cancellations(run: Run, times: int) -> None:
    """The work is done, the caller's bookkeeping too, and then the cancellation comes."""
    log: Log = []

    async def caller() -> None:
        log.append(await uninterrupted(work_of(0.05, log), within=5))
        log.append("bookkeeping")
        await asyncio.sleep(0)
        log.append("never reached")

    async def main() -> int:
        task = asyncio.ensure_future(caller())
        for _ in range(times):
            await asyncio.sleep(0.005)
            task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return task.cancelling()

    assert run(main()) == times
    assert log == ["done", "result", "bookkeeping"]


def test_uninterrupted_outlasts_a_cancellation_between_two_steps(run: Run) -> None:
    """Work that only lets other tasks run waits for no future, and is done all the same."""
    log: Log = []

    async def caller() -> None:
        log.append(await uninterrupted(logging_steps(log, "step"), within=5))
        await asyncio.sleep(0)
        log.append("never reached")

    async def main() -> bool:
        task = asyncio.ensure_future(caller())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert run(main())
    assert log == ["step 0", "step 1", "step 2", "step"]


def test_uninterrupted_cancels_the_caller_that_ends_at_once(run: Run) -> None:
    """A caller that never waits again is cancelled all the same."""

    async def main() -> bool:
        task = asyncio.ensure_future(uninterrupted(work_of(0.02, []), within=5))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert run(main())


def test_uninterrupted_raises_the_error_despite_a_cancellation(run: Run) -> None:
    """The error of the work is what the caller sees first."""
    log: Log = []

    async def caller() -> None:
        try:
            await uninterrupted(failing_later(), within=5)
        except LookupError as error:
            log.append(str(error))
        await asyncio.sleep(0)

    async def failing_later() -> None:
        await asyncio.sleep(0.02)
        raise LookupError("lost")

    async def main() -> bool:
        task = asyncio.ensure_future(caller())
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        return task.cancelled()

    assert run(main())
    assert log == ["lost"]


def test_uninterrupted_is_bounded_in_time(run: Run) -> None:
    """Work that takes too long once the cancellation has come is cancelled itself."""
    log: Log = []

    async def endless() -> None:
        try:
            await asyncio.sleep(5)
        except asyncio.CancelledError:
            log.append("cut off")
            raise

    async def main() -> float:
        task = asyncio.ensure_future(uninterrupted(endless(), within=0.05))
        await asyncio.sleep(0.01)
        started = time.monotonic()
        task.cancel()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        took = time.monotonic() - started
        await asyncio.sleep(0)
        return took

    assert 0.04 < run(main()) < 1
    assert log == ["cut off"]


def test_uninterrupted_may_be_nested(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    """The outer bound holds for what the inner one would still wait for."""
    log: Log = []

    async def waiting(for_: asyncio.Future[None]) -> None:
        await for_
        log.append("done")

    async def main() -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        work = uninterrupted(uninterrupted(waiting(answer), within=10), within=0.01)
        task = asyncio.ensure_future(work)
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        # The inner one is left behind, and goes on in its own time.
        (left,) = asyncio.all_tasks() - {asyncio.current_task()}
        assert not log
        answer.set_result(None)
        await asyncio.wait({left})

    run(main())
    assert log == ["done"]
    # Nor does the answer reach the task that has given up.
    assert caplog.records == []


def test_nested_uninterrupted_reaches_the_end(run: Run) -> None:
    """A cancellation is held back by both, and delivered once."""
    log: Log = []

    async def work() -> None:
        await uninterrupted(uninterrupted(work_of(0.02, log), within=5), within=5)
        log.append("not cancelled")
        await asyncio.sleep(0)
        log.append("not cancelled")

    async def main() -> None:
        task = asyncio.ensure_future(work())
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    run(main())
    assert log == ["done", "not cancelled"]


def test_uninterrupted_waits_for_nothing_more_once_its_time_is_up(run: Run) -> None:
    """Work that came through the end of its time without a wait is cut at its next one."""

    async def busy_then_endless() -> None:
        end = time.monotonic() + 0.03
        for _ in iter(lambda: time.monotonic() < end, False):
            await asyncio.sleep(0)
        await asyncio.sleep(5)

    async def main() -> None:
        task = asyncio.ensure_future(uninterrupted(busy_then_endless(), within=0.01))
        await asyncio.sleep(0)
        task.cancel()
        done, _ = await asyncio.wait({task}, timeout=4)
        assert done
        assert task.cancelled()

    run(main())


@pytest.mark.parametrize("answered", [False, True])
def test_uninterrupted_can_be_closed(run: Run, answered: bool) -> None:
    """A coroutine that nobody steps on ends where it is, and its work with it."""
    log: Log = []

    async def work(answer: asyncio.Future[None]) -> None:
        try:
            await answer
            await asyncio.sleep(5)
        finally:
            log.append("closed")

    async def main() -> None:
        answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        coroutine = uninterrupted(work(answer), within=5)
        coroutine.send(None)
        if answered:
            answer.set_result(None)
        coroutine.close()

    run(main())
    assert log == ["closed"]


def test_uninterrupted_ends_by_an_error_that_is_thrown_into_it(run: Run) -> None:
    """Whoever steps on it may end it so, as any coroutine."""

    async def main() -> None:
        coroutine = uninterrupted(asyncio.get_running_loop().create_future(), within=5)
        coroutine.send(None)
        with pytest.raises(LookupError):
            coroutine.throw(LookupError())

    run(main())


def test_what_was_cut_off_is_kept_until_it_has_ended(
    run: Run, caplog: pytest.LogCaptureFixture
) -> None:
    """It sees its cancellation, may take long to clean up, and its errors concern nobody."""
    log: Log = []
    gates: asyncio.Queue[weakref.ref[asyncio.Future[None]]] = asyncio.Queue()
    cleaning = weakref.WeakSet[asyncio.Task[Any]]()
    # Unlike the one in C, it does not take a step before it is done.
    task_in_python: Any = vars(asyncio.tasks)["_PyTask"]

    async def slow_to_cancel() -> None:
        try:
            await asyncio.sleep(5)
        finally:
            await asyncio.sleep(0.01)

    async def work() -> None:
        try:
            await task_in_python(slow_to_cancel())
        except BaseException as error:
            log.append(type(error).__name__)
            if task := asyncio.current_task():
                cleaning.add(task)
            # Nothing but the work itself knows of this future.
            own = asyncio.get_running_loop().create_future()
            gates.put_nowait(weakref.ref(own))
            await own
        log.append("cleaned up")
        raise LookupError("lost")

    async def main() -> None:
        task = asyncio.ensure_future(uninterrupted(work(), within=0.01))
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait({task})
        assert task.cancelled()
        del task
        gate = await gates.get()
        gc.collect()
        own = gate()
        assert own is not None
        own.set_result(None)
        await asyncio.wait(set(cleaning))

    run(asyncio.wait_for(main(), 5))
    gc.collect()
    assert not cleaning
    assert log == ["CancelledError", "cleaned up"]
    assert caplog.records == []


def test_uninterrupted_passes_on_that_the_work_was_cancelled(run: Run) -> None:
    """Work that is cancelled by somebody else cancels the caller."""

    async def main() -> None:
        work = asyncio.ensure_future(asyncio.sleep(5))
        task = asyncio.ensure_future(uninterrupted(work, within=5))
        await asyncio.sleep(0)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert task.cancelling() == 0

    run(main())


def test_a_cancellation_that_was_taken_back_is_dropped(run: Run) -> None:
    """A timeout that ran out during the work, and ended as if nothing were, leaves nothing."""

    async def main() -> bool:
        async with asyncio.timeout(0.01) as timeout:
            await uninterrupted(work_of(0.03, []), within=5)
        await run_in_bridge(deliver_cancellation)
        await asyncio.sleep(0)
        return timeout.expired()

    assert run(main())


def test_a_cancellation_is_delivered_to_its_own_task_alone(run: Run) -> None:
    """A task that was not cancelled goes on while another still has a cancellation to come."""

    async def main() -> None:
        delivered, proceed = asyncio.Event(), asyncio.Event()

        async def cancelled() -> None:
            await uninterrupted(work_of(0.02, []), within=5)
            with suppress(asyncio.CancelledError):
                await proceed.wait()
            delivered.set()
            await proceed.wait()
            await run_in_bridge(deliver_cancellation)

        task = asyncio.ensure_future(cancelled())
        await asyncio.sleep(0)
        task.cancel()
        await run_in_bridge(deliver_cancellation)
        await delivered.wait()
        await run_in_bridge(deliver_cancellation)
        proceed.set()
        await task

    run(main())


def commit_slowly(session: Session) -> None:
    session.execute(text("INSERT INTO slow VALUES (1)"))
    session.commit()


def commit_block_slowly(session: Session) -> None:
    with session.begin():
        session.execute(text("INSERT INTO slow VALUES (1)"))


@on("postgresql", every_driver=True)
@pytest.mark.parametrize("commit", [commit_slowly, commit_block_slowly])
def test_a_timeout_in_a_commit_is_no_later_cancellation(
    run: Run, database_url: str, commit: Callable[[Session], None]
) -> None:
    """The COMMIT ends, the timeout is told where it was asked for, and nothing comes after it."""
    log: Log = []

    async def main() -> None:
        async with opened(database_url) as database:
            await make_slow_commit(database)

            async def handler(session: Session) -> None:
                try:
                    async with asyncio.timeout(0.1):  # noqa: ASYNC100 - the COMMIT waits
                        commit(session)
                except TimeoutError:
                    log.append("timeout")
                await asyncio.sleep(0)
                log.append(session.scalar(text("SELECT count(*) FROM slow")))

            async with database.block(plain=True) as unit:
                await bridged(handler(unit.session))
            assert await all_are_free(database)

    run(main())
    assert log == ["timeout", 1]


@on("postgresql", every_driver=True)
def test_a_cancelled_commit_is_done_and_the_cancellation_goes_on(
    run: Run, database_url: str
) -> None:
    """What the database has stored, the caller is not told to be lost."""
    log: Log = []

    async def main() -> None:
        async with opened(database_url) as database:
            await make_slow_commit(database)

            async def work() -> None:
                async with database.session() as session:
                    await session.execute(text("INSERT INTO slow VALUES (1)"))
                    on_commit(lambda: log.append("committed"))

            task = asyncio.ensure_future(work())
            await asyncio.sleep(0.1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert await all_are_free(database)
            count = text("SELECT count(*) FROM slow")
            log.append(await database.run_sync(lambda session: session.scalar(count)))

    run(main())
    assert log == ["committed", 1]
