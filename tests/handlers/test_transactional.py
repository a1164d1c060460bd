"""@transactional says how a handler is committed, isolated and tried again."""

import asyncio
from collections.abc import Callable
from typing import Any

from sanic import HTTPResponse, Request, json, text
from sanic.views import HTTPMethodView
from sqlalchemy import select, update
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import current_session, transactional
from tests.databases import on_postgresql, on_servers, on_sqlite
from tests.handlers.helpers import (
    Buyer,
    OutOfStock,
    Rival,
    get_buyer,
    racing_app,
    stock_apples,
    use_session,
)
from tests.serving import serving
from tests.shop import Item, Observer, Shop, make_app, raw_client, settled


async def test_commit_false_rolls_back(app: Shop, observer: Observer) -> None:
    """With commit=False only what the handler commits itself is stored."""

    @app.post("/")
    @transactional(commit=False)
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="kept"))
        await session.commit()
        session.add(Item(name="dropped"))
        await session.flush()
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["kept"]
        await settled(app, observer)


@on_sqlite
async def test_without_parentheses_it_changes_nothing(app: Shop, observer: Observer) -> None:
    """The transaction is as the settings say."""

    @app.post("/")
    @transactional
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="kept"))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert observer.names() == ["kept"]


@on_postgresql
async def test_commit_manual(database_url: str, observer: Observer) -> None:
    """Where COMMIT is manual a handler commits itself, or says that it wants a commit."""
    app = make_app(database_url, commit="manual")

    @app.post("/forgotten")
    async def forgotten(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="forgotten"))
        return text("ok")

    @app.post("/manual")
    async def manual(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="manual"))
        await session.commit()
        return text("ok")

    @app.post("/wanted")
    @transactional(commit=True)
    async def wanted(request: Request, session: Session) -> HTTPResponse:
        session.add(Item(name="wanted"))
        return text("ok")

    async with serving(app) as client:
        for path in ("/forgotten", "/manual", "/wanted"):
            assert (await client.post(path)).status_code == 200
        assert observer.names() == ["manual", "wanted"]
        await settled(app, observer)


ISOLATION_QUERY = {"postgresql": "SHOW transaction_isolation", "mysql": "SELECT @@tx_isolation"}


@on_servers
async def test_isolation(app: Shop, observer: Observer) -> None:
    """A handler has the isolation level it asks for, and the next has the usual one again."""
    asked = ISOLATION_QUERY[observer.kind]

    @app.get("/usual")
    async def usual(request: Request, session: AsyncSession) -> HTTPResponse:
        return text(str(await session.scalar(sql(asked))))

    @app.get("/serializable")
    @transactional(isolation="SERIALIZABLE")
    async def serializable(request: Request, session: Session) -> HTTPResponse:
        return text(str(session.scalar(sql(asked))))

    async with serving(app) as client:
        before = (await client.get("/usual")).text
        assert (await client.get("/serializable")).text.upper() == "SERIALIZABLE"
        assert (await client.get("/usual")).text == before != "SERIALIZABLE"


@on_sqlite
async def test_isolation_of_a_file(app: Shop) -> None:
    """SQLite is always serializable, and may be asked for it."""

    @app.get("/")
    @transactional(isolation="SERIALIZABLE")
    async def serializable(request: Request, session: Session) -> HTTPResponse:
        return json(list(session.scalars(select(Item.name))))

    async with serving(app) as client:
        assert (await client.get("/")).json() == []


async def test_retries_after_a_lost_race(database_url: str, observer: Observer) -> None:
    """The handler runs again with a clean session, and what it did before is gone."""
    app = racing_app(database_url)
    rival = Rival(observer, times=2)
    runs: list[tuple[AsyncSession, int]] = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append((session, len(session.new)))
        session.add(Item(name=f"sale {len(runs)}"))
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        response = await client.post("/")
        assert (response.status_code, response.text) == (200, "sold")
        assert observer.names() == ["apple", "sale 3"]
        assert [new for _, new in runs] == [0, 0, 0]
        assert len({id(session) for session, _ in runs}) == 3
        await settled(app, observer)


