"""The rounds: each contender of a workload in turn, again and again, so that all meet the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from statistics import median

from .databases import Databases
from .load import Client
from .server import ContenderFailed, RunningServer, Sample, launched
from .workloads import Workload


@dataclass(frozen=True)
class Plan:
    """How a run is made.

    Args:
        client: what sends the requests.
        rounds: of each contender in each workload.
        seconds: of a round.
        warm_up: seconds of load before the first round.
        pool_size: connections of each pool.
        only: the contenders to run, if not all.
    """

    client: Client
    rounds: int = 5
    seconds: float = 2.0
    warm_up: float = 1.0
    pool_size: int = 16
    only: tuple[str, ...] = ()

    def contenders(self, workload: Workload) -> list[str]:
        """Who takes part in a workload."""
        return [name for name in workload.contenders if not self.only or name in self.only]


@dataclass
class Result:
    """What one contender did in one workload."""

    workload: str
    contender: str
    samples: list[Sample] = field(default_factory=list)

    def of(self, measure: str) -> list[float]:
        """Give one measure of all rounds."""
        return [getattr(sample, measure) for sample in self.samples]

    def median(self, measure: str) -> float:
        """Give the median of a measure."""
        return median(self.of(measure))


@dataclass(frozen=True)
class Turn:
    """A contender in a workload, up and running, with what it has reached so far."""

    workload: Workload
    server: RunningServer
    result: Result

    def take(self, client: Client, seconds: float) -> Sample:
        """Load the server once."""
        return self.server.measure(client, self.workload.call, self.workload.connections, seconds)


def run(
    workloads: Iterable[Workload],
    databases: Databases,
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Run the workloads one after another, and those of a series together."""
    results: list[Result] = []
    for _, group in groupby(workloads, key=lambda workload: workload.group):
        with ExitStack() as stack:
            turns = run_group(list(group), databases, plan, stack)
        for turn in turns:
            say(summary(turn))
            results.append(turn.result)
    return results


def run_group(
    workloads: list[Workload], databases: Databases, plan: Plan, stack: ExitStack
) -> list[Turn]:
    """Have the contenders of some workloads up all at once, compare their answers, load them."""
    turns = []
    for workload in workloads:
        turns += launch(workload, databases.url(workload.where), plan, stack)
    for turn in turns:
        turn.server.wait_until_up()
    for workload in workloads:
        check_answers(workload, [turn.server for turn in turns if turn.workload is workload])
    run_rounds(turns, plan)
    return turns


def summary(turn: Turn) -> str:
    """Give the medians of a result in one line."""
    result = turn.result
    return (
        f"{result.workload:14}{result.contender:22}"
        f"{result.median('requests_per_second'):9.0f} requests/s"
        f"{result.median('cpu_us'):9.1f} us CPU{result.median('mean_ms'):9.2f} ms"
        f"{result.median('memory_mb'):8.1f} MB"
    )


def launch(workload: Workload, url: str, plan: Plan, stack: ExitStack) -> list[Turn]:
    """Launch the contenders of a workload, until the stack ends."""
    return [
        Turn(
            workload,
            stack.enter_context(
                launched(
                    name,
                    url,
                    pool_size=plan.pool_size,
                    more_routes=workload.more_routes,
                    workers=workload.workers,
                )
            ),
            Result(workload.name, name),
        )
        for name in plan.contenders(workload)
    ]


def check_answers(workload: Workload, servers: list[RunningServer]) -> None:
    """Compare the answers of all contenders.

    Raises:
        ContenderFailed: one is not like that of the first contender.
    """
    meanings = [workload.meaning(server.answer(workload.call)) for server in servers]
    for server, meaning in zip(servers, meanings, strict=True):
        if meaning != meanings[0]:
            raise ContenderFailed(
                f"{server.arguments.name} answers {meaning} to {workload.call.path}, "
                f"and {servers[0].arguments.name} {meanings[0]}"
            )


def run_rounds(turns: list[Turn], plan: Plan) -> None:
    """Warm all up, then load each once a round, another one first each time."""
    if plan.warm_up:
        for turn in turns:
            turn.take(plan.client, plan.warm_up)
    order = deque(turns)
    for _ in range(plan.rounds):
        for turn in order:
            turn.result.samples.append(turn.take(plan.client, plan.seconds))
        order.rotate(-1)
