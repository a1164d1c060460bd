"""The README and the documentation: every sample runs, and nothing that they state is stale.

The ``python`` blocks of a page are one program (and ``diff`` blocks too, as they are after the
change); ``text`` blocks are what it has printed so far. The commands of ``console`` blocks are then
tried on its ``app``, and their outputs compared.
"""

from __future__ import annotations

import argparse
import ast
import asyncio
import contextlib
import doctest
import importlib
import io
import json
import os
import pkgutil
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import Any

import httpx
import pytest
from sanic import Sanic
from sanic.application.constants import ServerStage
from sanic.application.state import ApplicationServerInfo
from sanic.cli.executor import Executor
from websockets.asyncio.client import connect

import sanic_db_bp
from sanic_db_bp import DatabaseSettings, contrib
from sanic_db_bp.contrib import migrations, testing
from tests.serving import serving

PROJECT = Path(__file__).parents[1]
START = PROJECT / "docs" / "start.md"
PAGES = [PROJECT / "README.md", *sorted(PROJECT.glob("docs/*.md"))]

PUBLIC_MODELS = ["ActiveRecordMixin", "TimestampMixin", "class_property"]
LANGUAGES = {"python", "diff", "console", "text", "ini", "{eval-rst}", "{toctree}"}
NOT_RUN = {"pip", "make", "sanic", "uvicorn", "python"}
"""Commands of ``console`` blocks that install something or start a server."""

TASKS_WITHIN = 5.0
"""Seconds to wait for the background tasks that a request has started."""

CURL = argparse.ArgumentParser("curl", exit_on_error=False)
CURL.add_argument("url")
CURL.add_argument("-X", dest="method")
CURL.add_argument("-H", dest="headers", action="append", default=[])
CURL.add_argument("--json", dest="body")
CURL.add_argument("-i", dest="with_head", action="store_true")
CURL.add_argument("-N", action="store_true")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        """Where it stands."""
        return f"{self.page.relative_to(PROJECT)}:{self.line}"

    @property
    def file(self) -> str | None:
        """The module that begins here, if the first line is ``# name.py``."""
        found = re.match(r" ?# (\w+)\.py\n", self.text)
        return found and found[1]


def blocks_of(page: Path) -> list[Block]:
    """Every fenced block of a page."""
    fence = re.compile(r"^(?P<fence>```+)(?P<language>.*?)\n(?P<text>.*?)^(?P=fence)$", re.M | re.S)
    text = page.read_text()
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["language"], found["text"])
        for found in fence.finditer(text)
    ]


def code_of(page: Path) -> list[Block]:
    """The blocks of code of a page."""
    return [block for block in blocks_of(page) if block.language in {"python", "diff"}]


