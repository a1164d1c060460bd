"""The health routes: what a load balancer learns, and what asking costs a busy app."""

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest
from sanic import Sanic
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import AsyncReadSession, ConfigurationError, DatabaseBlueprint, ReadSession
from sanic_db_bp.contrib.health import HealthBlueprint
from tests.contrib.migrated import make_app as make_migrated_app
from tests.contrib.migrated import run, with_migrations, write
from tests.databases import on_postgresql, on_servers
from tests.servers import Server, create_database
from tests.serving import serving
from tests.shop import Observer, Shop, make_app


def with_health(app: Shop, **options: Any) -> Shop:
    """Register the health routes."""
    app.blueprint(HealthBlueprint(**options))
    return app


ASLEEP = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND state = 'active' AND query = 'SELECT pg_sleep(5)'"
)


async def reason(client: httpx.AsyncClient, name: str = "db") -> str | None:
    """Why the app is not ready, checked against the status."""
    response = await client.get("/health/ready")
    report = response.json()
    assert response.status_code == (200 if report["ready"] else 503)
    found: str | None = report["databases"][name].get("reason")
    assert report["databases"][name]["ready"] is (found is None)
    return found


async def test_a_ready_app_says_so(database_url: str) -> None:
    """Both routes answer 200, with figures and without addresses, and nobody may store it."""
    app = with_health(make_app(database_url))
    app.config.HTTP_AUTO_HEAD = True
    async with serving(app) as client:
        live = await client.get("/health/live")
        assert (live.status_code, live.json()) == (200, {"live": True})
        ready = await client.get("/health/ready")
        assert ready.status_code == 200
        assert ready.headers["cache-control"] == "no-store"
        report = ready.json()
        assert report["ready"] is True
        assert report["databases"].keys() == {"db"}
        assert report["databases"]["db"].keys() == {"ready", "seconds", "pool"}
        assert 0 < report["databases"]["db"]["seconds"] < 1
        assert report["databases"]["db"]["pool"]["checked_out"] == 0
        assert (await client.head("/health/ready")).status_code == 200


async def test_an_app_whose_database_is_away_is_alive_but_not_ready(own_server: Server) -> None:
    """It is ready again once the database is back; the answer does not say where that is."""
    kind = own_server.url.partition(":")[0]
    driver = {"postgresql": "postgresql+asyncpg", "mysql": "mysql+asyncmy"}[kind]
    app = with_health(make_app(create_database(own_server.url, driver)))
    async with serving(app) as client:
        assert await reason(client) is None
        own_server.stop()
        assert await reason(client) == "unavailable"
        assert "127.0.0.1" not in (await client.get("/health/ready")).text
        assert (await client.get("/health/live")).status_code == 200
        own_server.start()
        assert await reason(client) is None


@on_servers
@pytest.mark.parametrize("settings", [{}, {"pool_timeout": 0.1}])
async def test_an_exhausted_pool_is_not_waited_for(
    database_url: str, settings: dict[str, float]
) -> None:
    """The answer comes within the bound, and is good again as soon as a connection is free."""
    app = with_health(make_app(database_url, pool_size=1, max_overflow=0, **settings), within=0.2)
    async with serving(app) as client:
        clock = asyncio.get_running_loop().time
        async with app.ctx.db.session() as session:
            await session.execute(text("SELECT 1"))
            asked = clock()
            assert await reason(client) == "pool_exhausted"
            assert clock() - asked < 2
        assert await reason(client) is None
        assert app.ctx.db.pool_status()["checked_out"] == 0


async def test_a_busy_writer_of_sqlite_does_not_matter(tmp_path: Path) -> None:
    """Its one connection for writing is often taken, while everybody can read."""
    app = with_health(make_app(f"sqlite:///{tmp_path}/shop.db"), within=0.5)
    async with serving(app) as client, app.ctx.db.session() as session:
        await session.execute(text("SELECT 1"))
        assert await reason(client) is None


