"""Pages of a SELECT: by number (offset), or from a place in its order on (keyset).

Keyset pages cost the same however far in they are, and rows that come or go meanwhile make no
other row appear twice or never.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from datetime import date, datetime, time
from decimal import Decimal
from typing import Any, Generic, Literal, TypeVar, overload
from uuid import UUID

from sanic.exceptions import BadRequest
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Integer,
    Select,
    UnaryExpression,
    and_,
    func,
    inspect,
    literal,
    or_,
    select,
)
from sqlalchemy.exc import StatementError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql import operators

from ..exceptions import ConfigurationError
from .errors import is_invalid_value

T = TypeVar("T")

LARGEST = 2**63 - 1
"""What a database can count to."""

_DIRECTIONS = (operators.asc_op, operators.desc_op)

LONGEST_NUMBER = 65
"""Digits, the most that MariaDB can store."""


@dataclass(frozen=True)
class OffsetPage(Generic[T]):
    """One page of many.

    Args:
        items: the objects of the page.
        number: of the page, from 1 on.
        size: how many objects a full page has.
        total: how many objects there are on all pages.
    """

    items: Sequence[T]
    number: int
    size: int
    total: int

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return -(-self.total // self.size)


@dataclass(frozen=True)
class KeysetPage(Generic[T]):
    """The objects next to a place in an order.

    Args:
        items: the objects.
        next: the cursor of the page after this one, or None on the last.
        previous: the cursor of the page before this one, or None on the first.
    """

    items: Sequence[T]
    next: str | None
    previous: str | None


@overload
def offset_page(
    session: AsyncSession,
    statement: Select[T],
    *,
    number: int = 1,
    size: int = 20,
    maximum: int = 100,
) -> Coroutine[Any, Any, OffsetPage[T]]: ...
@overload
def offset_page(
    session: Session,
    statement: Select[T],
    *,
    number: int = 1,
    size: int = 20,
    maximum: int = 100,
) -> OffsetPage[T]: ...
def offset_page(
    session: Any, statement: Select[Any], *, number: int = 1, size: int = 20, maximum: int = 100
) -> Any:
    """Return one page of what a SELECT finds, and how many there are.

    Rows that are equal in the order of the SELECT are ordered by their primary key.

    Args:
        session: the session; with an ``AsyncSession`` the result has to be awaited.
        statement: a SELECT of one class or column, with its order.
        number: of the page, from 1 on.
        size: objects on a page.
        maximum: the largest size that a client may ask for.

    Raises:
        BadRequest: there cannot be such a page.
    """
    _check_size(size, maximum)
    if number < 1 or number * size > LARGEST:
        raise BadRequest("There is no such page.")
    given = [_split(clause)[0] for clause in statement._order_by_clauses]
    more = [key for key in _primary_key(statement) if not any(key.compare(each) for each in given)]
    page = statement.order_by(*more).limit(size).offset(literal((number - 1) * size, BigInteger()))
    count = select(func.count()).select_from(statement.order_by(None).subquery())

    def load(plain: Session) -> OffsetPage[Any]:
        items = plain.scalars(page).unique().all()
        return OffsetPage(items, number, size, plain.scalars(count).one())

    return _loaded(session, load)


@overload
def keyset_page(
    session: AsyncSession,
    statement: Select[T],
    *order_by: ColumnElement[Any] | Any,
    cursor: str | None = None,
    size: int = 20,
    maximum: int = 100,
) -> Coroutine[Any, Any, KeysetPage[T]]: ...
@overload
def keyset_page(
    session: Session,
    statement: Select[T],
    *order_by: ColumnElement[Any] | Any,
    cursor: str | None = None,
    size: int = 20,
    maximum: int = 100,
) -> KeysetPage[T]: ...
def keyset_page(
    session: Any,
    statement: Select[Any],
    *order_by: Any,
    cursor: str | None = None,
    size: int = 20,
    maximum: int = 100,
) -> Any:
    """Return the page of a SELECT that a cursor leads to, and the cursors of its neighbours.

    Args:
        session: the session; with an ``AsyncSession`` the result has to be awaited.
        statement: a SELECT of one class or column, without an order.
        *order_by: the columns to order by, such as ``Item.price.desc()``; none of them may be NULL.
            The primary key comes last by itself.
        cursor: of a page before, as the client sends it back; the first page without.
        size: objects on a page.
        maximum: the largest size that a client may ask for.

    Raises:
        BadRequest: the cursor is none of this order, or the size is not possible.
        ConfigurationError: a column may be NULL, or is of a type that a cursor cannot hold.
    """
    _check_size(size, maximum)
    keys = _keys(statement, order_by)
    place = None if cursor is None else _decoded(cursor, keys)

    def load(plain: Session) -> KeysetPage[Any]:
        return _load_keyset(plain, statement, keys, place, size)

    return _loaded(session, load)


def _loaded(session: Session | AsyncSession, load: Callable[[Session], T]) -> Any:
    return session.run_sync(load) if isinstance(session, AsyncSession) else load(session)


def _check_size(size: int, maximum: int) -> None:
    if not 1 <= size <= maximum:
        raise BadRequest(f"A page has from 1 to {maximum} objects.")


def _primary_key(statement: Select[Any]) -> tuple[ColumnElement[Any], ...]:
    entity = statement.column_descriptions[0].get("entity")
    if entity is None:
        raise ConfigurationError(
            "Pages are made of a SELECT of a mapped class, or of its columns.", entry="pages"
        )
    selected = inspect(entity)
    mapper = selected.mapper
    properties = [mapper.get_property_by_column(column).key for column in mapper.primary_key]
    return tuple(getattr(selected.entity, name).__clause_element__() for name in properties)


@dataclass(frozen=True)
class _Key:
    """A column of the order."""

    column: ColumnElement[Any]
    descending: bool

    def ordered(self, *, backward: bool) -> ColumnElement[Any]:
        return self.column.desc() if self.descending != backward else self.column.asc()

    def bound(self, value: Any) -> ColumnElement[Any]:
        # A number that is too large for the column is just larger than all that are in it.
        whole = isinstance(self.column.type, Integer)
        return literal(value, BigInteger() if whole else self.column.type)

    def beyond(self, value: Any, *, backward: bool) -> ColumnElement[bool]:
        bound = self.bound(value)
        return self.column < bound if self.descending != backward else self.column > bound


@dataclass(frozen=True)
class _Place:
    """Where a page begins: after these values of the keys, or, backward, before them."""

    backward: bool
    values: Sequence[Any]

    def condition(self, keys: Sequence[_Key]) -> ColumnElement[bool]:
        """Return what the rows beyond have in common; row values know one direction alone."""
        pairs = list(zip(keys, self.values, strict=True))
        ways = []
        for position, (key, value) in enumerate(pairs):
            same = [each.column == each.bound(of) for each, of in pairs[:position]]
            ways.append(and_(*same, key.beyond(value, backward=self.backward)))
        return or_(*ways)


def _keys(statement: Select[Any], order_by: Sequence[Any]) -> list[_Key]:
    keys = [_key(each) for each in order_by]
    descending = keys[-1].descending if keys else False
    for column in _primary_key(statement):
        if not any(column.compare(key.column) for key in keys):
            keys.append(_Key(column, descending))
    return keys


def _key(expression: Any) -> _Key:
    element, descending = _split(expression)
    if getattr(element, "nullable", False):
        raise ConfigurationError(
            f"'{element}' may be NULL, which has no place in an order that every database agrees "
            "on. Order by another column, or by func.coalesce(...) of this one.",
            entry="pages",
        )
    if element.type.python_type not in _READERS:
        raise ConfigurationError(
            f"'{element}' is of a type that a cursor cannot hold.", entry="pages"
        )
    return _Key(element, descending)


def _split(expression: Any) -> tuple[ColumnElement[Any], bool]:
    """Return what an order goes by, and whether it descends."""
    element: ColumnElement[Any] = expression
    if hasattr(expression, "__clause_element__"):
        element = expression.__clause_element__()
    if not isinstance(element, UnaryExpression) or element.modifier not in _DIRECTIONS:
        return element, False
    return element.element, element.modifier is operators.desc_op


def _load_keyset(
    session: Session, statement: Select[Any], keys: list[_Key], place: _Place | None, size: int
) -> KeysetPage[Any]:
    backward = place is not None and place.backward
    page = statement.add_columns(*(key.column for key in keys))
    page = page.order_by(None).order_by(*(key.ordered(backward=backward) for key in keys))
    if place is not None:
        page = page.where(place.condition(keys))
    try:
        found = session.execute(page.limit(size + 1)).unique().all()
    except StatementError as error:
        if place is None or not is_invalid_value(error):
            raise
        raise _not_a_cursor() from error
    more = len(found) > size
    rows = list(found[:size])
    if backward:
        rows.reverse()
    if not rows:
        return KeysetPage([], None, None)
    after = more if not backward else True
    before = more if backward else place is not None
    return KeysetPage(
        [row[0] for row in rows],
        _encoded("next", rows[-1][1:]) if after else None,
        _encoded("previous", rows[0][1:]) if before else None,
    )


def _encoded(direction: Literal["next", "previous"], values: Sequence[Any]) -> str:
    if any(value is None for value in values):
        raise ConfigurationError(
            "A row has NULL for a column that pages are ordered by.", entry="pages"
        )
    plain = [value if isinstance(value, bool | int | float) else str(value) for value in values]
    text = json.dumps([direction[0], *plain], separators=(",", ":"))
    return base64.urlsafe_b64encode(text.encode()).decode().rstrip("=")


def _decoded(cursor: str, keys: Sequence[_Key]) -> _Place:
    try:
        text = base64.b64decode(cursor + "=" * (-len(cursor) % 4), b"-_", validate=True)
        direction, *plain = json.loads(text)
        if direction not in ("n", "p"):
            raise ValueError(direction)
        pairs = zip(keys, plain, strict=True)
        values = [_READERS[key.column.type.python_type](value) for key, value in pairs]
    except (ValueError, TypeError, ArithmeticError, RecursionError):
        raise _not_a_cursor() from None
    return _Place(direction == "p", values)


def _not_a_cursor() -> BadRequest:
    return BadRequest("The cursor is not valid.")


def _whole(value: Any) -> int:
    if type(value) is not int or abs(value) > LARGEST:
        raise ValueError
    return value


def _number(value: Any) -> float:
    if type(value) not in (int, float) or not math.isfinite(value):
        raise ValueError
    return float(value)


def _decimal(value: Any) -> Decimal:
    number = Decimal(_text(value))
    if not number.is_finite() or len(value) > LONGEST_NUMBER or abs(number.adjusted()) > 30:
        raise ValueError
    return number


def _text(value: Any) -> str:
    # PostgreSQL stores no NUL, and nobody half a surrogate pair.
    if type(value) is not str or "\0" in value:
        raise ValueError
    value.encode()
    return value


def _flag(value: Any) -> bool:
    if type(value) is not bool:
        raise ValueError
    return value


_READERS: dict[type, Callable[[Any], Any]] = {
    int: _whole,
    float: _number,
    Decimal: _decimal,
    str: _text,
    bool: _flag,
    datetime: datetime.fromisoformat,
    date: date.fromisoformat,
    time: time.fromisoformat,
    UUID: lambda value: UUID(_text(value)),
}
"""By the type of a column in Python: reads what a cursor has for it, or fails."""
