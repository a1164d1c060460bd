"""The process of a contender: `python -m benchmarks.serve '{"name": "usual", ...}'`."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from functools import partial
from typing import Any

from sanic import Sanic
from sanic.worker.loader import AppLoader

from .contenders import ASGIApp, Options, create_app
from .load import HOST


@dataclass(frozen=True)
class Arguments:
    """What a process serves, and where."""

    name: str
    port: int
    workers: int
    url: str
    pool_size: int
    more_routes: int


def main(arguments: Arguments) -> None:
    """Serve a contender until SIGTERM, without an access log."""
    app = create_app(arguments.name, options_of(arguments))
    if isinstance(app, Sanic):
        serve_sanic(app, arguments)
    else:
        serve_asgi(app, arguments.port)


def options_of(arguments: Arguments) -> Options:
    return Options(arguments.url, arguments.pool_size, arguments.more_routes)


def worker_app(arguments: Arguments) -> Sanic[Any, Any]:
    """Make the app once more, in the process of a worker."""
    app = create_app(arguments.name, options_of(arguments))
    assert isinstance(app, Sanic)
    return app


def serve_sanic(app: Sanic[Any, Any], arguments: Arguments) -> None:
    """Serve with Sanic's own server, with one worker in this very process."""
    where: dict[str, Any] = {"host": HOST, "port": arguments.port}
    quiet: dict[str, Any] = {"access_log": False, "motd": False}
    if arguments.workers == 1:
        app.run(**where, **quiet, single_process=True)
        return
    loader = AppLoader(factory=partial(worker_app, arguments))
    app.prepare(**where, **quiet, workers=arguments.workers)
    Sanic.serve(primary=app, app_loader=loader)


def serve_asgi(app: ASGIApp, port: int) -> None:
    """Serve with uvicorn, which takes uvloop and httptools where they are installed."""
    import uvicorn

    uvicorn.run(app, host=HOST, port=port, access_log=False, log_level="warning")


if __name__ == "__main__":
    main(Arguments(**json.loads(sys.argv[1])))
