"""Errors of the database that mean something to a client, as exceptions of Sanic.

"Exceptions" in Sanic's guide has what an app can do with them, and "Core Exceptions" in
SQLAlchemy's documentation those that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from inspect import isawaitable
from typing import Any, TypeVar, cast, overload

from sanic import Request, Sanic
from sanic.exceptions import BadRequest, NotFound, SanicException, ServiceUnavailable
from sanic.response import BaseHTTPResponse
from sqlalchemy import Select, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import (
    DataError,
    DBAPIError,
    NoResultFound,
    SQLAlchemyError,
    StatementError,
)
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from ..database import Database
from ..observers import Observer
from ..registry import databases_of, observers_of

T = TypeVar("T")


class UniqueViolation(SanicException):
    """409: there is a row with such a value already."""

    status_code = 409
    quiet = True
    message = "There is one already."


class ForeignKeyViolation(SanicException):
    """409, or what ``install`` was told: a row is missing that is referred to, or still needed."""

    status_code = 409
    quiet = True
    message = "It refers to something that is not there, or something refers to it."


class InvalidValue(BadRequest):
    """400: a value is too long, out of range, missing or against a rule of the table."""

    message = "A value is not valid."


class RowNotFound(NotFound):
    """404: there is no such row."""

    message = "It was not found."


class TransactionConflict(ServiceUnavailable):
    """503 with ``Retry-After``: the transaction lost against another one, and may be repeated."""

    quiet = True
    message = "It is in use. Try again."
    headers = {"Retry-After": "1"}  # noqa: RUF012


_OF_SQLSTATES: dict[Any, type[SanicException]] = {
    "23505": UniqueViolation,
    "23P01": UniqueViolation,
    "23503": ForeignKeyViolation,
    "23001": ForeignKeyViolation,
    "23502": InvalidValue,
    "23514": InvalidValue,
}
_OF_MYSQL: dict[Any, type[SanicException]] = {
    **dict.fromkeys((1062, 1586), UniqueViolation),
    **dict.fromkeys((1216, 1217, 1451, 1452), ForeignKeyViolation),
    # Without a value, too long, out of range, not of the type, against a CHECK.
    **dict.fromkeys((1048, 1364, 1406, 1264, 1265, 1292, 1366, 3819, 4025), InvalidValue),
}
_OF_SQLITE: dict[Any, type[SanicException]] = {
    **dict.fromkeys((1555, 2067, 2579), UniqueViolation),
    787: ForeignKeyViolation,
    **dict.fromkeys((275, 1299, 3091), InvalidValue),
}


def install(app: Sanic[Any, Any], *, foreign_key_status: int = 409) -> None:
    """Answer errors of the database as exceptions of this module, those of a COMMIT too.

    Each has the error of SQLAlchemy as its ``__cause__``; the client is told nothing of that. A
    handler of the app for one of them, or for a class of SQLAlchemy's such as ``IntegrityError``,
    wins. Other errors of the database stay what they are, for the client a 500.

    Args:
        app: the app.
        foreign_key_status: the status of :class:`ForeignKeyViolation`; 422 is another good one.
    """
    translation = _Translation(app, foreign_key_status)

    async def answer(request: Request, error: SQLAlchemyError) -> BaseHTTPResponse:
        exception = translation.exception(error)
        respond: Callable[..., Any] = app.error_handler.response
        if exception is None:
            respond = _next_handler(request, error)
        response = respond(request, exception or error)
        return cast(BaseHTTPResponse, await response if isawaitable(response) else response)

    app.error_handler.add(StatementError, answer)
    app.error_handler.add(NoResultFound, answer)
    observers_of(app).append(translation)


_OF_A_VALUE = (ValueError, TypeError, ArithmeticError)
"""What a driver, or a type of SQLAlchemy, raises for a value that it cannot send."""


class _Translation(Observer):
    """Tells the rest of the package what these answers are."""

    def __init__(self, app: Sanic[Any, Any], foreign_key_status: int) -> None:
        self._app = app
        self._foreign_key_status = foreign_key_status

    def exception(self, error: SQLAlchemyError) -> SanicException | None:
        exception = translated(self._app, error)
        if isinstance(exception, ForeignKeyViolation):
            exception.status_code = self._foreign_key_status
        return exception

    def status_of(self, error: BaseException) -> int | None:
        exception = self.exception(error) if isinstance(error, SQLAlchemyError) else None
        return None if exception is None else exception.status_code

    def engine_made(self, database: Database, engine: AsyncEngine, *, read_only: bool) -> None:
        # SQLAlchemy passes on what is no error of the DBAPI as it is, such as OverflowError of
        # SQLite.
        @event.listens_for(engine.sync_engine, "handle_error", retval=True)
        def refused(context: ExceptionContext) -> BaseException | None:
            error = context.original_exception
            if context.sqlalchemy_exception is not None or not isinstance(error, _OF_A_VALUE):
                return None
            return StatementError(str(error), context.statement, context.parameters, error)


def translated(app: Sanic[Any, Any], error: SQLAlchemyError) -> SanicException | None:
    """Return the exception of this module that an error stands for, or None.

    Args:
        app: the app, whose databases tell which errors are lost races.
        error: the error of SQLAlchemy.
    """
    kind: type[SanicException] | None
    if isinstance(error, NoResultFound):
        kind = RowNotFound
    elif any(database.backend.is_retryable(error) for database in databases_of(app).values()):
        kind = TransactionConflict
    else:
        kind = _kind(error) if isinstance(error, StatementError) else None
    if kind is None:
        return None
    exception = kind()
    exception.__cause__ = error
    return exception


def _kind(error: StatementError) -> type[SanicException] | None:
    driver_error: Any = error.orig
    if not isinstance(error, DBAPIError):
        return InvalidValue if isinstance(driver_error, _OF_A_VALUE) else None
    if code := getattr(driver_error, "sqlite_errorcode", None):
        return _OF_SQLITE.get(code)
    if found := _OF_MYSQL.get(driver_error.args[0] if driver_error.args else None):
        return found
    sqlstate = getattr(driver_error, "sqlstate", None) or ""
    # The whole class 22 is of data.
    if sqlstate[:2] == "22" or isinstance(error, DataError):
        return InvalidValue
    return _OF_SQLSTATES.get(sqlstate)


def is_invalid_value(error: StatementError) -> bool:
    """Whether a statement failed because of a value that it was given."""
    return _kind(error) is InvalidValue


def _next_handler(request: Request, error: SQLAlchemyError) -> Callable[..., Any]:
    """Return who would answer if this module did not: the app for all errors, or Sanic."""
    errors = request.app.error_handler
    general = errors.lookup(SQLAlchemyError(), request.route.name if request.route else None)
    return cast("Callable[..., Any]", general or errors.default)


@overload
def get_or_404(
    session: AsyncSession, model: type[T], key: Any, **options: Any
) -> Coroutine[Any, Any, T]: ...
@overload
def get_or_404(session: Session, model: type[T], key: Any, **options: Any) -> T: ...
def get_or_404(session: Any, model: type[Any], key: Any, **options: Any) -> Any:
    """Return an object by its primary key, as ``session.get`` does.

    Args:
        session: the session; with an ``AsyncSession`` the result has to be awaited.
        model: the class.
        key: the primary key; a tuple if it has several columns.
        **options: as of ``session.get``.

    Raises:
        RowNotFound: there is none; a 404, also where nothing is installed.
    """
    return _found(session.get(model, key, **options))


@overload
def one_or_404(session: AsyncSession, statement: Select[T]) -> Coroutine[Any, Any, T]: ...
@overload
def one_or_404(session: Session, statement: Select[T]) -> T: ...
def one_or_404(session: Any, statement: Select[Any]) -> Any:
    """Return the one object, or value, that a SELECT finds.

    Args:
        session: the session; with an ``AsyncSession`` the result has to be awaited.
        statement: a SELECT of one class or column.

    Raises:
        RowNotFound: it finds none; a 404, also where nothing is installed.
        MultipleResultsFound: it finds several, which is an error of the code.
    """
    result = session.scalars(statement)
    if isawaitable(result):
        return _one_awaited(result)
    return _found(result.one_or_none())


async def _one_awaited(result: Any) -> Any:
    return _found((await result).one_or_none())


def _found(value: Any) -> Any:
    if isawaitable(value):
        return _found_awaited(value)
    if value is None:
        raise RowNotFound
    return value


async def _found_awaited(value: Any) -> Any:
    return _found(await value)
