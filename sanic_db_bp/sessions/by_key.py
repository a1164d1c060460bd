"""Reads by primary key with a statement that each mapper has once."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any
from uuid import UUID

from sqlalchemy import Select, bindparam, inspect, select
from sqlalchemy.orm import Mapper

PLAIN = frozenset({int, str, UUID})
"""The types of values that are what they look like: no mapping, no composite, no ``None``."""

_STATEMENT = "_sanic_db_bp_by_key"


def by_key(get: Callable[..., Any]) -> Callable[..., Any]:
    """Let ``Session.get`` use a statement that was made before.

    SQLAlchemy makes a new one for each read, and walks through all of it to find its SQL. A
    statement that is used again knows its key in the cache ("SQL Compilation Caching" in
    SQLAlchemy's documentation). What is in the identity map, and what asks for more than the
    object, is SQLAlchemy's own affair.
    """

    @wraps(get)
    def get_by_key(self: Any, entity: Any, ident: Any, **options: Any) -> Any:
        values = ident if type(ident) is tuple else (ident,)
        mapper = inspect(entity)
        if (
            not isinstance(mapper, Mapper)
            or len(values) != len(mapper.primary_key)
            or not PLAIN.issuperset(map(type, values))
            or any(options.values())
            or mapper.identity_key_from_primary_key(values) in self.identity_map
        ):
            return get(self, entity, ident, **options)
        parameters = {f"pk_{number}": value for number, value in enumerate(values, 1)}
        return self.execute(_statement(mapper), parameters).unique().scalars().one_or_none()

    return get_by_key


def _statement(mapper: Mapper[Any]) -> Select[Any]:
    kept: Select[Any] | None = mapper.__dict__.get(_STATEMENT)
    if kept is None:
        # As SQLAlchemy's own, so that the database has one statement to prepare, not two.
        kept = select(mapper).where(
            *(
                column == bindparam(f"pk_{number}")
                for number, column in enumerate(mapper.primary_key, 1)
            )
        )
        setattr(mapper, _STATEMENT, kept)
    return kept
