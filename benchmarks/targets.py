"""The targets: how a contender is to compare with another one in the same workload."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

from .rounds import Result


@dataclass(frozen=True)
class Comparison:
    """A way to compare two contenders, round by round.

    Args:
        measure: of a sample.
        compare: the number that two values of the measure make, ours first.
        unit: what stands before and after that number.
        at_least: whether a target is a lower bound of it, and not an upper one.
    """

    measure: str
    compare: Callable[[float, float], float]
    unit: str
    at_least: bool = True

    def of(self, ours: Result, against: Result) -> float:
        """Compare each round with the round beside it, and give the median."""
        pairs = zip(ours.of(self.measure), against.of(self.measure), strict=True)
        return median(self.compare(one, other) for one, other in pairs)

    def show(self, number: float) -> str:
        """Write a number with its unit."""
        return self.unit.format(number)


REQUESTS = Comparison("requests_per_second", lambda ours, against: ours / against, "{:.2f} x")
CPU = Comparison("cpu_us", lambda ours, against: against / ours, "{:.2f} x")
LATENCY = Comparison("mean_ms", lambda ours, against: against / ours, "{:.2f} x")
MORE_CPU = Comparison(
    "cpu_us", lambda ours, against: ours - against, "{:+.1f} us CPU", at_least=False
)
OVERHEAD = Comparison(
    "cpu_us", lambda ours, against: (ours / against - 1) * 100, "{:+.0f} % CPU", at_least=False
)


@dataclass(frozen=True)
class Target:
    """What is to be reached.

    Args:
        workload: where.
        contender: who reaches it.
        against: compared with whom.
        bound: the number to reach; None if it is only reported.
        by: the comparison.
    """

    workload: str
    contender: str
    against: str
    bound: float | None
    by: Comparison = REQUESTS

    def met(self, reached: float) -> bool:
        """Whether a number is good enough."""
        if self.bound is None:
            return True
        return reached >= self.bound if self.by.at_least else reached <= self.bound


TARGETS = [
    Target("read-by-key", "async_read_session", "usual", 1.4),
    Target("read-by-key", "read_session", "usual", 1.5),
    Target("read-by-key", "async_session", "usual", 1.1),
    Target("read-by-key", "session", "usual", 1.2),
    Target("write", "session", "usual", 1.15),
    Target("twenty-reads", "session", "usual", 1.2),
    Target("read-by-key", "read_session", "fastapi_depends", 2.0),
    Target("read-by-key", "read_session", "litestar_alchemy", 1.5),
    Target("read-by-key", "session", "fastapi_depends", 1.8),
    Target("read-by-key", "session", "litestar_alchemy", 1.3),
    Target("far-read", "read_session", "usual", 2.3, LATENCY),
    Target("plain", "plain_with_blueprint", "plain", 0.99),
    Target("unused", "session", "injected_trivial", 5.0, MORE_CPU),
    Target("unused", "async_session", "injected_trivial", 5.0, MORE_CPU),
    Target("parts", "with_part:imported", "session", 0.99),
    Target("read-by-key", "read_session", "best", 10.0, OVERHEAD),
    Target("read-by-key", "read_session", "raw_asyncpg", None),
]


@dataclass(frozen=True)
class Outcome:
    """A target, and what was reached.

    Args:
        target: what was to be reached.
        reached: by the target's own comparison.
        cpu: the ratio of the processor time, to set beside it.
    """

    target: Target
    reached: float
    cpu: float

    @property
    def met(self) -> bool:
        """Whether it is good enough."""
        return self.target.met(self.reached)


def outcomes(results: Iterable[Result]) -> list[Outcome]:
    """Compare the results of a run with the targets that it has figures for."""
    found = {(result.workload, result.contender): result for result in results}
    reached = []
    for target in TARGETS:
        ours = found.get((target.workload, target.contender))
        against = found.get((target.workload, target.against))
        if ours and against:
            numbers = target.by.of(ours, against), CPU.of(ours, against)
            reached.append(Outcome(target, *numbers))
    return reached
