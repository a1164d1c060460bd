"""One server for the whole run, on the configured database, with tables that the suite makes."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
from sanic import Sanic
from sanic_testing.reusable import ReusableClient  # type: ignore[import-untyped]
from sqlalchemy import URL, Connection

from tests.plugin_project.shop import Base, create_app, reusable_client


@pytest.fixture(scope="session")
def sanic_db_provision() -> Callable[[URL], AbstractContextManager[URL]]:
    return nullcontext


@pytest.fixture(scope="session")
def sanic_db_schema() -> Callable[[Connection], None]:
    return Base.metadata.create_all


@pytest.fixture(scope="session")
def app() -> Sanic[Any, Any]:
    return create_app(create_tables=False)


@pytest.fixture(scope="session")
def server(sanic_db_for_session: None, app: Sanic[Any, Any]) -> Iterator[ReusableClient]:
    with reusable_client(app) as client:
        assert client.post("/add/Always-there")[1].status == 201
        yield client


@pytest.fixture
def client(sanic_db: None, server: ReusableClient) -> ReusableClient:
    return server


@pytest.mark.parametrize("time", [1, 2])
def test_each_test_begins_anew(client: ReusableClient, time: int) -> None:
    assert client.post("/add/Tea")[1].status == 201
    assert client.get("/names")[1].json == ["Always-there", "Tea"]
