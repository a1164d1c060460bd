"""Servers in processes of their own: how they start, and how they refuse to."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import make_url

from tests.databases import on_servers
from tests.manager import MAY_STOP
from tests.processes import Process, free_port
from tests.servers import Server, create_database

SECRET = "s3cr3t-pass"
APP = """
import os

from sanic import Sanic, json
from sqlalchemy import String, func, select
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp import DatabaseBlueprint


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(20))


class OtherSession(Session):
    pass


app = Sanic("shop")
app.config.MOTD = False
app.blueprint(DatabaseBlueprint(metadata=Base.metadata))


@app.get("/")
async def index(request, session: Session):
    return json(session.scalar(select(func.count()).select_from(Note)))


@app.get("/alive")
async def alive(request, session: Session):
    return json(session.scalar(select(1)))


@app.before_server_start
async def seed(app):
    async with app.ctx.db.session() as session:
        if os.environ.get("SEED"):
            session.add(Note(text="seeded"))
    if os.environ.get("FAIL"):
        raise RuntimeError("the app's own listener failed")


if os.environ.get("ASK_FOR_OTHER"):

    @app.get("/other")
    async def other(request, session: OtherSession):
        return json(None)
"""


SINGLE = ["sanic", "shop:app", "--single-process"]
WORKERS = ["sanic", "shop:app", "--workers", "2"]
FAST = ["sanic", "shop:app", "--fast"]
ASGI = ["uvicorn", "shop:app"]

MODES = pytest.mark.parametrize(
    "command", [SINGLE, WORKERS, ASGI], ids=["single", "workers", "asgi"]
)
"""Every kind of server that the package has to start and fail in."""


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., Process]:
    """Make a server of the app in a folder of its own."""
    (tmp_path / "shop.py").write_text(APP)

    def make(command: list[str], *, cold: bool = False, **environment: str) -> Process:
        return Process(tmp_path, command, environment, cold=cold)

    return make


# --- It starts


@pytest.mark.parametrize(
    ("command", "workers"),
    [(SINGLE, 1), (WORKERS, 2), (FAST, 0), (ASGI, 1)],
    ids=["single", "workers", "fast", "asgi"],
)
def test_the_server_starts_creates_its_tables_once_and_stops(
    start: Callable[..., Process], tmp_path: Path, command: list[str], workers: int
) -> None:
    """Each worker has the database, at most one creates the tables; the end is clean."""
    with start(command, cold=True, SANIC_DB_CREATE_TABLES="true", SEED="yes") as server:
        server.wait_until_served()
        if workers > 1:
            server.wait_for("Worker ready", times=workers)
        count = server.client.get("/").json()
        assert count == workers if workers else count >= 1
        assert "database db: sqlite+aiosqlite:///shop.db" in server.output
        server.client.close()
        assert server.stop() in ({0, -signal.SIGTERM} if command is ASGI else {0})
        assert "Traceback" not in server.output
        assert "ERROR" not in server.output
        server.wait_until_nobody_is_left()
    assert (tmp_path / "shop.db").exists()


@on_servers
def test_workers_do_not_race_for_the_tables(
    start: Callable[..., Process], database_url: str
) -> None:
    """On a server database too, one worker of two creates the tables, and neither fails."""
    environment = {"SANIC_DB_URL": database_url, "SANIC_DB_CREATE_TABLES": "true"}
    with start(WORKERS, **environment) as server:
        server.wait_for("Worker ready", times=2)
        assert server.client.get("/").json() == 0
        server.client.close()
        assert server.stop() == 0
        assert "Traceback" not in server.output


# --- Wrong settings


@MODES
def test_wrong_settings_stop_the_start_and_are_all_told(
    start: Callable[..., Process], command: list[str]
) -> None:
    """Every wrong variable is named, no value is shown, and the exit code is not zero."""
    environment = {
        "SANIC_DB_URL": f"nonsense://me:{SECRET}@host/shop",
        "SANIC_DB_PASSWORD": SECRET,
        "SANIC_DB_POOL_SIZE": "none",
        "SANIC_DB_COMMIT": "sometimes",
    }
    with start(command, **environment) as server:
        assert server.wait_for_end() != 0
        for variable in ("SANIC_DB_URL", "SANIC_DB_POOL_SIZE", "SANIC_DB_COMMIT"):
            assert f"- {variable}:" in server.words
        assert "3 wrong database settings" in server.words
        assert SECRET not in server.output
        server.wait_until_nobody_is_left()


def test_an_unknown_session_stops_the_start(start: Callable[..., Process]) -> None:
    """The process ends although the database was open already."""
    with start(SINGLE, ASK_FOR_OTHER="yes") as server:
        assert server.wait_for_end() != 0
        assert "asks for 'session: OtherSession'" in server.words


@MODES
def test_a_failing_listener_of_the_app_stops_the_start(
    start: Callable[..., Process], command: list[str]
) -> None:
    """An open connection does not keep the process alive."""
    with start(command, FAIL="yes") as server:
        assert server.wait_for_end() != 0
        assert "the app's own listener failed" in server.words
        server.wait_until_nobody_is_left()


PAIR = """
import sys

