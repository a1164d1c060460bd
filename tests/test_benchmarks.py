"""The benchmarks: what they compare is there, they fail where they have to, and what they report is
what they measured. No figure is looked at.
"""

from __future__ import annotations

import asyncio
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from benchmarks.__main__ import PAGE, main, parts_of
from benchmarks.contenders import LABELS, PEERS, with_part
from benchmarks.databases import databases, sqlite
from benchmarks.load import Load, python_client
from benchmarks.proxy import proxied
from benchmarks.report import Report, put_into
from benchmarks.rounds import Answers, Plan, Result, check_answer, run
from benchmarks.server import (
    ContenderFailed,
    RunningServer,
    Sample,
    environment,
    launched,
    serving,
)
from benchmarks.targets import CPU, MORE_CPU, REQUESTS, TARGETS, Target, outcomes
from benchmarks.workloads import WORKLOADS, Call

QUICK = Plan(client=python_client, rounds=2, seconds=0.1, warm_up=0, only=("read_session",))
READ = WORKLOADS["sqlite-read"]


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A contender that is being served."""
    with sqlite() as url, serving("read_session", url) as running:
        yield running


@pytest.mark.parametrize("name", sorted(LABELS.keys() - PEERS))
def test_every_contender_is_a_module_that_makes_an_app(name: str) -> None:
    """The names that the command line takes are those of the modules, with a part perhaps."""
    module, _, part = name.partition(":")
    assert callable(import_module(f"benchmarks.contenders.{module}").create_app)
    assert not part or part in with_part.INSTALL


def test_every_workload_is_for_contenders_that_are_there() -> None:
    """A misspelt name is not found out after half an hour."""
    for workload in WORKLOADS.values():
        assert set(workload.contenders) <= LABELS.keys()


@pytest.mark.parametrize("target", TARGETS, ids=lambda each: f"{each.workload}-{each.contender}")
def test_every_target_is_measured(target: Target) -> None:
    """Both sides of a target take part in its workload."""
    assert {target.contender, target.against} <= set(WORKLOADS[target.workload].contenders)


def test_a_run_reports_every_round_of_every_contender(tmp_path: Path) -> None:
    """The samples are there, are the same after they were saved, and make a table."""
    with databases() as opened:
        results = run([READ], opened, QUICK)
    Report({"Command": "none"}, results, {}, {}, {}).save(tmp_path / "raw.json")
    report = Report.load(tmp_path / "raw.json")
    (result,) = report.results
    assert (result.workload, result.contender) == ("sqlite-read", "read_session")
    assert len(result.samples) == QUICK.rounds
    assert min(result.of("requests_per_second")) > 0
    assert min(result.of("memory_mb")) > 10
    assert report.parts({}).keys() == {"sqlite", "conditions"}
    assert f"| {READ.title} | {LABELS['read_session']} |" in report.parts({})["sqlite"]


def test_every_round_has_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process can be faster than another of the same program for as long as it lives."""
    steps: list[str] = []

    @contextmanager
    def launch(*arguments: Any, **options: Any) -> Iterator[RunningServer]:
        with launched(*arguments, **options) as running:
            steps.append("launched")
            yield running
        steps.append("stopped")

    def client(port: int, call: Call, connections: int, seconds: float) -> Load:
        steps.append(f"loaded for {seconds} s")
        return python_client(port, call, connections, seconds)

    monkeypatch.setattr("benchmarks.rounds.launched", launch)
    with databases() as opened:
        run([READ], opened, replace(QUICK, client=client, warm_up=0.05))
    assert steps == ["launched", "loaded for 0.05 s", "loaded for 0.1 s", "stopped"] * QUICK.rounds


