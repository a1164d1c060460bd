"""The fixtures keep their word: real servers, empty databases, restarts."""

import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from tests import servers
from tests.databases import on_every_driver
from tests.servers import PostgreSQLServer, Server, create_database, drop_database, server_url

ROOT = Path(__file__).parents[1]


@pytest.fixture
async def engine(database_url: str) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(database_url)
    yield engine
    await engine.dispose()


@on_every_driver
async def test_the_engine_connects(engine: AsyncEngine) -> None:
    """The URL works as it is, with the driver that it names."""
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT 1")) == 1


@pytest.mark.parametrize("turn", [1, 2])
async def test_each_test_has_an_empty_database(engine: AsyncEngine, turn: int) -> None:
    """What one test creates, the next one does not find."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE things (id INTEGER)"))


@on_every_driver
async def test_text_of_any_language_is_kept(engine: AsyncEngine) -> None:
    """The databases store Unicode, beyond the basic plane too."""
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE names (name VARCHAR(20))"))
        await connection.execute(text("INSERT INTO names VALUES ('Łódź 東京 🐘')"))
        assert await connection.scalar(text("SELECT name FROM names")) == "Łódź 東京 🐘"


@pytest.mark.parametrize(
    ("fixture", "driver"), [("postgresql_server", "asyncpg"), ("mariadb_server", "asyncmy")]
)
async def test_a_leaked_transaction_does_not_block_the_drop(
    request: pytest.FixtureRequest, fixture: str, driver: str
) -> None:
    """A database goes although a client still holds locks in it."""
    server: str = request.getfixturevalue(fixture)
    url = create_database(server, f"{server.split(':')[0].split('+')[0]}+{driver}")
    engine = create_async_engine(url)
    connection = await engine.connect()
    await connection.execute(text("CREATE TABLE things (id INTEGER)"))
    await connection.commit()
    await connection.execute(text("INSERT INTO things VALUES (1)"))
    started = time.monotonic()
    drop_database(url)
    assert time.monotonic() - started < 5
    with pytest.raises(DBAPIError):
        await connection.execute(text("SELECT 1"))
    await connection.invalidate()
    await connection.close()
    await engine.dispose()


async def test_a_killed_server_comes_back_with_its_data(own_server: Server) -> None:
    """Clients see a kill at once, and what was committed is there after the next start."""
    url = own_server.new_database()
    engine = create_async_engine(url)
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE things (id INTEGER)"))
        await connection.execute(text("INSERT INTO things VALUES (7)"))
    own_server.kill()
    with pytest.raises((DBAPIError, OSError)):
        async with engine.connect() as connection:
            await connection.scalar(text("SELECT id FROM things"))
    own_server.start()
    async with engine.connect() as connection:
        assert await connection.scalar(text("SELECT id FROM things")) == 7
    await engine.dispose()


def test_a_stopped_server_starts_again_at_its_url(own_server: Server) -> None:
    """Stopping sends clients away and ends the process; the URL stays."""
    url = own_server.url
    own_server.stop()
    with pytest.raises(DBAPIError):
        own_server.new_database()
    own_server.start()
    assert own_server.url == url
    own_server.new_database()


def test_a_taken_port_is_left_to_its_owner(
    monkeypatch: pytest.MonkeyPatch, own_server: Server
) -> None:
    """A server whose port was taken in between starts on another one."""
    taken = int(own_server.url.rsplit(":", 1)[1].rstrip("/"))
    free = servers.free_port()
    ports = iter([taken, free])
    monkeypatch.setattr(servers, "free_port", lambda: next(ports))
    with type(own_server)() as other:
        assert other.url == own_server.url.replace(str(taken), str(free))


def test_nothing_is_left_behind(own_server: Server) -> None:
    """At the end of the block the process, the port and the data are gone."""
    with type(own_server)() as other:
        port = int(other.url.rsplit(":", 1)[1].rstrip("/"))
        folder = other._folder
    assert not folder.exists()
    assert not is_open((servers.HOST, port))


STARTS_AND_DIES = """
import os, signal, sys
from tests import servers

server = getattr(servers, sys.argv[1])().__enter__()
print(server.url, server._folder, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_server_ends_with_the_process_that_started_it(own_server: Server) -> None:
    """Also if that is killed; its data go with it."""
    command = [sys.executable, "-c", STARTS_AND_DIES, type(own_server).__name__]
    died = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    assert died.returncode == -signal.SIGKILL
    url, folder = died.stdout.split()
    address = (servers.HOST, make_url(url).port or 0)
    deadline = time.monotonic() + servers.STOP_TIMEOUT
    while is_open(address) or Path(folder).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def is_open(address: tuple[str, int]) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(address) == 0


def test_a_server_named_in_the_environment_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """A URL in the environment comes before any binaries."""
    monkeypatch.setenv("TEST_POSTGRESQL_URL", "postgresql://me@elsewhere/")
    with server_url(PostgreSQLServer) as url:
        assert url == "postgresql://me@elsewhere/"