from sanic import Sanic, json
from sqlalchemy import select
from sqlalchemy.orm import Session

from sanic_db_bp import db_bp


async def alive(request, session: Session):
    return json(session.scalar(select(1)))


first, second = Sanic("first"), Sanic("second")
for app in first, second:
    app.config.MOTD = False
    app.blueprint(db_bp)
    app.add_route(alive, "/alive")
if __name__ == "__main__":
    first.prepare(host="127.0.0.1", port=int(sys.argv[-1]))
    second.prepare(host="127.0.0.1", port=int(sys.argv[-3]))
    Sanic.serve()
"""


def test_two_apps_in_one_process_stop(tmp_path: Path) -> None:
    """The end of the second, which is a task of the first, needs an event loop that runs."""
    (tmp_path / "pair.py").write_text(PAIR)
    with Process(tmp_path, ["pair", str(free_port())], {}) as server:
        server.wait_until_served()
        server.wait_for(MAY_STOP)
        # For an open connection Sanic would let the loop run.
        server.client.close()
        assert server.stop() == 0


# --- The database is down


@MODES
def test_the_start_waits_for_the_database_and_then_fails(
    start: Callable[..., Process], command: list[str]
) -> None:
    """After ``STARTUP_TIMEOUT`` the server gives up with a non-zero code, and does not restart."""
    environment = {
        "SANIC_DB_URL": f"postgresql://me:{SECRET}@127.0.0.1:{free_port()}/shop",
        "SANIC_DB_STARTUP_TIMEOUT": "0.5",
        "SANIC_DB_ECHO": "true",
    }
    with start(command, **environment) as server:
        assert server.wait_for_end() != 0
        assert "waiting for it to come up" in server.words
        assert "The database 'db' is unavailable: connecting failed" in server.words
        assert "me:***@127.0.0.1" in server.words
        assert SECRET not in server.output
        starts = server.output.count("database db: postgresql+asyncpg://")
        # The first worker that gives up takes the other with it, which perhaps said nothing yet.
        assert 1 <= starts <= (2 if command is WORKERS else 1), "no worker was started again"
        server.wait_until_nobody_is_left()


@MODES
def test_the_server_comes_up_when_the_database_does(
    start: Callable[..., Process], tmp_path: Path, command: list[str]
) -> None:
    """A database that appears within ``STARTUP_TIMEOUT`` is used."""
    folder = tmp_path / "later"
    workers = 2 if command is WORKERS else 1
    environment = {"SANIC_DB_URL": f"sqlite:///{folder}/shop.db", "SEED": ""}
    with start(command, **environment) as server:
        server.wait_for("waiting for it to come up", times=workers)
        folder.mkdir()
        server.wait_until_served()
        assert server.client.get("/alive").json() == 1


def test_the_server_comes_up_when_its_database_server_does(
    start: Callable[..., Process], own_server: Server
) -> None:
    """PostgreSQL and MariaDB may be started after the app."""
    url = own_server.new_database()
    own_server.stop()
    with start(SINGLE, SANIC_DB_URL=url) as server:
        server.wait_for("waiting for it to come up")
        own_server.start()
        server.wait_until_served()
        assert server.client.get("/alive").json() == 1


def test_no_output_shows_the_password(
    start: Callable[..., Process], postgresql_server: str
) -> None:
    """With every log on, from the start over an error to the stop, the password is not there."""
    url = make_url(create_database(postgresql_server, "postgresql+asyncpg"))
    url = url.set(password=SECRET)
    environment = {
        "SANIC_DB_URL": url.render_as_string(hide_password=False),
        "SANIC_DB_ECHO": "true",
        "SANIC_DB_SLOW_QUERY_MS": "0.001",
    }
    with start([*SINGLE, "--debug"], **environment) as server:
        server.wait_until_served()
        assert server.client.get("/").status_code == 500, "there is no table"
        assert SECRET not in server.client.get("/", headers={"accept": "text/html"}).text
        server.client.close()
        assert server.stop() == 0
        assert ":***@" in server.output
        assert SECRET not in server.output