@on_postgresql
async def test_many_who_ask_at_once_make_one_check(database_url: str) -> None:
    """However often the route is called, it takes one connection of the pool."""
    app = with_health(make_app(database_url, pool_size=5))
    async with serving(app) as client:
        responses = await asyncio.gather(*(client.get("/health/ready") for _ in range(20)))
        assert {response.status_code for response in responses} == {200}
        status = app.ctx.db.pool_status()
        assert status["idle"] + status["checked_out"] == 1


@on_postgresql
async def test_a_database_that_does_not_answer_is_a_timeout(database_url: str) -> None:
    """A connection that hangs does not keep the answer."""
    app = with_health(make_app(database_url, pool_size=2), within=0.3, at_head=True)
    app.ctx.db.find_pending = lambda connection: []
    async with serving(app) as client:
        app.ctx.db.find_pending = lambda c: c.exec_driver_sql("SELECT pg_sleep(5)").all()
        assert await reason(client) == "timeout"
        # The statement is ended, too, and does not keep its connection.
        async with asyncio.timeout(3):
            while Observer(database_url).scalar(ASLEEP):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        app.ctx.db.find_pending = lambda connection: []
        assert await reason(client) is None


async def test_each_database_is_asked(tmp_path: Path) -> None:
    """One that is not ready is enough for 503, unless only others are asked for."""
    app: Shop = Sanic("health-of-two")
    for name in ("db", "reports"):
        url = f"sqlite:///{tmp_path}/{name}.db"
        app.blueprint(DatabaseBlueprint(name, url=url, **_classes(name)))
    with_health(app, at_head=True)
    app.ctx.db.find_pending = lambda connection: []
    app.ctx.reports.find_pending = lambda connection: ["abc"]
    async with serving(app) as client:
        assert await reason(client, "reports") == "migrations_pending"
        report = (await client.get("/health/ready")).json()
        assert report["ready"] is False
        assert report["databases"]["db"]["ready"] is True


def _classes(name: str) -> dict[str, Any]:
    if name == "db":
        return {}
    return {
        "session_class": type("OtherSession", (Session,), {}),
        "async_session_class": type("OtherAsyncSession", (AsyncSession,), {}),
        "read_session_class": type("OtherReadSession", (ReadSession,), {}),
        "async_read_session_class": type("OtherAsyncReadSession", (AsyncReadSession,), {}),
    }


async def test_an_app_may_be_ready_only_at_head(tmp_path: Path, database_url: str) -> None:
    """A server that is up before its migrations gets requests after them."""
    app = with_migrations(make_migrated_app(database_url), tmp_path)
    with_health(app, at_head=True)
    await run(app, "db-init")
    await write(app, tmp_path, "pass")
    async with serving(app) as client:
        assert await reason(client) == "migrations_pending"
        await run(app, "db-upgrade")
        assert await reason(client) is None


async def test_what_cannot_be_asked_stops_the_start(tmp_path: Path) -> None:
    """Unknown databases, and ``at_head`` without migrations."""
    app = with_health(make_app("sqlite://"), databases=["db", "nowhere"])
    with pytest.raises(ConfigurationError, match=r"has no database nowhere\. It has: db"):
        async with serving(app):
            pass
    app = with_health(make_app("sqlite://"), at_head=True)
    with pytest.raises(ConfigurationError, match="Nothing knows the migrations of 'db'"):
        async with serving(app):
            pass


@pytest.mark.parametrize("documented", [False, True])
async def test_the_routes_are_documented_if_asked_for(documented: bool) -> None:
    """The OpenAPI document of the app has them only then."""
    app = with_health(make_app("sqlite://"), documented=documented)
    app.config.OAS = True
    async with serving(app) as client:
        paths = (await client.get("/docs/openapi.json")).json()["paths"]
        assert ("/health/ready" in paths) is documented
        assert ("/health/live" in paths) is documented


async def test_the_check_leaves_no_transaction_behind(database_url: str) -> None:
    """It locks nothing that anybody could wait for."""
    async with serving(with_health(make_app(database_url))) as client:
        observer = Observer(database_url)
        if observer.kind == "sqlite":
            with observer.transaction():
                assert await reason(client) is None
        assert await reason(client) is None
        assert observer.open_transactions() == 0
