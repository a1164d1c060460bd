"""FastAPI with SQLAlchemy as its documentation has it: a dependency that yields the session.

Answers are pydantic models named by the return types, which is FastAPI's fastest way to JSON.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

from fastapi import Depends, FastAPI, Request
from fastapi.responses import HTMLResponse
from pydantic import BaseModel
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.models import TWENTY, Fortune, Item, ItemJSON, Note, World, WorldJSON

from . import Options
from .pages import any_key, any_keys, any_number, fortunes_page


class NoteIn(BaseModel):
    text: str


async def get_session(request: Request) -> AsyncIterator[AsyncSession]:
    async with request.app.state.sessions.begin() as session:
        yield session


SessionDependency = Annotated[AsyncSession, Depends(get_session)]


def create_app(options: Options) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        engine = create_async_engine(options.url, pool_size=options.pool_size, max_overflow=0)
        app.state.sessions = async_sessionmaker(engine, expire_on_commit=False)
        yield
        await engine.dispose()

    app = FastAPI(lifespan=lifespan)
    app.get("/plain")(plain)
    app.get("/items/{item_id}")(item)
    app.get("/twenty")(twenty)
    app.post("/notes", status_code=201)(add_note)
    app.get("/db")(world)
    app.get("/queries")(worlds)
    app.get("/fortunes", response_class=HTMLResponse)(fortunes)
    app.get("/updates")(update)
    return app


async def plain() -> dict[str, str]:
    return {"message": "Hello"}


async def item(item_id: int, session: SessionDependency) -> ItemJSON:
    return (await session.get_one(Item, item_id)).to_json()


async def twenty(session: SessionDependency) -> list[ItemJSON]:
    return [(await session.get_one(Item, key)).to_json() for key in TWENTY]


async def add_note(note: NoteIn, session: SessionDependency) -> NoteIn:
    session.add(Note(text=note.text))
    return note


async def world(session: SessionDependency) -> WorldJSON:
    return (await session.get_one(World, any_key())).to_json()


async def worlds(session: SessionDependency) -> list[WorldJSON]:
    return [(await session.get_one(World, key)).to_json() for key in any_keys()]


async def fortunes(session: SessionDependency) -> str:
    return fortunes_page(await session.scalars(select(Fortune)))


async def update(session: SessionDependency) -> list[WorldJSON]:
    worlds = [await session.get_one(World, key) for key in any_keys()]
    for world in worlds:
        world.random_number = any_number()
    return [world.to_json() for world in worlds]
