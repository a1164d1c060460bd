"""Metrics for Prometheus: what is counted is what has happened."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.values import MultiProcessValue
from sanic import HTTPResponse, Request, empty
from sqlalchemy import event, text
from sqlalchemy.exc import DisconnectionError, IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.pool import NullPool

from sanic_db_bp import transactional
from sanic_db_bp.contrib import prometheus
from tests.databases import on_postgresql, on_servers, on_sqlite
from tests.processes import Process
from tests.serving import serving
from tests.shop import Item, Observer, Shop, checked_out, doom, eventually, make_app

# It has no types.
value_class: Callable[..., Any] = MultiProcessValue

WRITE = {"database": "db", "engine": "write"}
READ = {"database": "db", "engine": "read"}


class Metered:
    """An app with metrics in a registry of their own."""

    def __init__(self, database_url: str, **settings: Any) -> None:
        self.app: Shop = make_app(database_url, **settings)
        self.registry = CollectorRegistry()
        prometheus.install(self.app, registry=self.registry)

    def value(self, name: str, labels: dict[str, str]) -> float:
        return self.registry.get_sample_value(f"sanic_db_{name}", labels) or 0.0

    def transactions(self) -> dict[str, int]:
        """How many ended, by their outcome."""
        outcomes = ("committed", "rolled_back", "failed")
        return {
            outcome: number
            for outcome in outcomes
            if (
                number := int(
                    self.value("transactions_total", {"database": "db", "outcome": outcome})
                )
            )
        }


@pytest.fixture
def metered(database_url: str) -> Metered:
    return Metered(database_url)


async def test_transactions_are_counted_by_their_end(metered: Metered, database_url: str) -> None:
    """Committed, rolled back, and failed: a COMMIT that did not come about."""
    observer = Observer(database_url)

    @metered.app.get("/<status:int>")
    async def handle(request: Request, status: int, session: AsyncSession) -> HTTPResponse:
        await session.execute(text("SELECT 1"))
        return empty(status)

    @metered.app.get("/doomed")
    async def doomed(request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(text("SELECT 1"))
        await doom(session, observer)
        return empty()

    async with serving(metered.app) as client:
        for path in ("204", "204", "404", "doomed", "204"):
            await client.get(f"/{path}")
    assert metered.transactions() == {"committed": 3, "rolled_back": 1, "failed": 1}


async def test_a_commit_that_fails_in_its_first_statement_has_failed(metered: Metered) -> None:
    """What the handler has added is only sent then; a ROLLBACK after it is one again."""

    @metered.app.post("/items")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name=None))
        return empty()

    @metered.app.get("/in-vain")
    async def look_in_vain(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name=None))
        with suppress(IntegrityError):
            await session.commit()
        await session.rollback()
        await session.execute(text("SELECT 1"))
        return empty(404)

    async with serving(metered.app) as client:
        await client.post("/items")
        assert metered.transactions() == {"failed": 1}
        await client.get("/in-vain")
    assert metered.transactions() == {"failed": 2, "rolled_back": 1}


async def commit_twice(session: AsyncSession) -> None:
    for _ in range(2):
        await session.execute(text("SELECT 1"))
        await session.commit()


async def savepoints(session: AsyncSession) -> None:
    async with session.begin_nested():
        await session.execute(text("SELECT 1"))
    savepoint = await session.begin_nested()
    await savepoint.rollback()
    await session.begin_nested()


async def rolled_back_to_a_savepoint(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    async with session.begin_nested():
        await session.execute(text("SELECT 1"))
    await session.rollback()


async def cut(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    await session.invalidate()


async def nothing(session: AsyncSession) -> None:
    await session.commit()


@pytest.mark.parametrize(
    ("work", "ends"),
    [
        (commit_twice, {"committed": 2}),
        (savepoints, {"committed": 1}),
        (rolled_back_to_a_savepoint, {"rolled_back": 1}),
        (cut, {"rolled_back": 1}),
        (nothing, {}),
    ],
)
async def test_only_whole_transactions_are_counted(
    metered: Metered, work: Callable[[AsyncSession], Any], ends: dict[str, int]
) -> None:
    """A savepoint is none, nor is a session that has sent nothing; a cut connection was one."""
    async with serving(metered.app):
        async with metered.app.ctx.db.session() as session:
            await work(session)
        assert metered.transactions() == ends


async def test_reads_are_no_transactions(metered: Metered) -> None:
    """A read session has connections, and each statement is for itself."""
    async with serving(metered.app):
        async with metered.app.ctx.db.read_session() as session:
            await session.execute(text("SELECT 1"))
        assert metered.transactions() == {}
        assert metered.value("pool_hold_seconds_count", READ) == 1


@on_postgresql
async def test_transactions_that_run_again_are_counted(metered: Metered) -> None:
    """Two handlers collide; the loser is rolled back, runs again and is committed."""
    both_have_read = asyncio.Barrier(2)
    runs = 0

    @metered.app.post("/")
    @transactional(isolation="SERIALIZABLE", retries=3)
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        nonlocal runs
        runs += 1
        number = await session.scalar(text("SELECT count(*) FROM item"))
        if runs <= 2:
            await both_have_read.wait()
        session.add(Item(name=f"{runs}", stock=number or 0))
        return empty()

    async with serving(metered.app) as client:
        answers = await asyncio.gather(client.post("/"), client.post("/"))
    assert [answer.status_code for answer in answers] == [204, 204]
    assert metered.value("transaction_retries_total", {"database": "db"}) == 1
    ends = metered.transactions()
    assert ends.pop("committed") == 2
    assert sum(ends.values()) == 1


async def test_connections_are_counted_while_they_are_open_and_in_use(metered: Metered) -> None:
    """Of each engine by itself; nothing is left after the end."""
    async with serving(metered.app):
        db = metered.app.ctx.db
        async with db.read_session() as reads:
            await reads.execute(text("SELECT 1"))
            assert metered.value("pool_connections", READ) == 1
            assert metered.value("pool_connections_in_use", READ) == 1
            assert metered.value("pool_connections_in_use", WRITE) == 0
        assert metered.value("pool_connections_in_use", READ) == 0
        assert metered.value("pool_connections", READ) == 1
        assert metered.value("pool_connections", WRITE) == 1
        async with db.session() as session:
            await session.execute(text("SELECT 1"))
            await session.invalidate()
        assert metered.value("pool_connections", WRITE) == 0
        assert metered.value("pool_connections_in_use", WRITE) == 0
    assert metered.value("pool_connections", READ) == 0


@on_sqlite
async def test_a_connection_that_is_detached_is_no_longer_of_the_pool(metered: Metered) -> None:
    """Whoever takes it out of the pool for good has to close it."""
    async with serving(metered.app):
        async with metered.app.ctx.db.engine.connect() as connection:
            raw = await connection.get_raw_connection()
            raw.detach()
            assert metered.value("pool_connections", WRITE) == 0
        assert metered.value("pool_connections_in_use", WRITE) == 0


@on_sqlite
async def test_a_checkout_that_is_tried_again_counts_once(metered: Metered) -> None:
    """An app's own event may refuse a connection; SQLAlchemy takes another one then."""
    async with serving(metered.app):
        engine = metered.app.ctx.db.engine
        refused: list[bool] = []

        @event.listens_for(engine.sync_engine, "checkout")
        def refuse_once(*_: Any) -> None:
            if not refused:
                refused.append(True)
                raise DisconnectionError

        async with engine.connect():
            assert metered.value("pool_connections_in_use", WRITE) == 1
        assert refused
        assert metered.value("pool_connections_in_use", WRITE) == 0


