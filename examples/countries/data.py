"""What the tables are filled with at the first start, and what they hold now."""

from collections.abc import Iterable

import pycountry
from pycountry.db import Data
from sqlalchemy import func, insert, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from sanic_db_bp import inject_session

from .models import Base, Country, Note, Reader, Subdivision

DEMO_KEY = "let-ada-in"


def load(session: Session) -> None:
    """Fill the tables from pycountry, if that has not been done."""
    if session.scalar(select(Country.code).limit(1)):
        return
    countries = sorted(pycountry.countries, key=lambda country: country.alpha_2)
    session.execute(
        insert(Country),
        [{"code": each.alpha_2, "name": each.name, "flag": each.flag} for each in countries],
    )
    session.execute(
        insert(Subdivision),
        [
            {
                "code": each.code,
                "name": each.name,
                "type": each.type,
                "country_code": each.country_code,
                "parent_code": each.parent_code,
            }
            for each in _parents_first(pycountry.subdivisions)
        ],
    )
    session.add(Reader(name="Ada", key_hash=Reader.hash_key(DEMO_KEY)))


def _parents_first(subdivisions: Iterable[Data]) -> list[Data]:
    """In this order each row finds the one that its foreign key names."""
    parent_of = {each.code: each.parent_code for each in subdivisions}

    def depth(code: str) -> int:
        parent = parent_of[code]
        return depth(parent) + 1 if parent else 0

    return sorted(subdivisions, key=lambda each: (depth(each.code), each.code))


@inject_session
async def count_rows(session: AsyncSession) -> dict[str, int]:
    """How many rows each table holds, asked in the caller's session or, without one, its own."""
    models: list[type[Base]] = [Country, Subdivision, Reader, Note]
    return {
        model.__tablename__: await session.scalar(select(func.count()).select_from(model)) or 0
        for model in models
    }
