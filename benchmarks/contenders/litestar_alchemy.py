"""Litestar with advanced-alchemy's plugin as its documentation has it, committing by itself."""

from dataclasses import dataclass

from advanced_alchemy.extensions.litestar import (
    AsyncSessionConfig,
    EngineConfig,
    SQLAlchemyAsyncConfig,
    SQLAlchemyPlugin,
)
from litestar import Litestar, MediaType, get, post
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from benchmarks.models import TWENTY, Fortune, Item, ItemJSON, Note, World, WorldJSON

from . import Options
from .pages import any_key, any_keys, any_number, fortunes_page


@dataclass
class NoteIn:
    text: str


def create_app(options: Options) -> Litestar:
    config = SQLAlchemyAsyncConfig(
        connection_string=options.url,
        engine_config=EngineConfig(pool_size=options.pool_size, max_overflow=0),
        session_config=AsyncSessionConfig(expire_on_commit=False),
        before_send_handler="autocommit",
    )
    return Litestar(
        [plain, item, twenty, add_note, world, worlds, fortunes, update],
        plugins=[SQLAlchemyPlugin(config=config)],
    )


@get("/plain")
async def plain() -> dict[str, str]:
    return {"message": "Hello"}


@get("/items/{item_id:int}")
async def item(item_id: int, db_session: AsyncSession) -> ItemJSON:
    return (await db_session.get_one(Item, item_id)).to_json()


@get("/twenty")
async def twenty(db_session: AsyncSession) -> list[ItemJSON]:
    return [(await db_session.get_one(Item, key)).to_json() for key in TWENTY]


@post("/notes")
async def add_note(data: NoteIn, db_session: AsyncSession) -> NoteIn:
    db_session.add(Note(text=data.text))
    return data


@get("/db")
async def world(db_session: AsyncSession) -> WorldJSON:
    return (await db_session.get_one(World, any_key())).to_json()


@get("/queries")
async def worlds(db_session: AsyncSession) -> list[WorldJSON]:
    return [(await db_session.get_one(World, key)).to_json() for key in any_keys()]


@get("/fortunes", media_type=MediaType.HTML)
async def fortunes(db_session: AsyncSession) -> str:
    return fortunes_page(await db_session.scalars(select(Fortune)))


@get("/updates")
async def update(db_session: AsyncSession) -> list[WorldJSON]:
    worlds = [await db_session.get_one(World, key) for key in any_keys()]
    for world in worlds:
        world.random_number = any_number()
    return [world.to_json() for world in worlds]
