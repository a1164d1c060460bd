"""What nobody can inject is told at the start."""

from collections.abc import Callable
from typing import Any

import pytest
from sanic import HTTPResponse, Request, Websocket
from sanic.views import HTTPMethodView
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from websockets.asyncio.client import connect

from sanic_db_bp import (
    AsyncReadSession,
    ConfigurationError,
    ReadSession,
    SessionFinished,
    transactional,
)
from tests.injection.helpers import App, Handler
from tests.serving import serving


async def error_at_start(app: App) -> str:
    """Return the text of the error with which the app does not start."""
    with pytest.raises(ConfigurationError) as caught:
        async with serving(app):
            pass
    return str(caught.value)


class ReportsSession(Session):
    """The session of a database that is not registered."""


class ReportsAsyncSession(AsyncSession):
    """The same, with asyncio."""


@pytest.mark.parametrize("form", ["async", "optional", "view", "default"])
async def test_a_session_of_an_unregistered_database_is_refused_at_start(
    app: App, form: str
) -> None:
    """The error names the handler, the parameter, the class, what there is, and the remedy."""

    async def reports(request: Request, reports_session: ReportsSession) -> HTTPResponse:
        raise AssertionError("not reached")

    async def optional(
        request: Request, reports_session: ReportsAsyncSession | None
    ) -> HTTPResponse:
        raise AssertionError("not reached")

    async def default(
        request: Request, reports_session: ReportsSession | None = None
    ) -> HTTPResponse:
        raise AssertionError("not reached")

    class Reports(HTTPMethodView):
        async def get(self, request: Request, reports_session: ReportsSession) -> HTTPResponse:
            raise AssertionError("not reached")

    handlers: dict[str, Handler] = {
        "async": reports,
        "optional": optional,
        "default": default,
        "view": Reports.as_view(),
    }
    app.add_route(handlers[form], "/reports", name="reports")
    message = await error_at_start(app)
    assert "app.reports" in message
    wanted = "ReportsAsyncSession" if form == "optional" else "ReportsSession"
    assert f"'reports_session: {wanted}'" in message
    assert "AsyncReadSession, AsyncSession, ReadSession, Session" in message
    assert "DatabaseBlueprint('<name>'" in message


class Report:
    """A dependency that keeps a session which nobody has."""

    def __init__(self, reports_session: ReportsSession | None) -> None:
        raise AssertionError("not reached")


async def make_report(request: Request, reports_session: ReportsSession) -> Report:
    raise AssertionError("not reached")


@pytest.mark.parametrize("constructor", [None, make_report], ids=["class", "function"])
async def test_a_dependency_is_refused_at_start_too(
    app: App, constructor: Callable[..., Any] | None
) -> None:
    """The error says the same of it as of a handler."""

    async def report(request: Request, report: Report) -> HTTPResponse:
        raise AssertionError("not reached")

    app.ext.add_dependency(Report, constructor)
    app.add_route(report, "/report")
    message = await error_at_start(app)
    name = "make_report" if constructor else "Report"
    assert f"The dependency '{name}' asks for 'reports_session: ReportsSession'" in message
    assert "AsyncReadSession, AsyncSession, ReadSession, Session" in message


@pytest.mark.parametrize("asks", [True, False])
async def test_an_isolation_level_of_another_database_is_refused_at_start(
    app: App, asks: bool
) -> None:
    """The error names the handler, the level, and those that the database has."""

    async def with_session(request: Request, session: Session) -> HTTPResponse:
        raise AssertionError("not reached")

    async def without(request: Request) -> HTTPResponse:
        raise AssertionError("not reached")

    handler = transactional(isolation="SNAPSHOT")(with_session if asks else without)
    app.add_route(handler, "/", name="report")
    message = await error_at_start(app)
    assert "app.report" in message
    assert "'SNAPSHOT'" in message
    assert "SERIALIZABLE" in message


async def test_an_ambiguous_union_is_refused_at_start(app: App) -> None:
    """Nobody can tell which of two sessions is meant."""

    @app.get("/either")
    async def either(request: Request, session: Session | AsyncSession) -> HTTPResponse:
        raise AssertionError("not reached")

    message = await error_at_start(app)
    assert "app.either" in message
    assert "'session: sqlalchemy.orm.session.Session | " in message