class Program:
    """The files of a page, as modules of one process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.monkeypatch = monkeypatch
        self.module = ModuleType("app")
        self.app: Sanic[Any, Any] | None = None
        self.not_reached: set[str] = set()
        self.output = ""

    def run_code(self, page: Path) -> None:
        """Run the blocks of code of a page, except those that are for pytest."""
        for block in blocks_of(page):
            if block.file is not None and re.match("conftest|test_", block.file):
                continue
            if block.language in {"python", "diff"}:
                self.run(block)
            elif block.language == "text":
                check_output(block.text, self.output, block.place)
                self.output = ""
        assert not self.output, f"{page.name} does not show what its samples print"

    def run(self, block: Block) -> None:
        """Run a block of code in its module."""
        if block.file is not None:
            self.module = ModuleType(block.file)
            self.monkeypatch.setitem(sys.modules, block.file, self.module)
        self.module.__dict__["__reached__"] = self.not_reached.discard
        with contextlib.redirect_stdout(io.StringIO()) as output:
            exec(self._compiled(block), self.module.__dict__)
        self.output += output.getvalue()
        self.app = getattr(self.module, "app", self.app)

    def _compiled(self, block: Block) -> Any:
        # Sanic looks up the source of handlers, and a diff is none.
        name = str(block.page) + (" (diff)" if block.language == "diff" else "")
        tree = ast.parse(source_of(block), name)
        ast.increment_lineno(tree, block.line)
        self._watch(tree, block)
        return compile(tree, name, "exec", dont_inherit=True)

    def _watch(self, tree: ast.Module, block: Block) -> None:
        """Put a call before every statement, so that one that never runs is known."""
        for node in ast.walk(tree):
            for name in ("body", "orelse", "finalbody"):
                statements = getattr(node, name, None)
                if isinstance(statements, list):
                    pairs = [(self._mark(each, block), each) for each in statements]
                    setattr(node, name, [each for pair in pairs for each in pair])

    def _mark(self, statement: ast.stmt, block: Block) -> ast.stmt:
        place = f"{block.page.name}:{statement.lineno}"
        self.not_reached.add(place)
        mark = ast.parse(f"__reached__({place!r})").body[0]
        for node in ast.walk(mark):
            ast.copy_location(node, statement)
        return mark


def source_of(block: Block) -> str:
    """The code of a block; of a diff, as it is after the change."""
    if block.language == "python":
        return block.text
    lines = block.text.splitlines()
    return "\n".join("" if line.startswith("-") else line[1:] for line in lines)


def check_output(wanted: str, got: str, place: str) -> None:
    """Compare with what a page shows; ``...`` there stands for anything."""
    wanted, got = wanted.strip() + "\n", got.strip() + "\n"
    if not doctest.OutputChecker().check_output(wanted, got, doctest.ELLIPSIS):
        pytest.fail(f"{place}: the page shows\n{wanted}but it is\n{got}")


class Console:
    """Runs the commands of ``console`` blocks against an app that is being served."""

    def __init__(self, app: Sanic[Any, Any], client: httpx.AsyncClient) -> None:
        self.app = app
        self.client = client

    async def run(self, command: str, shown: str) -> str:
        """Run a command; returns its output."""
        if command.startswith("curl "):
            output = await self._curl(command)
        else:
            output = await self._websocket(command, shown)
        tasks = [task for task in self.app.tasks if not task.done()]
        if tasks:
            await asyncio.wait(tasks, timeout=TASKS_WITHIN)
        self.app.purge_tasks()
        return output

    async def _curl(self, command: str) -> str:
        options = CURL.parse_args(shlex.split(command)[1:])
        headers = dict(header.split(": ", 1) for header in options.headers)
        if options.body is not None:
            headers["Content-Type"] = "application/json"
        method = options.method or ("GET" if options.body is None else "POST")
        url = options.url.removeprefix("localhost:8000")
        response = await self.client.request(method, url, headers=headers, content=options.body)
        if not options.with_head:
            return response.text
        head = "".join(f"{name}: {value}\n" for name, value in response.headers.items())
        return f"HTTP/1.1 {response.status_code} {response.reason_phrase}\n{head}\n{response.text}"

    async def _websocket(self, command: str, shown: str) -> str:
        """Lines with ``>`` are sent, those with ``<`` are expected."""
        path = shlex.split(command)[3].removeprefix("ws://localhost:8000")
        transcript = []
        async with connect(f"ws://{self.client.base_url.netloc.decode()}{path}") as socket:
            for line in shown.splitlines():
                if line.startswith("> "):
                    await socket.send(line[2:])
                    transcript.append(line)
                else:
                    transcript.append(f"< {await asyncio.wait_for(socket.recv(), 5)!s}")
        return "\n".join(transcript)


def run_command(app: Sanic[Any, Any], command: str) -> str:
    """Run a command of the app itself, as ``sanic app:app exec`` does; returns its output."""
    words = shlex.split(command)
    arguments = words[words.index("exec") + 1 :]
    output = io.StringIO()
    with contextlib.redirect_stdout(output), pytest.MonkeyPatch.context() as patch:
        # A process of its own, in which no server was started, has no extensions.
        patch.setattr(app, "_ext", None, raising=False)
        try:
            Executor(app, {}).run(arguments[0], arguments)
        except SystemExit as failure:
            return f"{output.getvalue()}{failure.code}"
    return output.getvalue()


def check_console(app: Sanic[Any, Any] | None, blocks: list[Block]) -> None:
    """Run ``console`` blocks: requests to the served app, or commands of the app itself."""
    for kind, group in groupby(blocks, key=kind_of):
        if kind == "not run":
            continue
        assert app is not None, f"there is no app for the commands of {blocks[0].page.name}"
        # Sanic has to forget that the app was started before.
        routers: list[Any] = [app.router, app.signal_router]
        for router in routers:
            router.reset()
        if kind == "request":
            asyncio.run(check_requests(app, list(group)))
        else:
            check_commands(app, list(group))


async def check_requests(app: Sanic[Any, Any], blocks: list[Block]) -> None:
    """Serve the app and send it the requests of the blocks."""
    async with serving(app) as client:
        # Or app.add_task does not know that the loop is running.
        app.state.server_info = [ApplicationServerInfo(settings={}, stage=ServerStage.SERVING)]
        console = Console(app, client)
        for block in blocks:
            for command, shown in commands_of(block):
                check_output(shown, await console.run(command, shown), f"{block.place}: {command}")


def check_commands(app: Sanic[Any, Any], blocks: list[Block]) -> None:
    """Run the app's own commands."""
    for block in blocks:
        for command, shown in commands_of(block):
            check_output(shown, run_command(app, command), f"{block.place}: {command}")


