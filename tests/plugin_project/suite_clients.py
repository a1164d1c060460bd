"""A suite whose clients are of two kinds, each with an app of its own."""

from typing import Any

import pytest
from sanic import Sanic

from tests.plugin_project.shop import create_app, reusable_client


@pytest.fixture
def app(sanic_db: None) -> Sanic[Any, Any]:
    return create_app()


def test_reusable_client(app: Sanic[Any, Any]) -> None:
    with reusable_client(app) as client:
        assert client.post("/add/Tea")[1].status == 201


def test_test_client(app: Sanic[Any, Any]) -> None:
    assert app.test_client.post("/add/Tea")[1].status == 201
