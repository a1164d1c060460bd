"""A real Sanic server on a loopback socket, in the event loop of the test."""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
from sanic import Sanic
from sanic.application.constants import ServerStage
from sanic.application.state import ApplicationServerInfo


def make_light(app: Sanic[Any, Any]) -> None:
    """Leave out what takes most of the time of a start, unless the app asks for it."""
    if app.router.routes:
        # The routes of the OpenAPI pages; Sanic cannot do without any route.
        app.config.setdefault("OAS", False)
    # Sanic compiles all routes and signals anew for each route that it adds by itself.
    for name in ("HTTP_AUTO_HEAD", "HTTP_AUTO_OPTIONS", "CORS_AUTOMATIC_OPTIONS"):
        app.config.setdefault(name, False)
    # Sanic rewrites its own code at a start, which works once in a process.
    app.config.TOUCHUP = False


@asynccontextmanager
async def serving(app: Sanic[Any, Any], *, grace: float = 1.0) -> AsyncIterator[httpx.AsyncClient]:
    """Serve an app with all its listeners; gives a client of it."""
    make_light(app)
    app.config.GRACEFUL_SHUTDOWN_TIMEOUT = grace
    app.config.ACCESS_LOG = False
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server: Any = await app.create_server(sock=listening, return_asyncio_server=True)
        # Without it, tasks that a handler adds to the app are put off for ever.
        running = ApplicationServerInfo(settings={}, stage=ServerStage.SERVING)
        try:
            await server.startup()
            await server.before_start()
        except BaseException:
            # Before its socket, or the loop would take the next one of this number for it.
            await server.close()
            raise
        try:
            await server.start_serving()
            await server.after_start()
            app.state.server_info.append(running)
            host, port = listening.getsockname()
            base_url = f"http://{host}:{port}"
            async with httpx.AsyncClient(base_url=base_url, timeout=20, verify=False) as client:
                yield client
        finally:
            await server.before_stop()
            server.close()
            await server.wait_closed()
            for connection in list(server.connections):
                connection.close_if_idle()
            app.shutdown_tasks(grace)
            for connection in list(server.connections):
                connection.abort()
            await server.after_stop()
            app.state.server_info.clear()