@on_sqlite
async def test_a_checkout_that_is_refused_was_no_use(metered: Metered) -> None:
    """An app's own event, called before ours, may let nobody have a connection."""
    async with serving(metered.app):
        engine = metered.app.ctx.db.engine

        @event.listens_for(engine.sync_engine, "checkout", insert=True)
        def refuse(*_: Any) -> None:
            raise LookupError

        held = metered.value("pool_hold_seconds_count", WRITE)
        with pytest.raises(LookupError):
            await engine.connect()
        assert metered.value("pool_connections_in_use", WRITE) == 0
        assert metered.value("pool_hold_seconds_count", WRITE) == held


async def test_connections_without_a_pool_are_counted_and_nobody_waits(database_url: str) -> None:
    """A pool class of the user's own."""
    metered = Metered(database_url, engine_options={"poolclass": NullPool})
    async with serving(metered.app):
        async with metered.app.ctx.db.session() as session:
            await session.execute(text("SELECT 1"))
            assert metered.value("pool_connections", WRITE) == 1
            assert metered.value("pool_connections_in_use", WRITE) == 1
        assert metered.value("pool_connections", WRITE) == 0
    assert metered.value("pool_wait_seconds_count", WRITE) == 0


@on_servers
async def test_waits_are_timed_and_vain_ones_counted(database_url: str) -> None:
    """A pool of one: the second waits, the third gives up after POOL_TIMEOUT."""
    metered = Metered(database_url, pool_size=1, max_overflow=0, pool_timeout=1)
    let_go = asyncio.Event()

    async def hold(until: asyncio.Event | None) -> None:
        async with metered.app.ctx.db.session() as session:
            await session.execute(text("SELECT 1"))
            if until is not None:
                await until.wait()

    async with serving(metered.app):
        before = metered.value("pool_wait_seconds_count", WRITE)
        waited = metered.value("pool_wait_seconds_sum", WRITE)
        first = asyncio.create_task(hold(let_go))
        await eventually(lambda: checked_out(metered.app) == 1, within=10)
        second = asyncio.create_task(hold(None))
        await asyncio.sleep(0.1)
        let_go.set()
        await asyncio.gather(first, second)
        assert metered.value("pool_wait_seconds_count", WRITE) == before + 2
        assert 0.09 < metered.value("pool_wait_seconds_sum", WRITE) - waited < 2
        assert metered.value("pool_failures_total", WRITE) == 0
        let_go.clear()
        first = asyncio.create_task(hold(let_go))
        await eventually(lambda: checked_out(metered.app) == 1, within=10)
        with pytest.raises(Exception, match="POOL_TIMEOUT"):
            await hold(None)
        let_go.set()
        await first
        assert metered.value("pool_failures_total", WRITE) == 1
        assert metered.value("pool_hold_seconds_sum", WRITE) > 1


