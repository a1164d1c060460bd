"""Sanic with sanic-ext's injection of an object that costs nothing."""

from typing import Any

from sanic import HTTPResponse, Request, Sanic, json

from . import Options
from .sanic_app import sanic_app


class Trivial:
    pass


def create_app(options: Options) -> Sanic[Any, Any]:
    app = sanic_app(options)
    app.ext.add_dependency(Trivial)
    app.add_route(unused, "/unused")
    return app


async def unused(request: Request, trivial: Trivial) -> HTTPResponse:
    return json({"message": "Hello"})