async def test_retries_are_given_up(database_url: str, observer: Observer) -> None:
    """After the last run the client gets the error."""
    app = racing_app(database_url)
    rival = Rival(observer, times=10)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 3
        await settled(app, observer)


async def test_a_plain_session_retries_too(database_url: str, observer: Observer) -> None:
    """A handler that asks for a plain session, and is no coroutine, runs again as well."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs: list[Session] = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(request: Request, session: Session) -> HTTPResponse:
        runs.append(session)
        await rival.race(current_session(AsyncSession))
        session.add(Item(name="sale"))
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 200
        assert len(runs) == 2
        assert runs[0] is not runs[1]
        assert observer.names() == ["apple", "sale"]


async def test_without_retries_a_lost_race_is_an_error(
    database_url: str, observer: Observer
) -> None:
    """A handler that does not ask for it runs once."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        await settled(app, observer)


@on_postgresql
async def test_another_error_is_not_retried(app: Shop, observer: Observer) -> None:
    """A broken constraint would break again, so the handler runs once."""
    runs = []

    @app.post("/")
    @transactional(retries=3)
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        session.add_all([Item(name="apple"), Item(name="apple")])
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        await settled(app, observer)


@on_servers
async def test_dependencies_are_done_again(database_url: str, observer: Observer) -> None:
    """What a dependency did in the transaction that was rolled back is done again."""
    app = racing_app(database_url)
    rival = Rival(observer)

    async def get_named(request: Request, session: AsyncSession, name: str) -> Buyer:
        await get_buyer(request, session)
        return Buyer(f"the {name} eater")

    app.ext.add_dependency(Buyer, get_named)
    buyers = []

    @app.post("/<name>")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(
        request: Request, name: str, buyer: Buyer, session: AsyncSession
    ) -> HTTPResponse:
        buyers.append(buyer)
        await rival.race(session)
        return text(f"{name} sold to {buyer.name}")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/apple")).text == "apple sold to the apple eater"
        assert len(buyers) == 2
        assert buyers[0] is not buyers[1]
        assert observer.names() == ["apple", "buyer"]


@on_servers
async def test_a_dependency_that_fails_in_another_run(
    database_url: str, observer: Observer
) -> None:
    """The client gets the dependency's error, and nothing is left behind."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs: list[AsyncSession] = []

    async def get_buyer_once(request: Request, session: AsyncSession) -> Buyer:
        runs.append(session)
        buyer = await get_buyer(request, session)
        if len(runs) == 2:
            raise OutOfStock
        return buyer

    app.ext.add_dependency(Buyer, get_buyer_once)

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        await rival.race(session)
        return text("sold")

    async with serving(app) as client, raw_client(client) as stayer:
        await stock_apples(app)
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert (await stayer.answer())[0] == 500
        await settled(app, observer, within=0.2)
        assert len(runs) == 2
        assert observer.names() == ["apple"]


@on_postgresql
async def test_a_dependency_that_fails_for_head(app: Shop, observer: Observer) -> None:
    """The HEAD of a class-based view leaves nothing behind if a dependency of it fails."""
    app.config.HTTP_AUTO_HEAD = True

    async def refuse(request: Request, session: AsyncSession) -> Buyer:
        await get_buyer(request, session)
        raise OutOfStock

    app.ext.add_dependency(Buyer, refuse)

    class Shelf(HTTPMethodView):
        async def get(self, request: Request, buyer: Buyer) -> HTTPResponse:
            return text(buyer.name)

    app.add_route(Shelf.as_view(), "/")
    async with serving(app) as client:
        assert (await client.head("/")).status_code == 500
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_no_retry_once_a_byte_was_sent(database_url: str, observer: Observer) -> None:
    """A handler that has begun its answer never runs again."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=3)
    async def sell(request: Request, session: AsyncSession) -> None:
        runs.append(session)
        response = await request.respond()
        await response.send("selling")
        await rival.race(session)

    async with serving(app) as client, raw_client(client) as reader:
        await stock_apples(app)
        reader.send("POST / HTTP/1.1\nContent-Length: 0")
        received = await asyncio.wait_for(reader.reader.read(), 5)
        assert b"selling" in received
        assert not received.endswith(b"0\r\n\r\n")
        assert len(runs) == 1
        await settled(app, observer)


