"""The fixtures of these tests."""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from tests.injection.helpers import App, new_app


@pytest.fixture
def url(tmp_path: Path) -> str:
    """The URL of an empty SQLite database."""
    return f"sqlite:///{tmp_path / 'test.db'}"


@pytest.fixture
def app(url: str) -> App:
    """An app with an empty SQLite database."""
    return new_app(url)


@pytest.fixture
def load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], Any]]:
    """Import a module from its source."""
    monkeypatch.syspath_prepend(tmp_path)

    def load(source: str) -> Any:
        (tmp_path / "module_of_a_test.py").write_text(source)
        return import_module("module_of_a_test")

    yield load
    sys.modules.pop("module_of_a_test", None)
