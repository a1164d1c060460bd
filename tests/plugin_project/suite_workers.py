"""A suite for several processes: the database is not that of the settings, and each has its own."""

import os
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import text
from sqlalchemy.orm import Session

from tests.plugin_project.shop import Item, create_app

CURRENT = {
    "postgresql": "SELECT current_database()",
    "mysql": "SELECT database()",
    "sqlite": "SELECT file FROM pragma_database_list",
}


@pytest.fixture
def app(sanic_db: None) -> Sanic[Any, Any]:
    return create_app()


@pytest.mark.parametrize("time", range(4))
def test_own_database(app: Sanic[Any, Any], sanic_db_session: Session, time: int) -> None:
    current = sanic_db_session.scalar(text(CURRENT[sanic_db_session.get_bind().dialect.name]))
    worker = os.environ.get("PYTEST_XDIST_WORKER", "main")
    assert current.removesuffix(".db").endswith(f"pytest_{worker}")
    sanic_db_session.add(Item(id=1, name="Tea"))
    sanic_db_session.commit()
    assert app.test_client.get("/names")[1].json == ["Tea"]
