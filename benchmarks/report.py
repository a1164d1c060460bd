"""The report: everything of a run as JSON, and the tables that are made of it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .contenders import LABELS
from .costs import COUNTED, STARTED, ByContender
from .rounds import Result
from .server import Sample
from .targets import outcomes
from .workloads import TARGETS, WORKLOADS

CHARTS = {
    "targets": "Requests per second of the contenders",
    "techempower": "Requests per second in the TechEmpower tests",
    "in-flight": "What changes from 1 to 256 requests in flight",
    "routes": "What changes from 10 to 1000 routes",
    "workers": "What changes from 1 to 2 workers",
}
"""The charts, with what they show."""


@dataclass
class Report:
    """What a run has found.

    Args:
        conditions: what it was made with.
        results: of all contenders in all workloads.
        round_trips: of one request.
        starts: seconds from the launch to the first answer.
        imports: milliseconds.
    """

    conditions: dict[str, str]
    results: list[Result]
    round_trips: ByContender
    starts: ByContender
    imports: dict[str, float]

    @classmethod
    def load(cls, path: Path) -> Report:
        """Read a report that was written by :meth:`save`."""
        found: dict[str, Any] = json.loads(path.read_text())
        results = [
            Result(**{**each, "samples": [Sample(**sample) for sample in each["samples"]]})
            for each in found.pop("results")
        ]
        return cls(**found, results=results)

    def save(self, path: Path) -> None:
        """Write everything, with figures as exact as clocks are."""
        shortened = json.loads(json.dumps(asdict(self)), parse_float=_short)
        path.write_text(json.dumps(shortened, indent=1) + "\n")

    def parts(self, charts: Mapping[str, str]) -> dict[str, str]:
        """Give what can be shown, as Markdown, by its name.

        Args:
            charts: where the chart is that goes with the table of the same name.
        """
        parts = {
            "targets": self._targets(),
            "work": self._workloads(each.name for each in TARGETS),
            "parts": self._workloads(["parts"]),
            "techempower": self._workloads(_starting_with("te-")),
            "sqlite": self._workloads(_starting_with("sqlite-")),
            "in-flight": self._workloads(_starting_with("in-flight-")),
            "routes": self._workloads(_starting_with("routes-")),
            "workers": self._workloads(_starting_with("workers-")),
            "round-trips": self._by_contender(self.round_trips, COUNTED, "{:g}"),
            "imports": self._imports(),
            "starts": self._by_contender(self.starts, STARTED, "{:.2f}"),
            "conditions": _table(["what", "value"], map(list, self.conditions.items())),
        }
        return {
            name: f"{table}\n\n![{CHARTS[name]}]({charts[name]})" if name in charts else table
            for name, table in parts.items()
            if table
        }

    def _targets(self) -> str:
        rows = [
            [
                WORKLOADS[found.target.workload].title,
                LABELS[found.target.contender],
                LABELS[found.target.against],
                found.target.by.show(found.reached),
                f"{found.cpu:.2f} x",
                _bound(found.target.by.show, found.target.bound, found.target.by.at_least),
                "" if found.target.bound is None else "yes" if found.met else "**no**",
            ]
            for found in outcomes(self.results)
        ]
        head = ["work", "contender", "against", "reached", "CPU time", "target", "met"]
        return _table(head, rows)

    def _workloads(self, names: Iterable[str]) -> str:
        wanted = set(names)
        rows = [
            [
                WORKLOADS[result.workload].title,
                LABELS[result.contender],
                f"{result.median('requests_per_second'):,.0f}",
                f"{result.median('cpu_us'):,.0f}",
                f"{result.median('mean_ms'):,.2f}",
                f"{result.median('p99_ms'):,.2f}",
                f"{result.median('memory_mb'):,.0f}",
            ]
            for result in self.results
            if result.workload in wanted
        ]
        head = ["work", "contender", "requests/s", "CPU us/request", "mean ms", "99 % ms", "MB"]
        return _table(head, rows)

    def _by_contender(self, numbers: ByContender, names: Iterable[str], form: str) -> str:
        columns = [name for name in names if any(name in found for found in numbers.values())]
        rows = [
            [LABELS[contender], *(form.format(found[of]) if of in found else "" for of in columns)]
            for contender, found in numbers.items()
        ]
        return _table(["contender", *(WORKLOADS[name].title for name in columns)], rows)

    def _imports(self) -> str:
        rows = [[what, f"{milliseconds:.0f}"] for what, milliseconds in self.imports.items()]
        return _table(["import", "ms"], rows)


def put_into(page: Path, parts: dict[str, str]) -> None:
    """Put the tables into a page, between the comments with their names.

    Raises:
        ValueError: a part has no place in the page.
    """
    text = page.read_text()
    for name, table in parts.items():
        before, opening, rest = text.partition(f"<!-- {name} -->\n")
        _, closing, after = rest.partition(f"<!-- end of {name} -->")
        if not closing:
            raise ValueError(f"{page.name} has no place for the part {name!r}")
        text = f"{before}{opening}{table}\n{closing}{after}"
    page.write_text(text)


def _table(head: list[str], rows: Iterable[list[str]]) -> str:
    lines = [" | ".join(row) for row in rows]
    if not lines:
        return ""
    ruler = " | ".join(["---"] * len(head))
    return "\n".join(f"| {line} |" for line in (" | ".join(head), ruler, *lines))


def _bound(show: Any, bound: float | None, at_least: bool) -> str:
    if bound is None:
        return ""
    return f"at {'least' if at_least else 'most'} {show(bound)}"


def _starting_with(prefix: str) -> list[str]:
    return [name for name in WORKLOADS if name.startswith(prefix)]


def _short(text: str) -> float:
    return round(float(text), 3)