def test_what_is_measured_has_an_environment_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No settings of this shell, and no compiling at each start, which no user has."""
    for name in ("SANIC_DB_URL", "DATABASE_URL", "PYTHONDONTWRITEBYTECODE", "KEPT"):
        monkeypatch.setenv(name, "1")
    assert (
        environment().keys() & {"SANIC_DB_URL", "DATABASE_URL", "PYTHONDONTWRITEBYTECODE"} == set()
    )
    assert environment()["KEPT"] == "1"


def test_a_contender_that_does_not_start_fails_the_run() -> None:
    """The error has the last lines of its log."""
    with pytest.raises(ContenderFailed, match=r"(?s)nobody does not start.*ModuleNotFoundError"):
        serving("nobody", "").__enter__()


def test_an_answer_that_is_an_error_fails_the_check(server: RunningServer) -> None:
    """Nothing is measured that does not work."""
    with pytest.raises(ContenderFailed, match="read_session answers 404 to /nothing"):
        server.answer(Call("/nothing"))


def test_errors_under_load_fail_the_run(server: RunningServer) -> None:
    """Answers that are errors are fast, and worth nothing."""
    with pytest.raises(ContenderFailed, match="requests to /nothing failed"):
        server.measure(python_client, Call("/nothing"), 2, 0.05)


def test_no_answer_at_all_fails_the_run(server: RunningServer) -> None:
    """A load that was not answered has no figures."""

    def silent(port: int, call: Call, connections: int, seconds: float) -> Load:
        return Load(requests=0, failed=0, seconds=seconds, mean_ms=0, p99_ms=0)

    with pytest.raises(ContenderFailed, match="0 were answered"):
        server.measure(silent, READ.call, 1, 0.05)


def test_contenders_have_to_answer_alike(server: RunningServer) -> None:
    """An answer with another meaning ends the run before anything is measured."""
    answers: Answers = {}
    check_answer(READ, server, answers)
    check_answer(READ, server, answers)
    differing = replace(READ, meaning=lambda body: "Coffee")
    with pytest.raises(ContenderFailed, match="answers Coffee to /items/1, and read_session"):
        check_answer(differing, server, answers)


def result(contender: str, *samples: tuple[float, float]) -> Result:
    """Make the result of a contender of requests per second and processor time."""
    found = [Sample(requests, cpu, 1.0, 2.0, 50.0) for requests, cpu in samples]
    return Result("read-by-key", contender, found)


def test_rounds_are_compared_one_by_one() -> None:
    """The median of the ratios, and not the ratio of the medians: a slow round is so for both."""
    ours = result("read_session", (200, 50), (20, 60), (300, 70))
    against = result("usual", (100, 150), (10, 120), (200, 70))
    assert REQUESTS.of(ours, against) == 2.0
    assert CPU.of(ours, against) == 2.0
    assert MORE_CPU.of(ours, against) == -60


@pytest.mark.parametrize(("requests", "met"), [(151, True), (149, False)])
def test_a_target_is_met_from_its_bound_on(requests: float, met: bool) -> None:
    """The report says which targets are not reached."""
    results = [result("read_session", (requests, 50)), result("usual", (100, 75))]
    (outcome,) = outcomes(results)
    assert (outcome.met, outcome.reached, outcome.cpu) == (met, requests / 100, 1.5)
    table = Report({}, results, {}, {}, {}).parts({"targets": "a.svg"})["targets"]
    assert ("**no**" in table) is not met
    assert table.endswith("(a.svg)")


def test_an_upper_bound_is_met_below_it() -> None:
    """More processor time than allowed is too much."""
    target = Target("unused", "session", "injected_trivial", 5.0, MORE_CPU)
    assert target.met(4.9)
    assert not target.met(5.1)


def test_tables_go_where_the_page_names_them(tmp_path: Path) -> None:
    """What was there before is replaced; a table without a place is an error."""
    page = tmp_path / "page.md"
    page.write_text("A\n\n<!-- work -->\nold\n<!-- end of work -->\n\nB\n")
    put_into(page, {"work": "| new |"})
    assert page.read_text() == "A\n\n<!-- work -->\n| new |\n<!-- end of work -->\n\nB\n"
    with pytest.raises(ValueError, match="no place for the part 'targets'"):
        put_into(page, {"targets": ""})


def test_the_page_on_performance_shows_what_the_last_run_has_found(tmp_path: Path) -> None:
    """No figure of the page was written by hand, and none is of another run."""
    filled, parts = PAGE.read_text(), {}
    if (PAGE.with_suffix("") / "raw.json").exists():
        parts = parts_of(PAGE.with_suffix(""), PAGE.parent)
    copy = tmp_path / PAGE.name
    copy.write_text(re.sub(r"(?s)(<!-- (\S+) -->\n).*?(?=<!-- end of \2 -->)", r"\1", filled))
    put_into(copy, parts)
    assert copy.read_text() == filled


@pytest.mark.parametrize("partly", [["--only", "plain"], ["--contenders", "usual"], ["--quick"]])
def test_the_page_on_performance_shows_no_part_of_a_run(
    partly: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its tables are of one run, side by side."""
    monkeypatch.setattr("sys.argv", ["benchmarks", "--docs", *partly])
    with pytest.raises(SystemExit):
        main()


@contextmanager
def echo_server() -> Iterator[int]:
    """Serve on a port, in a thread: what arrives is sent back."""

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1000):
            writer.write(data)
        writer.close()

    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(echo, "127.0.0.1"))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield server.sockets[0].getsockname()[1]
    loop.call_soon_threadsafe(server.close)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def test_the_proxy_counts_round_trips() -> None:
    """Two packets without an answer in between are one round trip; what is sent arrives."""

    async def talk(port: int) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        for said in (b"one", b"two", b"three"):
            writer.write(said)
            assert await reader.readexactly(len(said)) == said
        writer.close()
        await writer.wait_closed()

    with echo_server() as port, proxied(f"postgresql://127.0.0.1:{port}/", delay=0.0001) as proxy:
        asyncio.run(talk(int(proxy.url.rstrip("/").rpartition(":")[2])))
        assert proxy.round_trips() == 3
