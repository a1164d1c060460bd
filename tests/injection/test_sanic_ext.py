"""Injection works beside the other parts of sanic-ext, and without it."""

import pytest
from pydantic import BaseModel
from sanic import HTTPResponse, Request, Sanic, text
from sanic.views import HTTPMethodView
from sanic_ext import Extend, validate
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import Database, DatabaseBlueprint
from tests.injection.helpers import App, Base, Note, Repository, keep, notes_of
from tests.injection.test_forms import FORMS
from tests.serving import serving


class Body(BaseModel):
    """A note as a client sends it."""

    text: str


async def test_validated_bodies_come_beside_sessions(app: App) -> None:
    """``@validate`` gives the body, this package the session; a wrong body is a 400."""

    @app.post("/")
    @validate(json=Body)
    async def handler(request: Request, body: Body, session: Session) -> HTTPResponse:
        return keep(session, body.text)

    @app.post("/query")
    @validate(query=Body)
    async def query(request: Request, session: AsyncSession, query: Body) -> HTTPResponse:
        session.add(Note(text=query.text))
        return text(query.text)

    class Validated(HTTPMethodView, attach=app, uri="/view", methods=["POST"]):
        @validate(json=Body)
        async def post(self, request: Request, body: Body, session: Session) -> HTTPResponse:
            return keep(session, body.text)

    async with serving(app) as client:
        assert (await client.post("/", json={"text": "a"})).text == "a"
        assert (await client.post("/query?text=b")).text == "b"
        assert (await client.post("/view", json={"text": "c"})).text == "c"
        assert (await client.post("/", json={"wrong": 1})).status_code == 400
        assert await notes_of(app) == ["a", "b", "c"]


async def test_sessions_are_injected_without_sanic_ext(app: App) -> None:
    """With ``AUTO_EXTEND = False`` handlers are served, and sanic-ext stays away."""
    app.config.AUTO_EXTEND = False
    for add, _ in (FORMS["async def"],):
        add(app)

    @app.get("/")
    async def handler(request: Request, session: AsyncSession | None, db: Database) -> HTTPResponse:
        assert session is not None
        return text(str(await session.scalar(select(1))))

    class Viewed(HTTPMethodView, attach=app, uri="/view"):
        def get(self, request: Request, session: Session) -> HTTPResponse:
            return text(str(session.scalar(select(1))))

    async with serving(app) as client:
        assert (await client.get("/")).text == "1"
        assert (await client.get("/view")).text == "1"
        assert (await client.post("/notes/x")).text == "x"
        assert (await client.get("/docs")).status_code == 404
        assert await notes_of(app) == ["x"]


@pytest.mark.parametrize("injection", [True, False])
async def test_sanic_ext_without_its_injection(app: App, injection: bool) -> None:
    """Sessions come too when sanic-ext was set up with extensions of the app's choice."""
    Extend(app, built_in_extensions=injection)

    @app.get("/")
    async def handler(request: Request, session: Session) -> HTTPResponse:
        return text(str(session.scalar(select(1))))

    async with serving(app) as client:
        assert (await client.get("/")).text == "1"


@pytest.mark.parametrize("when", ["before", "after"])
async def test_sanic_ext_may_be_set_up_before_or_after(url: str, when: str) -> None:
    """``Extend(app)`` may come before ``app.blueprint(...)`` or after it."""
    app: App = Sanic("app")
    app.config.OAS = True
    bp = DatabaseBlueprint(url=url, metadata=Base.metadata, create_tables=True)
    if when == "before":
        Extend(app)
    app.blueprint(bp)
    if when == "after":
        Extend(app)
    app.ext.add_dependency(Repository)

    @app.get("/")
    async def handler(request: Request, session: Session, repository: Repository) -> HTTPResponse:
        return text(f"{session is repository.session} {repository.count()}")

    async with serving(app) as client:
        assert (await client.get("/")).text == "True 0"
        assert (await client.get("/docs/openapi.json")).status_code == 200
