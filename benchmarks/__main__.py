"""`python -m benchmarks`: the command line."""

from __future__ import annotations

import argparse
import sys
from fnmatch import fnmatch
from pathlib import Path

from .conditions import conditions
from .contenders import LABELS
from .costs import import_times, round_trips, start_times
from .databases import Databases, databases
from .load import default_client, python_client, wrk
from .report import Report, put_into
from .rounds import Plan, run
from .server import ROOT
from .workloads import WORKLOADS, Workload

CLIENTS = {"wrk": wrk, "python": python_client}
PAGE = ROOT / "docs" / "performance.md"


def parser() -> argparse.ArgumentParser:
    """Give the parser of the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", metavar="WORKLOAD", help=", ".join(WORKLOADS))
    names = ", ".join(LABELS)
    add("--contenders", nargs="+", default=[], choices=LABELS, metavar="NAME", help=names)
    add("--rounds", type=int, default=5, help="of each contender (default: 5)")
    add("--seconds", type=float, default=2, help="of a round (default: 2)")
    add("--warm-up", type=float, default=1, help="seconds before each round (default: 1)")
    add("--pool-size", type=int, default=16, help="connections of each pool (default: 16)")
    add("--client", choices=CLIENTS, help="wrk where there is one, or else python")
    add("--out", type=Path, default=ROOT / "build" / "benchmarks", help="folder for the report")
    add("--docs", action="store_true", help="put the report into the documentation")
    quick = "one round of a second: to see that all runs, not to read the figures"
    add("--quick", action="store_true", help=quick)
    return parser


def plan_of(arguments: argparse.Namespace) -> Plan:
    """Give the plan that the command line asks for."""
    return Plan(
        client=CLIENTS.get(arguments.client) or default_client(),
        rounds=1 if arguments.quick else arguments.rounds,
        seconds=1 if arguments.quick else arguments.seconds,
        warm_up=0 if arguments.quick else arguments.warm_up,
        pool_size=arguments.pool_size,
        only=tuple(arguments.contenders),
    )


def chosen(patterns: list[str] | None) -> list[Workload]:
    """Give the workloads that the patterns name; without patterns, all."""
    return [
        workload
        for name, workload in WORKLOADS.items()
        if patterns is None or any(fnmatch(name, pattern) for pattern in patterns)
    ]


def measure(arguments: argparse.Namespace, opened: Databases) -> Report:
    """Make the run; what has no load only if nothing was chosen."""
    plan = plan_of(arguments)
    about = conditions(opened, plan, sys.argv[1:])
    results = run(chosen(arguments.only), opened, plan, say=say)
    if arguments.only or arguments.contenders:
        return Report(about, results, {}, {}, {})
    say("round trips, starts and imports")
    trips, starts = round_trips(opened, LABELS), start_times(opened, min(3, plan.rounds))
    return Report(about, results, trips, starts, import_times(plan.rounds))


def say(line: str) -> None:
    print(line, flush=True)


def write(report: Report, folder: Path) -> None:
    """Write the figures and the charts."""
    from .charts import draw

    folder.mkdir(parents=True, exist_ok=True)
    report.save(folder / "raw.json")
    draw(report.results, folder)


def parts_of(folder: Path, shown_in: Path) -> dict[str, str]:
    """Give the parts of the report in a folder, for a page in another one."""
    charts = {path.stem: str(path.relative_to(shown_in)) for path in folder.glob("*.svg")}
    return Report.load(folder / "raw.json").parts(charts)


def main() -> None:
    arguments = parser().parse_args()
    if arguments.docs and (arguments.only or arguments.contenders or arguments.quick):
        parser().error("the documentation shows a whole run, and no other")
    with databases() as opened:
        report = measure(arguments, opened)
    folder = PAGE.with_suffix("") if arguments.docs else arguments.out
    write(report, folder)
    if arguments.docs:
        put_into(PAGE, parts_of(folder, PAGE.parent))
    else:
        parts = parts_of(folder, folder)
        (folder / "report.md").write_text("\n\n".join(parts.values()) + "\n")
    say(f"\n{folder}")


if __name__ == "__main__":
    main()
