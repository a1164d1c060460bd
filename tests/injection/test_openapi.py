"""The OpenAPI document shows no trace of what is injected."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
from sanic import Blueprint, HTTPResponse, Request, Sanic, empty
from sanic.views import HTTPMethodView
from sanic_ext import openapi
from sqlalchemy.orm import Session

from tests.injection.helpers import App, Handler, decorated, new_app
from tests.serving import serving


def documented_app(url: str | None) -> App:
    """Return an app with documented handlers, with sessions if there is a database."""
    app: App = new_app(url) if url else Sanic("app")
    wanted: Any = Session if url else int

    def documented(request: Request, item_id: int, session: wanted = None) -> HTTPResponse:
        """Read an item.

        The longer description.

        openapi:
        ---
        parameters:
          - name: item_id
            in: path
            description: The number of the item
        responses:
          '200':
            description: The item
        """
        return empty()

    documented.__annotations__["session"] = wanted

    @openapi.summary("By decorator")
    @openapi.description("What it does")
    @openapi.parameter("limit", int, "query")
    @openapi.body({"application/json": {"name": str}})
    @openapi.response(201, {"application/json": {"id": int}}, "Created")
    @openapi.tag("things")
    @openapi.secured("token")
    async def by_decorator(request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    by_decorator.__annotations__["session"] = wanted

    @openapi.exclude()
    async def excluded(request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    excluded.__annotations__["session"] = wanted

    @openapi.deprecated()
    @openapi.operation("definedName")
    @openapi.definition(summary="Defined", response={"text/plain": str})
    def defined(request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    defined.__annotations__["session"] = wanted

    async def got(self: Any, request: Request, session: Any = None) -> HTTPResponse:
        """Get by a view."""
        return empty()

    @openapi.summary("Posted by a view")
    async def posted(self: Any, request: Request, session: Any = None) -> HTTPResponse:
        return empty()

    for method in (got, posted):
        method.__annotations__["session"] = wanted
    view_class: Any = type("Viewed", (HTTPMethodView,), {"get": got, "post": posted})

    class Documented:
        @openapi.summary("A method's summary")
        async def handle(self, request: Request, session: Any = None) -> HTTPResponse:
            return empty()

    Documented.handle.__annotations__["session"] = wanted

    bp = Blueprint("library", url_prefix="/library", version=1)
    plain: list[Handler] = [documented, defined]
    bp.add_route(plain[0], "/items/<item_id:int>")
    app.blueprint(bp)
    app.add_route(Documented().handle, "/method")
    app.add_route(by_decorator, "/decorated", methods=["POST", "PUT"])
    app.add_route(excluded, "/excluded")
    app.add_route(plain[1], "/defined")
    app.add_route(view_class.as_view(), "/view")
    app.add_route(functools.partial(decorated(documented)), "/partial/<item_id:int>", name="p")
    return app


async def document_of(app: App) -> Any:
    """Return the OpenAPI document of an app."""
    app.config.OAS = True
    async with serving(app) as client:
        return (await client.get("/docs/openapi.json")).json()


@pytest.fixture
def fresh_openapi(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Forget sanic-ext's documents, of which there is one a process."""
    from sanic_ext.extensions.openapi.builders import OperationStore, SpecificationBuilder

    def forget() -> None:
        monkeypatch.setattr(SpecificationBuilder, "_singleton", None)
        monkeypatch.setattr(OperationStore, "_singleton", None)

    forget()
    return forget


async def test_the_openapi_document_shows_no_trace_of_sessions(
    url: str, fresh_openapi: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The document is the one that the same app has without a database."""
    expected = await document_of(documented_app(None))
    fresh_openapi()
    monkeypatch.setattr(Sanic, "_app_registry", {})
    document = await document_of(documented_app(url))
    assert "session" not in str(document).lower()
    assert document["paths"]["/decorated"]["post"]["summary"] == "By decorator"
    assert document["paths"]["/v1/library/items/{item_id}"]["get"]["summary"] == "Read an item."
    assert document["paths"]["/method"]["get"]["summary"] == "A method's summary"
    assert document["paths"] == expected["paths"]
    assert document == expected
