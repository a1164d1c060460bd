"""The fixtures of these tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.handlers.streams import WAYS
from tests.shop import Observer, Shop, make_app, without_garbage_collector


@pytest.fixture(autouse=True)
def _no_garbage_collector() -> Iterator[None]:
    with without_garbage_collector():
        yield


@pytest.fixture
def app(database_url: str) -> Shop:
    """An app with the shop's tables."""
    return make_app(database_url)


@pytest.fixture
def observer(database_url: str) -> Observer:
    """Another client of the app's database."""
    return Observer(database_url)


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Any:
    """Each way to stream an answer."""
    return WAYS[request.param]
