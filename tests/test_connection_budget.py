"""The connection budget: what the start says of the connections of all workers."""

import logging
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from sanic import Sanic
from sqlalchemy import NullPool, make_url
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import Database, DatabaseBlueprint, DatabaseSettings
from sanic_db_bp.startup import tell_budget
from tests.databases import on_every_driver_of_servers, on_postgresql
from tests.processes import Process, free_port
from tests.proxy import proxied
from tests.serving import serving
from tests.shop import Observer
from tests.test_startup import APP, WORKERS


@pytest.fixture
def told(caplog: pytest.LogCaptureFixture) -> Callable[..., Any]:
    """Tell the budget of databases; gives what was logged, with the level."""

    async def tell(*databases: Database) -> list[tuple[str, str]]:
        caplog.set_level(logging.INFO)
        caplog.clear()
        try:
            await tell_budget(databases)
        finally:
            for database in databases:
                await database.dispose()
        ours = [record for record in caplog.records if record.name == "sanic.root.db"]
        return [(record.levelname, record.getMessage()) for record in ours]

    return tell


def make_database(url: str, name: str = "db", workers: int = 1, **settings: Any) -> Database:
    return Database(DatabaseSettings(url=url, **settings), name=name, workers=workers)


def allowed_by(database_url: str) -> int:
    """How many connections the server of the tests, ours or a given one, allows to us."""
    observer = Observer(database_url)
    if observer.kind == "postgresql":
        names = ("max_connections", "superuser_reserved_connections", "reserved_connections")
        most, *reserved = (
            int(observer.scalar(f"SELECT coalesce(current_setting('{name}', true), '0')"))
            for name in names
        )
        return most - sum(reserved)
    users = int(observer.scalar("SELECT @@max_user_connections"))
    return min(int(observer.scalar("SELECT @@max_connections")), users or sys.maxsize)


@asynccontextmanager
async def limited_to_five(database_url: str) -> AsyncIterator[str]:
    """Let the database, or its user, have five connections; gives the URL to use."""
    observer, url = Observer(database_url), make_url(database_url)
    if observer.kind == "postgresql":
        observer.run(f"ALTER DATABASE {url.database} CONNECTION LIMIT 5")
        try:
            yield database_url
        finally:
            # It is lent to other tests.
            observer.run(f"ALTER DATABASE {url.database} CONNECTION LIMIT -1")
        return
    observer.run("CREATE USER few@'%%' IDENTIFIED BY 'few' WITH MAX_USER_CONNECTIONS 5")
    try:
        observer.run(f"GRANT ALL ON {url.database}.* TO few@'%%'")
        few = url.set(username="few", password="few")
        yield few.render_as_string(hide_password=False)
    finally:
        observer.run("DROP USER few@'%%'")


@on_every_driver_of_servers
async def test_the_sum_of_all_workers_is_told(told: Callable[..., Any], database_url: str) -> None:
    """Read-write and read pools of every worker, beside what the server allows."""
    database = make_database(database_url, workers=4, pool_size=3, max_overflow=2)
    assert await told(database) == [
        (
            "INFO",
            "database db: up to 40 connections, all workers together, of "
            f"{allowed_by(database_url)} that the server allows",
        )
    ]


@on_every_driver_of_servers
async def test_too_many_connections_are_warned_of(
    told: Callable[..., Any], database_url: str
) -> None:
    """The warning has both numbers and names the settings; one connection less is no warning."""
    async with limited_to_five(database_url) as url:
        ((level, message),) = await told(make_database(url, pool_size=3))
        assert level == "WARNING"
        assert "up to 6 connections, all workers together, and the server allows 5." in message
        assert "Set MAX_CONNECTIONS, or lower POOL_SIZE" in message
        ((level, _),) = await told(make_database(url, max_connections=5))
        assert level == "INFO"


@on_postgresql
async def test_databases_of_one_server_share_what_it_allows(
    told: Callable[..., Any], database_url: str
) -> None:
    """Each alone would be within the limit."""
    size = allowed_by(database_url) // 4 + 1
    databases = [make_database(database_url, name, pool_size=size) for name in ("db", "reports")]
    ((level, message),) = await told(*databases)
    assert level == "WARNING"
    assert message.startswith(f"database db and reports: up to {4 * size} connections")


@on_postgresql
async def test_servers_on_two_ports_share_nothing(
    told: Callable[..., Any], database_url: str
) -> None:
    """Each of them is told by itself, although they have one host."""
    async with proxied(database_url) as proxy:
        lines = await told(make_database(database_url), make_database(proxy.url, "reports"))
    names = [message.partition(":")[0] for _, message in lines]
    assert names == ["database db", "database reports"]