async def test_no_retry_after_a_commit_of_the_handler(
    database_url: str, observer: Observer
) -> None:
    """A handler that has committed in between never runs again, as that would do it twice."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=3)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        session.add(Item(name="half"))
        await session.commit()
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        assert observer.names() == ["apple", "half"]
        await settled(app, observer)


@on_servers
async def test_no_retry_if_middleware_took_part(database_url: str, observer: Observer) -> None:
    """What middleware did in the transaction cannot be done again, so the handler runs once."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs = []

    @app.on_request
    async def before(request: Request) -> None:
        await use_session(request)

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=3)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await rival.race(session)
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert len(runs) == 1
        assert observer.names() == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_a_serialization_failure_at_the_commit(app: Shop, observer: Observer) -> None:
    """A COMMIT that finds a serialization failure makes the handler run again."""
    runs = []

    @app.post("/")
    @transactional(isolation="SERIALIZABLE", retries=1)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        await session.scalars(select(Item))
        session.add(Item(name=f"sale {len(runs)}"))
        await session.flush()
        if len(runs) == 1:
            # Each has read what the other writes: they cannot both be first.
            with observer.transaction("SERIALIZABLE") as other:
                other.execute(select(Item)).all()
                other.exec_driver_sql("INSERT INTO item (name, stock) VALUES ('rival', 0)")
                other.commit()
        return text("sold")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        assert len(runs) == 2
        assert observer.names() == ["rival", "sale 2"]
        await settled(app, observer)


@on_servers
async def test_a_deadlock_is_retried(app: Shop, observer: Observer) -> None:
    """The victim of a deadlock runs again."""
    runs = []

    def rival(locked: Callable[[], object], go_on: Callable[[], object]) -> None:
        with observer.transaction() as other:
            # MariaDB takes the transaction that has changed less for its victim.
            for number in range(5):
                other.exec_driver_sql(
                    f"INSERT INTO item (name, stock) VALUES ('rival {number}', 0)"
                )
            other.exec_driver_sql("UPDATE item SET stock = 1 WHERE name = 'pear'")
            locked()
            other.exec_driver_sql("UPDATE item SET stock = 1 WHERE name = 'apple'")
            go_on()

    async def stock(session: AsyncSession, name: str) -> None:
        await session.execute(update(Item).where(Item.name == name).values(stock=2))

    async def collide(session: AsyncSession) -> None:
        loop = asyncio.get_running_loop()
        locked = asyncio.Event()
        if observer.kind == "postgresql":
            await session.execute(sql("SET LOCAL deadlock_timeout = '100ms'"))
        await stock(session, "apple")
        other = asyncio.create_task(
            asyncio.to_thread(rival, lambda: loop.call_soon_threadsafe(locked.set), lambda: None)
        )
        try:
            await locked.wait()
            await stock(session, "pear")
        finally:
            rivals.append(other)

    rivals: list[asyncio.Task[None]] = []

    @app.post("/")
    @transactional(retries=2)
    async def sell(request: Request, session: AsyncSession) -> HTTPResponse:
        runs.append(session)
        if len(runs) == 1:
            await collide(session)
        await stock(session, "apple")
        await stock(session, "pear")
        return text("sold")

    async with serving(app) as client:
        async with app.ctx.db.session() as session:
            session.add_all([Item(name="apple"), Item(name="pear")])
        assert (await client.post("/")).status_code == 200
        await asyncio.gather(*rivals)
        assert len(runs) == 2
        await settled(app, observer)


