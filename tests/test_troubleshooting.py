"""The page about errors: it has an entry for each message, and each message leads to its entry."""

from __future__ import annotations

import ast
import importlib
import pickle
import pkgutil
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import sanic_db_bp
from sanic_db_bp import ConfigurationError, DatabaseUnavailable, NoCurrentSession, SanicDBError
from sanic_db_bp.exceptions import DOCUMENTATION, link_to

PROJECT = Path(__file__).parents[1]
MODULES = sorted((PROJECT / "sanic_db_bp").rglob("*.py"))
PAGE = (PROJECT / "docs" / "troubleshooting.md").read_text()

NEED_AN_ENTRY = {
    "ConfigurationError",
    "MigrationFailed",
    "NoCurrentSession",
    "SessionError",
    "TestTransactionError",
}
"""The classes whose messages have nothing but the class in common."""

TOLD = {"warning", "error", "exception"}
"""The methods of a logger that tell of what somebody should see to."""


def text_of(node: ast.expr) -> str:
    """A message as it stands in the source, with an ellipsis for each value put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.Constant):
        return re.sub(r"%[.\d]*[dfgrs]", "…", str(node.value))
    return "…"


def messages_in(tree: ast.AST) -> list[str]:
    """Every string of a piece of source."""
    return [
        text_of(node) for node in ast.walk(tree) if isinstance(node, ast.Constant | ast.JoinedStr)
    ]


TREES = {module: ast.parse(module.read_text()) for module in MODULES}
MESSAGES = [message for tree in TREES.values() for message in messages_in(tree)]


def headings() -> list[str]:
    """The headings of the entries, which quote the messages."""
    return re.findall(r"^### `?(.+?)`?$", PAGE, re.M)


def headings_by_anchor() -> dict[str, list[str]]:
    """The entries that stand below each anchor, up to the next one or to the end of the section."""
    parts = re.split(r'^<a id="(.+)"></a>$', PAGE, flags=re.M)[1:]
    sections = zip(parts[::2], parts[1::2], strict=True)
    return {
        anchor: re.findall(r"^### `?(.+?)`?$", re.split(r"^## ", text, flags=re.M)[0], re.M)
        for anchor, text in sections
    }


def anchors() -> set[str]:
    """What a link to the page may end with."""
    titles = re.findall(r"^##? (.+)$", PAGE, re.M)
    return {*headings_by_anchor(), *(title.lower().replace(" ", "-") for title in titles)}


def errors() -> list[type[SanicDBError]]:
    """The base class and all that is derived from it, in the optional parts too."""
    for module in pkgutil.walk_packages(sanic_db_bp.__path__, "sanic_db_bp."):
        if "templates" not in module.name:
            importlib.import_module(module.name)
    found = [SanicDBError]
    for error in found:
        found += [each for each in error.__subclasses__() if each not in found]
    return [error for error in found if error.__module__.startswith("sanic_db_bp.")]


@dataclass(frozen=True)
class Call:
    """A call in the source, of an error or of a logger."""

    module: Path
    node: ast.Call

    @property
    def place(self) -> str:
        return f"{self.module.name}:{self.node.lineno}"

    @property
    def entry(self) -> str | None:
        values = [word.value for word in self.node.keywords if word.arg == "entry"]
        return text_of(values[0]) if values else None


def calls() -> Iterator[Call]:
    for module, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                yield Call(module, node)


def calls_of(names: set[str]) -> list[Any]:
    """The calls of what has such a name, each a parameter of a test."""
    found = [call for call in calls() if getattr(call.node.func, "id", None) in names]
    return [pytest.param(call, id=call.place) for call in found]


def log_calls() -> list[Any]:
    """The warnings and errors that are logged."""
    found = [
        call
        for call in calls()
        if isinstance(call.node.func, ast.Attribute)
        and call.node.func.attr in TOLD
        and getattr(call.node.func.value, "id", None) == "logger"
    ]
    return [pytest.param(call, id=call.place) for call in found]


@pytest.mark.parametrize("heading", headings())
def test_the_page_quotes_real_messages(heading: str) -> None:
    """Each heading is part of a message in the source; an ellipsis stands for what varies."""
    assert any(heading in message for message in MESSAGES), heading


@pytest.mark.parametrize("error", errors(), ids=lambda error: error.__name__)
def test_each_class_of_errors_has_an_entry(error: type[SanicDBError]) -> None:
    """The anchor is on the page, and no class makes its text without the link."""
    assert error.entry in anchors()
    assert error.__str__ is SanicDBError.__str__


@pytest.mark.parametrize("call", calls_of(NEED_AN_ENTRY))
def test_each_message_has_an_entry_of_its_own(call: Call) -> None:
    """Where a class has many messages, each names its entry, and the entry quotes it."""
    assert call.entry in headings_by_anchor(), f"{call.place} needs entry='...'"
    quoted = headings_by_anchor()[call.entry]
    messages = messages_in(TREES[call.module])
    assert any(heading in message for heading in quoted for message in messages)


@pytest.mark.parametrize("call", calls_of({"link_to"}))
def test_links_in_errors_of_others_lead_to_an_entry(call: Call) -> None:
    """SQLAlchemy's errors, and Python's, are linked by hand."""
    entry = text_of(call.node.args[0])
    assert entry == "…" or entry in headings_by_anchor(), call.place


@pytest.mark.parametrize("call", log_calls())
def test_each_warning_in_the_log_has_an_entry(call: Call) -> None:
    """A message that is a variable is that of an error, which has its own."""
    message = text_of(call.node.args[0])
    assert message == "…" or any(heading in message for heading in headings()), message


def test_the_text_of_an_error_ends_with_its_link() -> None:
    """The message is what it was, and the link has a line of its own."""
    error = ConfigurationError("It is wrong.", entry="no-database")
    assert error.message == "It is wrong."
    assert str(error) == f"It is wrong.\n(See {DOCUMENTATION}troubleshooting.md#no-database)"
    unavailable = DatabaseUnavailable("db", "the connection was lost")
    assert str(unavailable) == f"{unavailable.message}\n{link_to('database-unavailable')}"
    assert unavailable.message.endswith("is unavailable: the connection was lost")


def test_an_error_that_was_pickled_keeps_its_link() -> None:
    """Errors of workers and test processes are sent on so."""
    error = NoCurrentSession("None.", entry="websocket-without-session")
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
