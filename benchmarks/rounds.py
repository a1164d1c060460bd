"""The rounds: each contender of a workload in turn, again and again, so that all meet the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field
from statistics import median

from .contenders import PEERS
from .databases import Databases
from .load import Client
from .server import ContenderFailed, RunningServer, Sample, serving
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
    start_seconds: float
    samples: list[Sample] = field(default_factory=list)

    def of(self, measure: str) -> list[float]:
        """Give one measure of all rounds."""
        return [getattr(sample, measure) for sample in self.samples]

    def median(self, measure: str) -> float:
        """Give the median of a measure."""
        return median(self.of(measure))


def run(
    workloads: Iterable[Workload],
    databases: Databases,
    plan: Plan,
    say: Callable[[str], None] = lambda line: None,
) -> list[Result]:
    """Run the workloads one after another."""
    results = []
    for workload in workloads:
        if plan.contenders(workload):
            say(workload.title)
            results += run_workload(workload, databases.url(workload.where), plan)
            for result in results[-len(plan.contenders(workload)) :]:
                say(summary(result))
    return results


def summary(result: Result) -> str:
    """Give the medians of a result in one line."""
    return (
        f"  {result.contender:22}{result.median('requests_per_second'):9.0f} requests/s"
        f"{result.median('cpu_us'):9.1f} us CPU{result.median('mean_ms'):9.2f} ms"
        f"{result.median('memory_mb'):8.1f} MB"
    )


def run_workload(workload: Workload, url: str, plan: Plan) -> list[Result]:
    """Start the contenders of a workload, compare their answers, and load them in turn."""
    with ExitStack() as stack:
        servers = [
            stack.enter_context(
                serving(
                    name,
                    url,
                    pool_size=plan.pool_size,
                    more_routes=workload.more_routes,
                    workers=workload.workers,
                )
            )
            for name in plan.contenders(workload)
        ]
        check_answers(workload, servers)
        for server in servers:
            server.measure(plan.client, workload.call, workload.connections, plan.warm_up)
        return run_rounds(workload, servers, plan)


def check_answers(workload: Workload, servers: list[RunningServer]) -> None:
    """Compare the answers of all contenders.

    Raises:
        ContenderFailed: one is not like the first.
    """
    meanings = [workload.meaning(server.answer(workload.call)) for server in servers]
    for server, meaning in zip(servers, meanings, strict=True):
        if meaning != meanings[0]:
            raise ContenderFailed(
                f"{server.arguments.name} answers {meaning} to {workload.call.path}, "
                f"and {servers[0].arguments.name} {meanings[0]}"
            )


def run_rounds(workload: Workload, servers: list[RunningServer], plan: Plan) -> list[Result]:
    """Load each contender once a round, another one first each time."""
    results = [
        Result(workload.name, server.arguments.name, server.start_seconds) for server in servers
    ]
    turns = list(zip(servers, results, strict=True))
    for _ in range(plan.rounds):
        for server, result in turns:
            result.samples.append(
                server.measure(plan.client, workload.call, workload.connections, plan.seconds)
            )
        turns.append(turns.pop(0))
    return results


def without_peers(workloads: Iterable[Workload]) -> set[str]:
    """Give the contenders that need no packages beside those of the suite."""
    return {name for each in workloads for name in each.contenders if name not in PEERS}
