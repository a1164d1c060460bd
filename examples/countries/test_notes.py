"""Tests with the pytest plugin: `python -m pytest examples/countries`.

They may commit as they like, and leave nothing behind.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import select
from sqlalchemy.orm import Session

from .app import create_app
from .models import Note


@pytest.fixture
def app(sanic_db: None, assert_no_leaked_connections: None) -> Sanic[Any, Any]:
    return create_app()


def test_note_is_kept(app: Sanic[Any, Any], sanic_db_session: Session) -> None:
    _, response = app.test_client.post("/countries/it/notes", json={"text": "Pasta!"})
    assert response.status == 201
    assert sanic_db_session.scalars(select(Note.text)).all() == ["Pasta!"]


def test_page_of_notes_takes_few_queries(
    app: Sanic[Any, Any], assert_max_queries: Callable[[int], AbstractContextManager[object]]
) -> None:
    for code, text in [("it", "Pasta!"), ("at", "Strudel!"), ("hu", "Goulash!")]:
        app.test_client.post(f"/countries/{code}/notes", json={"text": text})
    # Two for the page; the app's start and its background task have one each.
    with assert_max_queries(4):
        _, response = app.test_client.get("/notes/pages/1")
    countries = [note["country"]["name"] for note in response.json["items"]]
    assert countries == ["Hungary", "Austria", "Italy"]
