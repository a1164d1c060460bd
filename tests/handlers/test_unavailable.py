"""A database that is busy, away or shutting down is answered in good order."""

import asyncio
from collections.abc import Iterator

import pytest
from sanic import HTTPResponse, Request, json, text
from sqlalchemy import select
from sqlalchemy import text as sql
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import DatabaseUnavailable
from tests.databases import on_postgresql, on_servers
from tests.handlers.helpers import Buyer, get_buyer
from tests.proxy import proxied
from tests.serving import serving
from tests.shop import (
    Item,
    Observer,
    Shop,
    connection_id,
    errors,
    make_app,
    raw_client,
    settled,
)


async def test_an_exhausted_pool_is_answered_with_503(
    database_url: str, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """A request that gets no connection in time is told to come again, in one line of the log."""
    app = make_app(database_url, pool_size=1, pool_timeout=0.1)
    release = asyncio.Event()
    reached = asyncio.Event()

    @app.post("/hold")
    async def hold(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        reached.set()
        await release.wait()
        return text("stored")

    @app.get("/")
    async def names(request: Request, session: AsyncSession) -> HTTPResponse:
        return json(list(await session.scalars(select(Item.name))))

    async with serving(app) as client:
        holder = asyncio.create_task(client.post("/hold"))
        await reached.wait()
        response = await client.get("/")
        assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
        [line] = errors(caplog)
        assert "POOL_TIMEOUT" in line.getMessage()
        assert "GET /" in line.getMessage()
        assert line.exc_info is None
        release.set()
        assert (await holder).status_code == 200
        assert (await client.get("/")).json() == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_a_pool_that_is_exhausted_at_the_commit(
    database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Where the first statement is that of the COMMIT, one line tells, too."""
    app = make_app(database_url, pool_size=1, pool_timeout=0.1)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        return text("stored")

    async with serving(app) as client, app.ctx.db.session() as session:
        await session.scalars(select(Item))
        response = await client.post("/")
        assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
        [line] = errors(caplog)
        assert "503 for POST /" in line.getMessage()


@pytest.fixture
def secret_url(database_url: str) -> Iterator[str]:
    """The URL of the database with a password."""
    root = Observer(database_url)
    if root.kind == "postgresql":
        yield database_url.replace("postgres@", "postgres:s3cret-word@")
        return
    user = "shop_" + database_url.rpartition("/")[2][-16:]
    root.run(f"CREATE USER {user}@'%%' IDENTIFIED BY 's3cret-word'")
    root.run(f"GRANT ALL ON *.* TO {user}@'%%'")
    yield database_url.replace("root@", f"{user}:s3cret-word@")
    root.run(f"DROP USER {user}@'%%'")


@on_servers
async def test_a_database_that_is_away_is_answered_with_503(
    secret_url: str,
    observer: Observer,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """One line a request, no credentials in any output, and all is well once it is back."""
    async with proxied(secret_url) as proxy:
        app = make_app(proxy.url)

        @app.post("/<name>")
        async def add(request: Request, name: str, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name=name))
            return text("stored")

        @app.get("/")
        async def names(request: Request, session: Session) -> HTTPResponse:
            return json(list(session.scalars(select(Item.name))))

        async with serving(app) as client:
            assert (await client.post("/apple")).status_code == 200
            await proxy.down()
            answers = []
            for _ in range(3):
                caplog.clear()
                answer = await client.get("/")
                assert (answer.status_code, answer.headers.get("retry-after")) == (503, "1")
                assert len(errors(caplog)) == 1
                assert errors(caplog)[0].exc_info is None
                answers.append(answer.text + caplog.text)
            answers.append((await client.post("/pear")).text + caplog.text)
            assert "s3cret-word" not in "".join(answers)
            await proxy.up()
            assert (await client.post("/plum")).status_code == 200
            assert observer.names() == ["apple", "plum"]
            await settled(app, observer)
    shown = capfd.readouterr()
    assert "s3cret-word" not in shown.out + shown.err


@on_servers
async def test_a_database_that_goes_away_before_the_commit(
    database_url: str, observer: Observer, caplog: pytest.LogCaptureFixture
) -> None:
    """The client gets an error, and one line tells."""
    async with proxied(database_url) as proxy:
        app = make_app(proxy.url)

        @app.post("/")
        async def add(request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="apple"))
            await session.flush()
            await proxy.down()
            return text("stored")

        async with serving(app) as client:
            assert (await client.post("/")).status_code >= 500
            assert len(errors(caplog)) == 1
            await settled(app, observer)
            assert observer.names() == []


@on_postgresql
async def test_an_exhausted_pool_in_a_dependency(database_url: str, observer: Observer) -> None:
    """A dependency that gets no connection is answered with 503 as well."""
    app = make_app(database_url, pool_size=1, pool_timeout=0.1)
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/")
    async def buy(request: Request, buyer: Buyer) -> HTTPResponse:
        return text(buyer.name)

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            await session.scalars(select(Item))
            response = await client.post("/")
            assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
        assert (await client.post("/")).text == "Ann"
        await settled(app, observer)


@on_postgresql
async def test_the_users_answer_to_an_unavailable_database(database_url: str) -> None:
    """An exception handler of the app for it wins over this package's own."""
    app = make_app(database_url, pool_size=1, pool_timeout=0.1)

    @app.get("/")
    async def names(request: Request, session: AsyncSession) -> HTTPResponse:
        return json(list(await session.scalars(select(Item.name))))

    @app.exception(DatabaseUnavailable)
    async def busy(request: Request, error: DatabaseUnavailable) -> HTTPResponse:
        return text(f"{error.database} is busy", 429)

    async with serving(app) as client, app.ctx.db.session() as session:
        await session.scalars(select(Item))
        response = await client.get("/")
        assert (response.status_code, response.text) == (429, "db is busy")


async def test_a_shutdown_rolls_back(app: Shop, observer: Observer) -> None:
    """A server that stops within a handler stores nothing of it and leaves no connection."""
    reached = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="half"))
        await session.flush()
        reached.set()
        await asyncio.sleep(5)
        return text("stored")

    async with serving(app, grace=0.1) as client, raw_client(client) as waiting:
        waiting.send("POST / HTTP/1.1\nContent-Length: 0")
        await asyncio.wait_for(reached.wait(), 5)
    assert observer.names() == []
    assert observer.open_transactions() == 0


@pytest.mark.parametrize("where", ["middleware", "dependency", "handler"])
@on_servers
async def test_a_connection_that_is_lost_is_answered_with_503(
    app: Shop, observer: Observer, caplog: pytest.LogCaptureFixture, where: str
) -> None:
    """Wherever the request is when it notices, it is one line of the log, and the next is fine."""
    kills = True

    async def use(session: AsyncSession, here: str) -> None:
        if here == where:
            if kills:
                observer.kill(await connection_id(session))
            await session.scalars(select(Item.name))

    class Stock:
        pass

    async def get_stock(request: Request, session: AsyncSession) -> Stock:
        await use(session, "dependency")
        return Stock()

    @app.on_request
    async def guard(request: Request) -> None:
        await use(request.ctx.session, "middleware")

    @app.get("/")
    async def find(request: Request, stock: Stock, session: AsyncSession) -> HTTPResponse:
        await use(session, "handler")
        return text("found")

    app.ext.add_dependency(Stock, get_stock)
    async with serving(app) as client:
        response = await client.get("/")
        assert (response.status_code, response.headers.get("retry-after")) == (503, "1")
        [line] = errors(caplog)
        assert "the connection was lost" in line.getMessage()
        assert line.exc_info is None
        kills = False
        assert (await client.get("/")).status_code == 200
        await settled(app, observer)


@on_servers
async def test_an_app_learns_how_a_connection_was_lost(app: Shop, observer: Observer) -> None:
    """Its own handler for the error, or its log of errors, has the driver's as the cause."""
    causes: list[BaseException | None] = []

    @app.get("/")
    async def find(request: Request, session: AsyncSession) -> HTTPResponse:
        observer.kill(await connection_id(session))
        await session.scalars(select(Item.name))
        return text("never")

    @app.exception(DatabaseUnavailable)
    async def lost(request: Request, error: DatabaseUnavailable) -> HTTPResponse:
        causes.append(error.__cause__)
        return text("lost", 503)

    async with serving(app) as client:
        response = await client.get("/")
        assert (response.status_code, response.text) == (503, "lost")
        assert isinstance(causes[0], DBAPIError)
        await settled(app, observer)


@pytest.mark.parametrize(
    "database_url", ["postgresql-asyncpg", "postgresql-psycopg"], indirect=True
)
async def test_the_last_word_of_a_server_is_known_before_its_socket_closes(
    database_url: str, observer: Observer
) -> None:
    """A server that shuts down says so first: 503, and the connection is not used again."""
    app = make_app(database_url, pool_size=1)
    seen: list[int] = []

    @app.get("/<sqlstate>")
    async def fail(request: Request, sqlstate: str, session: AsyncSession) -> HTTPResponse:
        seen.append(await connection_id(session))
        said = f"DO $$ BEGIN RAISE EXCEPTION SQLSTATE '{sqlstate}'; END $$"
        await session.execute(sql(said))
        return text("never")

    async with serving(app) as client:
        for sqlstate in ("57P01", "25P03"):
            assert (await client.get(f"/{sqlstate}")).status_code == 503
        assert (await client.get("/22000")).status_code == 500
        assert (await client.get("/22000")).status_code == 500
        assert len(set(seen)) == 3
        await settled(app, observer)
