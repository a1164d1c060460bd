"""The dependencies of a handler share its transaction, and bodies that fail are no trap."""

from sanic import HTTPResponse, Request, text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.handlers.helpers import Buyer, OutOfStock, get_buyer
from tests.serving import serving
from tests.shop import Item, Observer, Shop, checked_out, eventually, raw_client, settled


class Basket:
    def __init__(self, buyer: Buyer) -> None:
        self.buyer = buyer


async def get_basket(request: Request, buyer: Buyer) -> Basket:
    """Refuse every basket."""
    raise OutOfStock(buyer.name)


async def test_a_dependency_shares_the_handlers_transaction(app: Shop, observer: Observer) -> None:
    """What a dependency did is committed, or rolled back, with the handler's work."""
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/<status:int>")
    async def buy(
        request: Request, status: int, buyer: Buyer, session: AsyncSession
    ) -> HTTPResponse:
        session.add(Item(name="handler"))
        return text(buyer.name, status)

    @app.post("/plain/<status:int>")
    async def buy_plain(request: Request, status: int, buyer: Buyer) -> HTTPResponse:
        return text(buyer.name, status)

    async with serving(app) as client:
        await client.post("/400")
        await client.post("/plain/400")
        assert observer.names() == []
        assert (await client.post("/200")).text == "Ann"
        assert observer.names() == ["buyer", "handler"]
        await settled(app, observer)


async def test_a_second_dependency_that_raises(app: Shop, observer: Observer) -> None:
    """What the first dependency did is rolled back, while the client's connection stays open."""
    app.ext.add_dependency(Buyer, get_buyer)
    app.ext.add_dependency(Basket, get_basket)

    @app.post("/")
    async def buy(
        request: Request, buyer: Buyer, basket: Basket, session: AsyncSession
    ) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 0")
        assert (await stayer.answer())[0] == 500
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_a_body_too_large(app: Shop, observer: Observer) -> None:
    """A dependency's work is rolled back when the body is refused after it."""
    app.config.REQUEST_MAX_SIZE = 100
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/")
    async def buy(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 200", b"x" * 200)
        assert (await stayer.answer())[0] == 413
        await settled(app, observer, within=0.2)
        assert observer.names() == []


async def test_a_body_that_is_cut_off(app: Shop, observer: Observer) -> None:
    """A dependency's work is rolled back when the client leaves within the body."""
    app.ext.add_dependency(Buyer, get_buyer)
    called = []

    @app.post("/")
    async def buy(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        called.append(request.body)
        return text("never")

    async with serving(app) as client, raw_client(client) as leaver:
        leaver.send("POST / HTTP/1.1\nContent-Length: 200", b"x" * 100)
        await eventually(lambda: checked_out(app) == 1, within=5)
        leaver.leave()
        await settled(app, observer)
        assert observer.names() == []
        assert called == []


async def test_a_body_that_stops(app: Shop, observer: Observer) -> None:
    """A client that sends no more of its body holds the connection until REQUEST_TIMEOUT."""
    app.config.RESPONSE_TIMEOUT = 0.3
    app.ext.add_dependency(Buyer, get_buyer)

    @app.post("/")
    async def buy(request: Request, buyer: Buyer, session: AsyncSession) -> HTTPResponse:
        return text("never")

    async with serving(app) as client, raw_client(client) as stayer:
        stayer.send("POST / HTTP/1.1\nContent-Length: 200", b"x" * 100)
        await eventually(lambda: checked_out(app) == 1, within=5)
        await settled(app, observer)
        assert observer.names() == []