async def test_a_disposed_engine_goes_on_counting(metered: Metered) -> None:
    """SQLAlchemy makes a new pool then."""
    async with serving(metered.app):
        db = metered.app.ctx.db
        await db.engine.dispose()
        before = metered.value("pool_wait_seconds_count", WRITE)
        await db.ping()
        assert metered.value("pool_wait_seconds_count", WRITE) == before + 1
        assert metered.value("pool_connections", WRITE) == 1


@on_sqlite
async def test_the_route_tells_the_metrics(database_url: str) -> None:
    """In the text format of Prometheus; the apps of a process share a registry."""
    registry = CollectorRegistry()
    for _ in range(2):
        app = make_app(database_url)
        prometheus.install(app, path="/metrics", registry=registry)
        async with serving(app) as client:
            answer = await client.get("/metrics")
            assert answer.headers["Content-Type"].startswith("text/plain")
            samples = samples_of(answer.text)
            assert samples["sanic_db_pool_connections", "db", "write"] == 1


@on_sqlite
async def test_the_route_tells_what_other_workers_have_counted(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the multiprocess mode; a worker that stops leaves none of its gauges behind."""
    folder = tmp_path / "metrics"
    folder.mkdir()
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(folder))
    app = make_app(database_url)
    prometheus.install(app, path="/metrics", registry=CollectorRegistry())
    async with serving(app) as client:
        for pid, value in ((os.getpid(), 3), (os.getpid() + 1, 4)):
            gauge = value_class(lambda pid=pid: pid)
            gauge("gauge", "busy", "busy", (), (), "", multiprocess_mode="livesum").set(value)
        assert samples_of((await client.get("/metrics")).text) == {("busy",): 7}
    assert [each.name for each in folder.iterdir()] == [f"gauge_livesum_{os.getpid() + 1}.db"]


def samples_of(exposition: str) -> dict[tuple[str, ...], float]:
    """The values by name and labels."""
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


WORKERS_APP = """
from sanic import Sanic, empty
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from sanic_db_bp import db_bp
from sanic_db_bp.contrib import prometheus

app = Sanic("metered")
app.blueprint(db_bp)
prometheus.install(app, path="/metrics")


@app.get("/")
async def handle(request, session: AsyncSession):
    await session.execute(text("SELECT 1"))
    return empty(headers={"worker": request.app.m.name})
"""


def test_any_worker_tells_the_sums_of_all(tmp_path: Path) -> None:
    """In the multiprocess mode, and what a stopped worker had open is forgotten."""
    (tmp_path / "shop.py").write_text(WORKERS_APP)
    folder = tmp_path / "metrics"
    folder.mkdir()
    command = ["sanic", "shop:app", "--workers", "2"]
    with Process(tmp_path, command, {"PROMETHEUS_MULTIPROC_DIR": str(folder)}) as server:
        server.wait_for("Worker ready", times=2)
        asked: Counter[str] = Counter()
        while len(asked) < 2 or asked.total() < 20:
            asked[httpx.get(f"{server.client.base_url}").headers["worker"]] += 1
            assert asked.total() < 500
        samples = samples_of(server.client.get("/metrics").text)
        assert samples["sanic_db_transactions_total", "db", "committed"] == asked.total()
        assert samples["sanic_db_pool_connections", "db", "write"] == 2
        server.client.close()
        assert server.stop() == 0
    assert not list(folder.glob("gauge_live*"))
