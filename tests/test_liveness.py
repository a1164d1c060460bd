"""The sockets of connections: what is cut, and whom the kernel is to ask."""

import asyncio
import gc
import socket
import time
import weakref
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import make_url, text

from sanic_db_bp import Database, DatabaseSettings
from sanic_db_bp.connections.liveness import KEEPALIVE_IDLE, cut, socket_of
from tests.databases import on, on_every_driver_of_servers
from tests.shop import Observer, connection_id
from tests.slow_sql import sleep_for

TCP_CLOSE = 7
"""The state of a socket, in Linux's ``TCP_INFO``, after which it has no other side."""


@pytest.fixture
async def database(database_url: str) -> AsyncIterator[Database]:
    """A database that is reached over a network."""
    database = Database(DatabaseSettings(url=database_url, env_file=None))
    yield database
    await database.dispose()


async def close(driver_connection: Any) -> None:
    """Close a driver's connection behind the pool's back."""
    ended = driver_connection.close()
    if ended is not None:
        await ended


@on_every_driver_of_servers
async def test_a_connection_that_is_closed_has_no_socket_to_cut(database: Database) -> None:
    """Its number may be that of another one by now."""
    async with database.engine.connect() as connection:
        driver_connection: Any = (await connection.get_raw_connection()).driver_connection
        await close(driver_connection)
        assert socket_of(driver_connection) is None
        cut(driver_connection)
        await connection.invalidate()


@on_every_driver_of_servers
async def test_a_connection_may_be_cut_that_the_server_has_closed(
    database: Database, database_url: str
) -> None:
    """Before the event loop knows of it: nothing is left to be shut down."""
    observer = Observer(database_url)
    async with database.session() as session:
        number = await connection_id(session)
        raw = await (await session.connection()).get_raw_connection()
        own = socket_of(raw.driver_connection)
        assert own is not None
        with own:
            observer.kill(number)
            deadline = time.monotonic() + 5
            while own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] != TCP_CLOSE:
                assert time.monotonic() < deadline
                cut(raw.driver_connection)
            cut(raw.driver_connection)
        await session.invalidate()


@on_every_driver_of_servers
async def test_nothing_looks_after_a_disposed_engine(database: Database) -> None:
    """What would look at its statements is gone, and so is the engine."""
    await database.ping()
    engine = weakref.ref(database.engine.sync_engine)
    await database.dispose()
    await asyncio.sleep(0)
    gc.collect()
    assert engine() is None


@on_every_driver_of_servers
async def test_a_system_need_not_know_every_option(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it does not know is left out, and the others are set."""
    monkeypatch.delattr(socket, "TCP_USER_TIMEOUT")
    async with database.engine.connect() as connection:
        raw = await connection.get_raw_connection()
        own = socket_of(raw.driver_connection)
        assert own is not None
        with own:
            idle = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
    assert idle == KEEPALIVE_IDLE


@pytest.fixture
def url_of_file(database_url: str) -> str:
    """The URL of a server that is reached by a socket on this machine."""
    file: str = Observer(database_url).scalar("SELECT @@socket")
    if not Path(file).is_socket():
        pytest.skip("the server is on another machine")
    url = make_url(database_url).update_query_dict({"unix_socket": file})
    return url.render_as_string(hide_password=False)


@on("mariadb", every_driver=True)
async def test_the_kernel_of_a_server_on_the_same_machine_is_not_asked(url_of_file: str) -> None:
    """A socket that is a file has no network that could freeze."""
    database = Database(DatabaseSettings(url=url_of_file, env_file=None))
    async with database.engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1
        raw = await connection.get_raw_connection()
        own = socket_of(raw.driver_connection)
        assert own is not None
        with own:
            assert own.family == socket.AF_UNIX
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 0
    await database.dispose()


@on_every_driver_of_servers
async def test_a_server_that_answers_is_not_asked_at_every_look(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow statement costs a new connection each ``POOL_TIMEOUT``, and no more."""
    monkeypatch.setattr("sanic_db_bp.connections.liveness.LOOK_EVERY", 0.05)
    settings = DatabaseSettings(url=database_url, pool_timeout=0.5, env_file=None)
    database = Database(settings)
    questions: list[object] = []
    async with database.session() as session:
        await session.execute(text("SELECT 1"))
        dialect: Any = database.engine.dialect
        connect = dialect.connect

        def ask(*args: Any, **arguments: Any) -> Any:
            questions.append(args)
            return connect(*args, **arguments)

        monkeypatch.setattr(dialect, "connect", ask)
        await session.execute(sleep_for(database, 0.9))
    await database.dispose()
    assert 1 <= len(questions) <= 2