@on_postgresql
async def test_a_limit_of_one_database_is_not_that_of_the_server(
    told: Callable[..., Any], database_url: str
) -> None:
    """The widest of what is allowed counts."""
    async with limited_to_five(database_url) as url:
        wide = make_url(url).set(database="postgres").render_as_string(hide_password=False)
        databases = make_database(url, pool_size=3), make_database(wide, "reports", pool_size=3)
        ((level, message),) = await told(*databases)
    assert level == "INFO"
    assert f"up to 12 connections, all workers together, of {allowed_by(url)} that" in message


@on_postgresql
async def test_max_connections_is_kept(told: Callable[..., Any], database_url: str) -> None:
    """What is divided among workers does not add up to more."""
    database = make_database(database_url, workers=7, max_connections=80, pool_size=50)
    ((_, message),) = await told(database)
    assert "up to 77 connections" in message


@on_postgresql
async def test_a_replica_counts_for_itself(told: Callable[..., Any], database_url: str) -> None:
    """What ``READ_URL`` gets is not of this server."""
    ((_, message),) = await told(make_database(database_url, read_url=database_url, pool_size=7))
    assert "up to 7 connections" in message


@on_postgresql
async def test_behind_pgbouncer_no_limit_is_known(
    told: Callable[..., Any], database_url: str
) -> None:
    """PostgreSQL's own does not apply to clients of the pooler."""
    ((level, message),) = await told(make_database(database_url, pgbouncer=True, pool_size=1000))
    assert (level, message) == (
        "INFO",
        "database db: up to 2000 connections, all workers together",
    )


@on_postgresql
async def test_nothing_is_told_of_a_pool_without_a_limit(
    told: Callable[..., Any], database_url: str
) -> None:
    """A pool class of the user's own, or an overflow without end."""
    assert await told(make_database(database_url, engine_options={"poolclass": NullPool})) == []
    assert await told(make_database(database_url, engine_options={"max_overflow": -1})) == []


class OtherSession(Session):
    """The session of a second database."""


class OtherAsyncSession(AsyncSession):
    """Its asyncio form."""


@on_postgresql
async def test_databases_of_one_server_are_told_once(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """When the last of them is open, and of all together."""
    app: Sanic[Any, Any] = Sanic("app")
    app.blueprint(DatabaseBlueprint(url=database_url))
    app.blueprint(
        DatabaseBlueprint(
            "other",
            url=database_url,
            session_class=OtherSession,
            async_session_class=OtherAsyncSession,
        )
    )
    caplog.set_level(logging.INFO)
    async with serving(app):
        told = [line for line in caplog.messages if "all workers together" in line]
    assert [line.split(":")[0] for line in told] == ["database db and other"]


async def test_nothing_is_told_of_sqlite(told: Callable[..., Any], tmp_path: Path) -> None:
    """It has no server."""
    assert await told(make_database(f"sqlite:///{tmp_path}/shop.db")) == []


@on_postgresql
@pytest.mark.parametrize(("setting", "total"), [("", 40), ("22", 22)])
def test_the_start_divides_and_tells_once(
    tmp_path: Path, database_url: str, setting: str, total: int
) -> None:
    """Each of two workers has its half, and the first one tells the sum."""
    (tmp_path / "shop.py").write_text(APP)
    environment = {"SANIC_DB_URL": database_url, "SANIC_DB_MAX_CONNECTIONS": setting}
    with Process(tmp_path, WORKERS, environment) as server:
        server.wait_for("Worker ready", times=2)
        allowed = allowed_by(database_url)
        told = f"up to {total} connections, all workers together, of {allowed}"
        assert server.words.count("all workers together") == server.words.count(told) == 1


async def test_a_limit_that_cannot_be_asked_for_is_told_as_unknown(
    told: Callable[..., Any],
) -> None:
    """The start does not fail because of it, and no password is told."""
    url = f"postgresql://u:s3cr3t@127.0.0.1:{free_port()}/d"
    (unknown, budget) = await told(make_database(url, pool_size=3, max_overflow=0))
    assert unknown[0] == budget[0] == "INFO"
    assert unknown[1].startswith("database db: its limit of connections is unknown: ")
    assert "s3cr3t" not in unknown[1]
    assert budget[1] == "database db: up to 6 connections, all workers together"


@on_postgresql
async def test_a_server_that_does_not_know_its_limit_is_told_in_one_line(
    told: Callable[..., Any], database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as one that is much like PostgreSQL: the error would have the statement in it."""
    database = make_database(database_url)
    monkeypatch.setattr(type(database.backend), "connection_limit", "SELECT nonsense")
    (unknown, budget) = await told(database)
    assert unknown[0] == budget[0] == "INFO"
    assert "its limit of connections is unknown: " in unknown[1]
    assert "\n" not in unknown[1]
