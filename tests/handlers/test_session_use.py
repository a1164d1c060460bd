"""A session is refused after its end, and in two tasks at once."""

import asyncio
import weakref

import pytest
from sanic import HTTPResponse, Request, json, text
from sanic.exceptions import SanicException
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import ConcurrentSessionUse, SessionFinished, current_session
from sanic_db_bp.bridge import run_in_bridge
from tests.databases import on_postgresql
from tests.serving import serving
from tests.shop import Item, Observer, Shop, SlowQuery, checked_out, settled


async def test_a_background_task_cannot_use_the_session(app: Shop, observer: Observer) -> None:
    """The error names the way to open another session, and nothing is reopened."""
    outcomes: list[BaseException] = []
    done = asyncio.Event()

    async def later(request: Request, session: AsyncSession, answered: asyncio.Event) -> None:
        await answered.wait()
        for use in (
            lambda: session.scalars(select(Item)),
            lambda: request.ctx.session.scalars(select(Item)),
            lambda: current_session(AsyncSession).scalars(select(Item)),
            lambda: session.commit(),
        ):
            try:
                await use()
            except SessionFinished as error:
                outcomes.append(error)
        try:
            session.add(Item(name="late"))
        except SessionFinished as error:
            outcomes.append(error)
        done.set()

    answered = asyncio.Event()

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        app.add_task(later(request, session, answered))
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 200
        answered.set()
        await asyncio.wait_for(done.wait(), 2)
        assert len(outcomes) == 5
        assert all("async with app.ctx.db.session()" in str(error) for error in outcomes)
        assert observer.names() == ["apple"]
        await settled(app, observer)


@on_postgresql
@pytest.mark.parametrize("fails", [False, True], ids=["answers", "fails"])
async def test_a_session_that_was_not_used_cannot_be_used_later(app: Shop, fails: bool) -> None:
    """And what has it keeps nothing else of the request alive."""
    kept: list[Session] = []
    requests: list[weakref.ref[Request]] = []

    @app.post("/")
    async def keep(request: Request, session: Session) -> HTTPResponse:
        kept.append(session)
        requests.append(weakref.ref(request))
        if fails:
            raise SanicException("no", quiet=True)
        return text("ok")

    async with serving(app) as client:
        await client.post("/")
        await client.post("/")
        assert requests[0]() is None
        for use in (lambda: kept[0].scalars(select(Item)), lambda: kept[0].add(Item(name="late"))):
            with pytest.raises(SessionFinished):
                await run_in_bridge(use)


@on_postgresql
async def test_a_background_task_that_is_the_first_to_use_the_session(app: Shop) -> None:
    """A task that outlives its request gets no session of it, even if the request used none."""
    outcomes: list[BaseException] = []
    answered, done = asyncio.Event(), asyncio.Event()

    async def later(request: Request) -> None:
        await answered.wait()
        for find in (lambda: request.ctx.session, lambda: current_session(AsyncSession)):
            try:
                await find().scalars(select(Item))
            except SessionFinished as error:
                outcomes.append(error)
        done.set()

    @app.post("/")
    async def answer(request: Request) -> HTTPResponse:
        app.add_task(later(request))
        return text("ok")

    async with serving(app) as client:
        assert (await client.post("/")).text == "ok"
        answered.set()
        await asyncio.wait_for(done.wait(), 2)
        assert len(outcomes) == 2
        assert checked_out(app) == 0


async def test_two_tasks_at_once(app: Shop, observer: Observer) -> None:
    """Using one session in two tasks at once is a clear error, and the request ends clean."""
    query = SlowQuery(observer)

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        slow = asyncio.create_task(query.run(session))
        await query.begun()
        with pytest.raises(ConcurrentSessionUse, match=r"async with app\.ctx\.db\.session\(\)"):
            await session.scalars(select(Item))
        slow.cancel()
        await asyncio.wait({slow})
        return text("refused", 400)

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 400
        await settled(app, observer)
        assert observer.names() == []


async def test_gather_on_one_session(app: Shop, observer: Observer) -> None:
    """A gather of two queries fails with the clear error, and nothing of the request is kept."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        await asyncio.gather(session.scalars(select(Item)), session.scalars(select(Item)))
        return text("stored")

    @app.exception(ConcurrentSessionUse)
    async def explain(request: Request, error: ConcurrentSessionUse) -> HTTPResponse:
        return text(str(error), 500)

    async with serving(app) as client:
        response = await client.post("/")
        assert response.status_code == 500
        assert "at the same time" in response.text
        await settled(app, observer)
        assert observer.names() == []


async def test_a_task_that_still_uses_the_session_at_the_end(app: Shop, observer: Observer) -> None:
    """A handler that returns while its task is in a query gets the error in place of success."""
    query = SlowQuery(observer)
    tasks = []

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await session.flush()
        tasks.append(asyncio.create_task(query.run(session)))
        await query.begun()
        asyncio.get_running_loop().call_later(0.2, tasks[0].cancel)
        return text("stored")

    async with serving(app) as client:
        assert (await client.post("/")).status_code == 500
        await settled(app, observer)
        assert observer.names() == []
        assert tasks[0].cancelled()


async def test_wait_for(app: Shop, observer: Observer) -> None:
    """A query inside asyncio.wait_for, a task of its own on Python 3.11, works."""

    @app.post("/")
    async def add(request: Request, session: AsyncSession) -> HTTPResponse:
        session.add(Item(name="apple"))
        await asyncio.wait_for(session.flush(), 2)
        found = await asyncio.wait_for(session.scalars(select(Item.name)), 2)
        return json(list(found))

    async with serving(app) as client:
        assert (await client.post("/")).json() == ["apple"]
        assert observer.names() == ["apple"]
