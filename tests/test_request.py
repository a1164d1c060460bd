"""What a request of an app with a database knows of itself."""

import asyncio
from typing import Any

from sanic import Sanic
from sanic.compat import Header
from sanic.http.http3 import HTTP3Transport
from sanic.server.protocols.http_protocol import Http3Protocol

from sanic_db_bp.handling.request import scoped_class


async def test_a_request_over_http3_has_a_task_of_its_own() -> None:
    """Its connection has none that serves it."""
    app: Sanic[Any, Any] = Sanic("app")
    connection: Http3Protocol = object.__new__(Http3Protocol)
    transport = HTTP3Transport(connection)
    request = scoped_class(app)(b"/", Header({}), "3", "GET", transport, app)
    assert request.task is asyncio.current_task()
