"""Optional mixins for models: the Active Record style, and timestamps."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Self, TypeVar

from sqlalchemy import DateTime, Dialect, Select, TypeDecorator, select
from sqlalchemy.dialects import mysql
from sqlalchemy.orm import Mapped, Query, Session, mapped_column

from .context import current_session
from .exceptions import link_to

if TYPE_CHECKING:
    from sqlalchemy import ColumnElement

T = TypeVar("T")
M = TypeVar("M", bound="ActiveRecordMixin")


class class_property(Generic[T]):
    """A property of a class: ``User.query`` instead of ``User.query()``.

    Args:
        function: called with the class.
    """

    def __init__(self, function: Callable[[Any], T]) -> None:
        self._function = function
        self.__doc__ = function.__doc__

    def __get__(self, instance: object, owner: type[Any]) -> T:
        return self._function(owner)


class _QueryProperty:
    """A query for a model's rows ("Legacy Query API" in SQLAlchemy's documentation)."""

    def __get__(self, instance: object, owner: type[M]) -> Query[M]:
        return owner._session().query(owner)


class ActiveRecordMixin:
    """Lets a model find and keep its own rows, with the session of the current unit of work.

    For plain-``Session`` code: handlers that ask for a ``Session``, functions in ``run_sync``.
    ``session_class`` says of which database, if there are several.

    Raises:
        NoCurrentSession: any use outside of a request and of a block.
        SessionOutsideBridge: in code that is not plain-``Session`` code.
    """

    session_class: ClassVar[type[Session]] = Session

    query: ClassVar[_QueryProperty] = _QueryProperty()

    @classmethod
    def _session(cls) -> Session:
        return current_session(cls.session_class)

    @classmethod
    def select(cls, *conditions: ColumnElement[bool]) -> Select[Self]:
        """Return a SELECT of the model's rows that meet every condition."""
        return select(cls).where(*conditions)

    @classmethod
    def get(cls, key: Any) -> Self | None:
        """Return the row with a primary key, or None."""
        return cls._session().get(cls, key)

    def save(self) -> Self:
        """Write the object to the database; the unit of work commits it. Returns the object."""
        session = self._session()
        session.add(self)
        session.flush()
        return self

    def delete(self) -> None:
        """Delete the object's row; the unit of work commits it."""
        session = self._session()
        session.delete(self)
        session.flush()


class UTCDateTime(TypeDecorator[datetime]):
    """A point in time, aware of its zone on every database; MariaDB and SQLite keep none."""

    impl = DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Refuse a time of no zone, and store it as UTC."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(
                f"this time has no time zone: use datetime.now(UTC)\n{link_to('time-without-zone')}"
            )
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Return the time as UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


def _now() -> datetime:
    return datetime.now(UTC)


class TimestampMixin:
    """Adds when a row was created and last changed, in UTC, by the clock of the application."""

    created_at: Mapped[datetime] = mapped_column(UTCDateTime, default=_now)
    updated_at: Mapped[datetime] = mapped_column(UTCDateTime, default=_now, onupdate=_now)