async def test_an_unregistered_session_in_a_dependency_stops_the_start(app: App) -> None:
    """A constructor that asks for a session that nobody has is told at start too."""

    class Reporter:
        def __init__(self, session: ReportsSession) -> None:
            raise AssertionError("not reached")

    app.ext.add_dependency(Reporter)

    @app.get("/")
    async def handler(request: Request, reporter: Reporter) -> HTTPResponse:
        raise AssertionError("not reached")

    with pytest.raises(Exception, match="ReportsSession"):
        async with serving(app):
            pass


@pytest.mark.parametrize(
    "wanted", [Session, AsyncSession, ReadSession, AsyncReadSession, Session | None]
)
async def test_a_session_in_a_websocket_handler_is_refused_at_start(app: App, wanted: Any) -> None:
    """The error tells to open a session for each message."""

    async def chat(request: Request, ws: Websocket, session: Any) -> None:
        raise AssertionError("not reached")

    chat.__annotations__["session"] = wanted
    app.add_websocket_route(chat, "/chat")
    message = await error_at_start(app)
    assert "websocket handler 'app.chat'" in message
    assert "db.session()" in message


class Notes:
    def __init__(self, session: AsyncSession) -> None:
        self.session = session


class Board:
    def __init__(self, notes: Notes, board: "Board | None" = None) -> None:
        self.notes = notes


async def make_board(notes: Notes) -> Board:
    return Board(notes)


@pytest.mark.parametrize("wanted", [Notes, Board])
async def test_what_keeps_a_session_is_refused_in_a_websocket_handler(
    app: App, wanted: type
) -> None:
    """A class that takes one, or another that does; the error names both, at each start."""
    app.ext.add_dependency(Notes)
    app.ext.add_dependency(Board)

    async def chat(request: Request, ws: Websocket, notes: Any) -> None:
        raise AssertionError("not reached")

    chat.__annotations__["notes"] = wanted
    app.add_websocket_route(chat, "/chat")
    for _ in range(2):
        message = await error_at_start(app)
        assert f"'app.chat' asks for 'notes: {wanted.__name__}', and with it for" in message
        assert "for 'AsyncSession', which would hold" in message
        assert "db.session()" in message


async def test_what_a_function_makes_with_a_session_is_let_into_a_websocket_handler(
    app: App,
) -> None:
    """It may have let the session go; if not, the session says on use that it is finished."""
    app.ext.add_dependency(Notes)
    app.ext.add_dependency(Board, make_board)

    async def chat(request: Request, ws: Websocket, board: Board) -> None:
        with pytest.raises(SessionFinished, match="a websocket message"):
            await board.notes.session.execute(text("SELECT 1"))
        await ws.send("refused")

    app.add_websocket_route(chat, "/chat")
    async with serving(app) as client:
        url = str(client.base_url).replace("http", "ws").rstrip("/")
        async with connect(f"{url}/chat", proxy=None) as socket:
            assert await socket.recv() == "refused"


UNRESOLVED_MODULE = """
from __future__ import annotations

from typing import TYPE_CHECKING

from sanic import Request, text
from sanic.views import HTTPMethodView

if TYPE_CHECKING:
    from sqlalchemy.orm import Session
    from sanic_db_bp import Database

async def function(request: Request, session: Session):
    return text("not reached")

async def socket(request: Request, ws, db: Database):
    pass

class View(HTTPMethodView):
    async def get(self, request: Request, session: Session):
        return text("not reached")
"""


@pytest.mark.parametrize("form", ["function", "socket", "view"])
async def test_imports_for_type_checking_alone_are_explained_at_start(
    app: App, load: Callable[[str], Any], form: str
) -> None:
    """A name that is not there when the app runs is told with the handler and the remedy."""
    module = load(UNRESOLVED_MODULE)
    if form == "function":
        app.add_route(module.function, "/")
    elif form == "socket":
        app.add_websocket_route(module.socket, "/")
    else:
        app.add_route(module.View.as_view(), "/", name="view")
    message = await error_at_start(app)
    assert f"app.{form}" in message
    assert "TYPE_CHECKING" in message
    assert ("Database" if form == "socket" else "Session") in message


UNRELATED_MODULE = """
from __future__ import annotations

from typing import TYPE_CHECKING

from sanic import text

if TYPE_CHECKING:
    from somewhere import Repository

async def handler(request, repository: Repository):
    return text("not reached")
"""


async def test_other_unresolved_names_stay_errors_of_sanic_ext(
    app: App, load: Callable[[str], Any]
) -> None:
    """A dependency that cannot be resolved stops the start as it does without this package."""
    app.add_route(load(UNRELATED_MODULE).handler, "/")
    with pytest.raises(NameError, match="Repository"):
        async with serving(app):
            pass
