"""`python -m benchmarks`: the command line."""

from __future__ import annotations

import argparse
from fnmatch import fnmatch

from .contenders import LABELS
from .databases import databases
from .load import default_client, python_client, wrk
from .rounds import Plan, run
from .workloads import WORKLOADS, Workload

CLIENTS = {"wrk": wrk, "python": python_client}


def parser() -> argparse.ArgumentParser:
    """Give the parser of the command line."""
    parser = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    add = parser.add_argument
    add("--only", nargs="+", default=["*"], metavar="WORKLOAD", help=", ".join(WORKLOADS))
    add(
        "--contenders",
        nargs="+",
        default=[],
        choices=LABELS,
        metavar="NAME",
        help=", ".join(LABELS),
    )
    add("--rounds", type=int, default=5, help="of each contender (default: 5)")
    add("--seconds", type=float, default=2, help="of a round (default: 2)")
    add("--pool-size", type=int, default=16, help="connections of each pool (default: 16)")
    add("--client", choices=CLIENTS, help="wrk where there is one, or else python")
    return parser


def chosen(patterns: list[str]) -> list[Workload]:
    """Give the workloads that the patterns name."""
    return [
        workload
        for name, workload in WORKLOADS.items()
        if any(fnmatch(name, pattern) for pattern in patterns)
    ]


def main() -> None:
    arguments = parser().parse_args()
    plan = Plan(
        client=CLIENTS.get(arguments.client) or default_client(),
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        pool_size=arguments.pool_size,
        only=tuple(arguments.contenders),
    )
    with databases() as opened:
        run(chosen(arguments.only), opened, plan, say=lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
