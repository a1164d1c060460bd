"""The Sanic app that the Sanic contenders start from."""

from collections.abc import Callable
from typing import Any

from sanic import HTTPResponse, Request, Sanic, json

from . import Options


async def plain(request: Request, **_: object) -> HTTPResponse:
    return json({"message": "Hello"})


def sanic_app(options: Options, more: Callable[..., Any] = plain) -> Sanic[Any, Any]:
    """Make an app with the plain route, and with routes to `more` that nobody asks for."""
    app = Sanic("benchmark")
    if options.more_routes:
        # For each HEAD and OPTIONS route that sanic-ext adds by itself, the router is built anew:
        # a thousand routes take minutes.
        automatic = ("HTTP_AUTO_HEAD", "HTTP_AUTO_OPTIONS", "CORS_AUTOMATIC_OPTIONS")
        app.config.update(dict.fromkeys(automatic, False))
    app.add_route(plain, "/plain")
    for number in range(options.more_routes):
        app.add_route(more, f"/more/{number}/<item_id:int>", name=f"more_{number}")
    return app
