"""The charts, as SVG files that can be read on a light and on a dark page.

Drawn by matplotlib: of the libraries that write SVG it is the one with the most maintainers, and it
ships its types.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from .rounds import Result
from .workloads import WORKLOADS

GREY = "#767676"
"""Has a contrast of 4 to 1 with white and with the page in the dark."""

OURS = "#0f8f7f"
LINES = ("#d1603d", "#0f8f7f", "#5b7fd1")

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "sanic-db-bp",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": GREY,
    "axes.edgecolor": GREY,
    "axes.labelcolor": GREY,
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "legend.frameon": False,
}

SHORT = {
    "usual": "by hand, usual",
    "best": "by hand, best",
    "best_async": "by hand, AsyncSession",
    "session": "Session",
    "async_session": "AsyncSession",
    "read_session": "ReadSession",
    "async_read_session": "AsyncReadSession",
    "fastapi_depends": "FastAPI",
    "litestar_alchemy": "Litestar",
    "raw_asyncpg": "asyncpg alone",
    "plain": "no database",
}

BARS = {
    "targets": ("read-by-key", "write", "twenty-reads", "far-read"),
    "techempower": ("te-single", "te-queries", "te-fortunes", "te-updates"),
}

CURVES = {
    "in-flight": "requests in flight",
    "routes": "routes",
    "workers": "workers",
}


def draw(results: Sequence[Result], folder: Path) -> list[Path]:
    """Draw what there are results for; gives the files."""
    with mpl.rc_context(STYLE):
        figures = {**_bar_charts(results), **_growth_charts(results)}
        return [_save(figure, folder / f"{name}.svg") for name, figure in figures.items()]


def _save(figure: Figure, path: Path) -> Path:
    figure.savefig(path, transparent=True, metadata={"Date": None})
    # Lines of SVG end in spaces.
    lines = [line.rstrip() for line in path.read_text().splitlines()]
    path.write_text("\n".join(lines) + "\n")
    return path


def _bar_charts(results: Sequence[Result]) -> dict[str, Figure]:
    figures = {}
    for name, workloads in BARS.items():
        panels = [
            (workload, found)
            for workload in workloads
            if (found := [result for result in results if result.workload == workload])
        ]
        if panels:
            figures[name] = _bar_chart(panels)
    return figures


def _bar_chart(panels: Sequence[tuple[str, list[Result]]]) -> Figure:
    figure = Figure(figsize=(8, 0.25 + 2.6 * ((len(panels) + 1) // 2)), layout="constrained")
    columns = min(2, len(panels))
    grid: Any = figure.subplots((len(panels) + 1) // 2, columns, squeeze=False).flat
    for axes, (workload, found) in zip(grid, panels, strict=False):
        ordered = sorted(found, key=lambda result: result.median("requests_per_second"))
        bars = axes.barh(
            [SHORT[result.contender] for result in ordered],
            [result.median("requests_per_second") for result in ordered],
            color=[OURS if "session" in result.contender else GREY for result in ordered],
        )
        axes.bar_label(bars, fmt="{:,.0f}", padding=3, color=GREY, fontsize=8)
        axes.set_title(WORKLOADS[workload].title.removeprefix("TechEmpower: "), loc="left")
        axes.set_xlabel("requests per second")
        axes.margins(x=0.15)
    return figure


def _growth_charts(results: Sequence[Result]) -> dict[str, Figure]:
    figures = {}
    for group, label in CURVES.items():
        found = [result for result in results if WORKLOADS[result.workload].group == group]
        if found:
            figures[group] = _growth_chart(found, label)
    return figures


def _growth_chart(results: Sequence[Result], label: str) -> Figure:
    figure = Figure(figsize=(8, 2.8), layout="constrained")
    measures: dict[str, Callable[[Result], float]] = {
        "requests per second": lambda result: result.median("requests_per_second"),
        "CPU us per request": lambda result: result.median("cpu_us"),
        "megabytes": lambda result: result.median("memory_mb"),
    }
    grid: Any = figure.subplots(1, len(measures))
    for axes, (title, measure) in zip(grid, measures.items(), strict=True):
        for contender, color in zip(_names(results), LINES, strict=False):
            line = [result for result in results if result.contender == contender]
            sizes = [result.workload.rpartition("-")[2] for result in line]
            axes.plot(
                sizes, [measure(each) for each in line], "o-", color=color, label=SHORT[contender]
            )
        axes.set_title(title, loc="left")
        axes.set_xlabel(label)
        axes.set_ylim(bottom=0)
    grid[0].legend(fontsize=8)
    return figure


def _names(results: Iterable[Result]) -> list[str]:
    return list(dict.fromkeys(result.contender for result in results))