@on_postgresql
async def test_a_view_retries_by_method(database_url: str, observer: Observer) -> None:
    """Each method of a class-based view has a transaction of its own kind."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs: list[AsyncSession] = []

    class Shelf(HTTPMethodView):
        @transactional(isolation=rival.isolation, retries=1)
        async def post(self, request: Request, session: AsyncSession) -> HTTPResponse:
            runs.append(session)
            await rival.race(session)
            session.add(Item(name="sale"))
            return text("sold")

        @transactional(commit=False)
        async def put(self, request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name="dropped"))
            await session.flush()
            return text("dropped")

    app.add_route(Shelf.as_view(), "/")
    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 200
        assert (await client.put("/")).status_code == 200
        assert len(runs) == 2
        assert observer.names() == ["apple", "sale"]
        await settled(app, observer)


@on_sqlite
async def test_the_decorators_of_a_view_are_for_all_its_methods(
    app: Shop, observer: Observer
) -> None:
    """A method that says something else itself has the last word."""

    class Shelf(HTTPMethodView):
        decorators = [transactional(commit=False)]  # noqa: RUF012 - Sanic's own way

        async def post(self, request: Request, session: AsyncSession) -> HTTPResponse:
            return await self.add("dropped", session)

        @transactional(commit=True)
        async def put(self, request: Request, session: AsyncSession) -> HTTPResponse:
            return await self.add("kept", session)

        async def add(self, name: str, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name=name))
            await session.flush()
            return text(name)

    app.add_route(Shelf.as_view(), "/")
    async with serving(app) as client:
        assert (await client.post("/")).text == "dropped"
        assert (await client.put("/")).text == "kept"
        assert observer.names() == ["kept"]


@on_sqlite
async def test_a_bound_method_can_be_transactional(app: Shop, observer: Observer) -> None:
    """The mark is for this method of this object; others of its class are as they were."""

    class Shelf:
        async def add(self, request: Request, session: AsyncSession) -> HTTPResponse:
            session.add(Item(name=request.path))
            await session.flush()
            return text("added")

    app.add_route(transactional(commit=False)(Shelf().add), "/dropped", methods=["POST"])
    app.add_route(Shelf().add, "/kept", methods=["POST"], name="kept")
    async with serving(app) as client:
        assert (await client.post("/dropped")).status_code == 200
        assert (await client.post("/kept")).status_code == 200
        assert observer.names() == ["/kept"]


class Basket:
    """What a handler asks for, made of what another dependency has done."""

    def __init__(self, buyer: Buyer) -> None:
        self.buyer = buyer


async def test_a_race_lost_in_a_dependency_is_run_again(
    database_url: str, observer: Observer
) -> None:
    """The transaction is the handler's, whoever has lost the race in it; all of it is done anew."""
    app = racing_app(database_url)
    rival = Rival(observer, times=2)
    runs: list[str] = []

    async def buyer(request: Request, session: AsyncSession) -> Buyer:
        runs.append("buyer")
        session.add(Item(name=f"buyer {request.path}"))
        await rival.race(session)
        return Buyer("Ann")

    async def basket(request: Request, buyer: Buyer, session: Session) -> Basket:
        runs.append("basket")
        session.add(Item(name=f"{buyer.name} {request.path}"))
        return Basket(buyer)

    app.ext.add_dependency(Buyer, buyer)
    app.ext.add_dependency(Basket, basket)

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=2)
    async def sell(request: Request, basket: Basket, session: AsyncSession) -> HTTPResponse:
        runs.append("handler")
        return text(basket.buyer.name)

    class Shelf(HTTPMethodView):
        @transactional(isolation=rival.isolation, retries=2)
        def post(self, request: Request, basket: Basket) -> HTTPResponse:
            runs.append("view")
            return text(basket.buyer.name)

    app.add_route(Shelf.as_view(), "/view")
    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).text == "Ann"
        assert runs == ["buyer", "buyer", "buyer", "basket", "handler"]
        runs.clear()
        rival.times = 2
        assert (await client.post("/view")).text == "Ann"
        assert runs == ["buyer", "buyer", "buyer", "basket", "view"]
        assert observer.names() == ["apple", "buyer /", "Ann /", "buyer /view", "Ann /view"]
        await settled(app, observer)


