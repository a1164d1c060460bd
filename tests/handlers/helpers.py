"""What several of these tests use."""

from sanic import Request
from sqlalchemy import select, update
from sqlalchemy import text as sql
from sqlalchemy.ext.asyncio import AsyncSession

from tests.shop import Item, Observer, Shop, make_app


class OutOfStock(Exception):
    pass


async def use_session(request: Request, name: str = "middleware") -> None:
    """Use the session of a request as middleware does."""
    request.ctx.session.add(Item(name=name))
    await request.ctx.session.flush()


class Buyer:
    def __init__(self, name: str) -> None:
        self.name = name


async def get_buyer(request: Request, session: AsyncSession) -> Buyer:
    """Find the buyer, with a note of it."""
    session.add(Item(name="buyer"))
    await session.flush()
    return Buyer("Ann")


class Rival:
    """Makes a handler's transaction fail because of another, so often."""

    def __init__(self, observer: Observer, times: int = 1) -> None:
        self._observer = observer
        self.times = times
        self.isolation = "REPEATABLE READ" if observer.kind != "sqlite" else "SERIALIZABLE"

    async def race(self, session: AsyncSession) -> None:
        """Sell an apple; raises while the rival wins."""
        wins = self.times > 0
        self.times -= wins
        sell = update(Item).where(Item.name == "apple").values(stock=Item.stock - 1)
        match self._observer.kind:
            case "postgresql":
                await session.scalars(select(Item.stock))
                if wins:
                    self._observer.run("UPDATE item SET stock = stock - 10 WHERE name = 'apple'")
                await session.execute(sell)
            case "mysql":
                await session.execute(sql("SET innodb_lock_wait_timeout = 0"))
                with self._observer.transaction() as rival:
                    if wins:
                        rival.execute(sell)
                    await session.execute(sell)
            case _:
                if wins:
                    with self._observer.transaction():
                        await session.execute(sell)
                await session.execute(sell)


def racing_app(database_url: str) -> Shop:
    """Make an app that does not wait long for a lock."""
    sqlite = database_url.startswith("sqlite")
    return make_app(database_url, connect_args={"timeout": 0.05} if sqlite else {})


async def stock_apples(app: Shop) -> None:
    """Store some apples."""
    async with app.ctx.db.session() as session:
        session.add(Item(name="apple", stock=100))