def kind_of(block: Block) -> str:
    """What the commands of a block are: requests, commands of the app, or not to be run."""
    kinds = {kind_of_command(command) for command, _ in commands_of(block)}
    assert len(kinds) == 1, f"{block.place}: a block has commands of one kind"
    assert kinds <= {"request", "command", "not run"}, f"{block.place}: the test cannot run it"
    return kinds.pop()


def kind_of_command(command: str) -> str:
    """What a command is; what is none of ours is its own kind."""
    if command.startswith(("curl ", "python -m websockets ")):
        return "request"
    if re.match(r"sanic \w+:app exec ", command):
        return "command"
    program = re.sub(r"^(\w+=\S+ )*", "", command).split()[0]
    return "not run" if program in NOT_RUN else program


def commands_of(block: Block) -> Iterator[tuple[str, str]]:
    """The commands of a ``console`` block, each with the output that it shows."""
    text = block.text.replace("\\\n", "")
    for part in re.split(r"^\$ ", text, flags=re.M)[1:]:
        command, _, shown = part.partition("\n")
        yield command, shown


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Program:
    """A program in an empty folder, without settings in the environment."""
    for name in list(os.environ):
        if name.startswith("SANIC_") or name == "DATABASE_URL":
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    return Program(monkeypatch)


def page_ids(pages: list[Path]) -> list[Any]:
    return [pytest.param(page, id=page.name) for page in pages]