@on_postgresql
async def test_a_race_lost_in_a_dependency_is_an_error_in_the_end(
    database_url: str, observer: Observer
) -> None:
    """After the last run, and where nothing runs again, the client gets the error."""
    app = racing_app(database_url)
    rival = Rival(observer, times=10)
    runs: list[str] = []

    async def buyer(request: Request, session: AsyncSession) -> Buyer:
        runs.append("buyer")
        session.add(Item(name="buyer"))
        await rival.race(session)
        return Buyer("Ann")

    app.ext.add_dependency(Buyer, buyer)

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(request: Request, buyer: Buyer) -> HTTPResponse:
        return text("sold")

    @app.post("/once")
    @transactional(isolation=rival.isolation)
    async def sell_once(request: Request, buyer: Buyer) -> HTTPResponse:
        return text("sold")

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/")).status_code == 500
        assert runs == ["buyer", "buyer"]
        assert (await client.post("/once")).status_code == 500
        assert runs == ["buyer", "buyer", "buyer"]
        assert observer.names() == ["apple"]
        await settled(app, observer)


@on_postgresql
async def test_a_dependency_that_fails_in_a_later_run(
    database_url: str, observer: Observer
) -> None:
    """Its error ends the request as in the first run: rolled back, and told."""
    app = racing_app(database_url)
    rival = Rival(observer)
    runs: list[str] = []

    async def buyer(request: Request, session: AsyncSession) -> Buyer:
        runs.append("buyer")
        session.add(Item(name="buyer"))
        await session.flush()
        if len(runs) > 1:
            raise OutOfStock("Ann")
        return Buyer("Ann")

    app.ext.add_dependency(Buyer, buyer)

    @app.post("/")
    @transactional(isolation=rival.isolation, retries=1)
    async def sell(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        await rival.race(session)
        return text("sold")

    async with serving(app) as client, raw_client(client) as stayer:
        await stock_apples(app)
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert (await stayer.answer())[0] == 500
        assert runs == ["buyer", "buyer"]
        await settled(app, observer, within=0.2)
        assert observer.names() == ["apple"]


@on_postgresql
async def test_no_retry_of_a_body_that_was_read_in_pieces(
    database_url: str, observer: Observer
) -> None:
    """A body that the handler has taken off the connection is not there a second time."""
    app = racing_app(database_url)
    rival = Rival(observer)
    sizes: list[int] = []

    @app.post("/", stream=True)
    @transactional(isolation=rival.isolation, retries=3)
    async def receive(request: Request, session: AsyncSession) -> HTTPResponse:
        stream: Any = request.stream
        sizes.append(sum([len(piece) async for piece in stream]))
        await rival.race(session)
        return text(str(sizes[-1]))

    async with serving(app) as client:
        await stock_apples(app)
        assert (await client.post("/", content=b"x" * 10)).status_code == 500
        assert sizes == [10]
        await settled(app, observer)


@on_postgresql
async def test_isolation_holds_for_what_comes_before_the_handler(app: Shop) -> None:
    """Middleware and dependencies that use the session first have the handler's isolation."""
    levels: list[str] = []

    @app.on_request
    async def before(request: Request) -> None:
        asked = sql(ISOLATION_QUERY["postgresql"])
        levels.append(str(await request.ctx.session.scalar(asked)))

    @app.get("/")
    @transactional(isolation="SERIALIZABLE")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("ok")

    @app.get("/unmarked")
    async def unmarked(request: Request, session: AsyncSession) -> HTTPResponse:
        return text("ok")

    async with serving(app) as client:
        await client.get("/")
        await client.get("/unmarked")
        assert levels == ["serializable", "read committed"]
