"""The rounds: each contender of a workload in turn, again and again, so that all meet the same."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
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
        warm_up: seconds of load before each round.
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


Answers = dict[str, tuple[str, object]]
"""The first answer in each workload: whose, and what it means."""


@dataclass(frozen=True)
class Turn:
    """A contender in a workload, with what it has reached so far."""

    workload: Workload
    url: str
    result: Result

    def take(self, plan: Plan, answers: Answers) -> Sample:
        """Serve the contender in a new process, compare its answer, and load it once.

        What a process happens to have, such as the places of its memory, it keeps as long as it
        lives: rounds in one and the same would all have it.
        """
        workload = self.workload
        with launched(
            self.result.contender,
            self.url,
            pool_size=plan.pool_size,
            more_routes=workload.more_routes,
            workers=workload.workers,
        ) as server:
            server.wait_until_up()
            check_answer(workload, server, answers)
            if plan.warm_up:
                server.measure(plan.client, workload.call, workload.connections, plan.warm_up)
            return server.measure(plan.client, workload.call, workload.connections, plan.seconds)


def run(
    workloads: Iterable[Workload],
    databases: Databases,
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Run the workloads one after another, and those of a series together."""
    results: list[Result] = []
    for _, group in groupby(workloads, key=lambda workload: workload.group):
        turns = [
            Turn(workload, databases.url(workload.where), Result(workload.name, contender))
            for workload in group
            for contender in plan.contenders(workload)
        ]
        run_rounds(turns, plan)
        for turn in turns:
            say(summary(turn.result))
            results.append(turn.result)
    return results


def run_rounds(turns: list[Turn], plan: Plan) -> None:
    """Let each have its turn once a round, another one first each time."""
    answers: Answers = {}
    order = deque(turns)
    for _ in range(plan.rounds):
        for turn in order:
            turn.result.samples.append(turn.take(plan, answers))
        order.rotate(-1)


def check_answer(workload: Workload, server: RunningServer, answers: Answers) -> None:
    """Compare an answer with the first one in this workload.

    Raises:
        ContenderFailed: it does not mean the same.
    """
    name, meaning = server.arguments.name, workload.meaning(server.answer(workload.call))
    first_name, first = answers.setdefault(workload.name, (name, meaning))
    if meaning != first:
        raise ContenderFailed(
            f"{name} answers {meaning} to {workload.call.path}, and {first_name} {first}"
        )


def summary(result: Result) -> str:
    """Give the medians of a result in one line."""
    return (
        f"{result.workload:14}{result.contender:22}"
        f"{result.median('requests_per_second'):9.0f} requests/s"
        f"{result.median('cpu_us'):9.1f} us CPU{result.median('mean_ms'):9.2f} ms"
        f"{result.median('memory_mb'):8.1f} MB"
    )