def test_the_samples_of_the_guide_to_testing_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are the tests of the app of the first page, one run for each file."""
    monkeypatch.setenv("PYTHONPATH", str(PROJECT))
    (tmp_path / "pytest.ini").write_text("[pytest]\nasyncio_mode = auto\n")
    app = "\n".join(source_of(block) for block in code_of(START))
    (tmp_path / "app.py").write_text(app)
    files = {str(block.file): block.text for block in code_of(PROJECT / "docs" / "testing.md")}
    for name, text in files.items():
        (tmp_path / f"{name}.py").write_text(text)
    for name in files.keys() - {"conftest"}:
        command = [sys.executable, "-m", "pytest", "-p", "pytest_sanic_db_bp", f"{name}.py"]
        ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        outcomes = pytest.RunResult.parse_summary_nouns(ended.stdout.splitlines())
        outcomes.pop("warnings", None)
        assert outcomes == {"passed": files[name].count("def test_")}, ended.stdout


def goes_on_from_start(page: Path) -> bool:
    """Whether a page begins with no file of its own."""
    code = code_of(page)
    return not code or code[0].file is None


@pytest.mark.parametrize("page", page_ids(PAGES))
def test_every_sample_of_a_page_runs_as_shown(page: Path, program: Program) -> None:
    """Every statement of a page is reached, and every output is the one that the page shows."""
    pages = [START, page] if goes_on_from_start(page) else [page]
    for each in pages:
        program.run_code(each)
    blocks = [block for each in pages for block in blocks_of(each)]
    check_console(program.app, [block for block in blocks if block.language == "console"])
    assert not program.not_reached


@pytest.mark.parametrize("page", page_ids(PAGES))
def test_every_block_of_a_page_is_of_a_kind_that_is_checked(page: Path) -> None:
    """Code hides neither behind another name of the language, nor in an unusual fence."""
    blocks = blocks_of(page)
    assert {block.language for block in blocks} <= LANGUAGES
    outside = page.read_text()
    for block in blocks:
        outside = outside.replace(block.text, "", 1)
    assert outside.count("```") == 2 * len(blocks)
    assert not re.search(r"~~~|code-block|literalinclude", page.read_text())
    assert not re.search(r"^(    |\t)(?!- )\S", outside, re.M)


def settings_table() -> str:
    """The table of the settings, as Markdown."""
    rows = ["| setting | default | what it is |", "| --- | --- | --- |"]
    for name, setting in DatabaseSettings.model_fields.items():
        default = "" if setting.default in (None, {}) else f"`{json.dumps(setting.default)}`"
        rows.append(f"| `{name.upper()}` | {default} | {setting.description} |".replace('"', ""))
    return "\n".join(rows)


def test_the_table_of_settings_is_current() -> None:
    """The page has the names, defaults and descriptions of the settings class."""
    page = (PROJECT / "docs" / "settings.md").read_text()
    shown = page.partition("<!-- settings -->\n")[2].partition("\n<!-- end of settings -->")[0]
    assert shown == settings_table(), settings_table()


@pytest.mark.parametrize("name", [*sanic_db_bp.__all__, *PUBLIC_MODELS])
def test_every_public_name_is_in_the_reference(name: str) -> None:
    """The reference shows the docstring of each name that may be imported."""
    page = (PROJECT / "docs" / "reference.md").read_text()
    directive = r"^\.\. (autoclass|autoexception|autofunction|py:data)::"
    assert re.search(rf"{directive} (sanic_db_bp\.models\.)?{name}(\(...\))?$", page, re.M)


def public_names_of_contrib() -> list[str]:
    """The names that the optional parts offer, and the fixtures."""
    names: list[str] = [*migrations.__all__, *testing.__all__, "HealthBlueprint"]
    for module in pkgutil.iter_modules(contrib.__path__, "sanic_db_bp.contrib."):
        if hasattr(importlib.import_module(module.name), "install"):
            names.append(f"{module.name}.install")
    plugin = (PROJECT / "pytest_sanic_db_bp.py").read_text()
    return [*names, *re.findall(r"^def (?!_)(\w+)", plugin, re.M)]


@pytest.mark.parametrize("name", public_names_of_contrib())
def test_every_optional_part_is_in_the_reference(name: str) -> None:
    """So are the commands' error, the parts that are installed, and the fixtures of the plugin."""
    page = (PROJECT / "docs" / "reference.md").read_text()
    assert re.search(rf"^\.\. auto\w+:: ([\w.]+\.)?{re.escape(name)}(\(\))?$", page, re.M)


@pytest.mark.parametrize("page", page_ids([*PAGES, PROJECT / "CHANGELOG.md"]))
def test_links_lead_somewhere(page: Path) -> None:
    """A link inside the project names a file that is there, and a heading of it."""
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        path, _, heading = target.partition("#")
        file = page.parent / path if path else page
        assert file.is_file(), target
        assert not heading or heading in headings_of(file), target


def headings_of(page: Path) -> set[str]:
    """The anchors of the headings of a page, as GitHub and MyST make them."""
    found = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in found}
