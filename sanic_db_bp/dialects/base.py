"""What every kind of database has to say of itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError

from ..exceptions import ConfigurationError

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine

    from ..settings import DatabaseSettings

CONNECT_TIMEOUT = 10
"""Seconds that one attempt to connect may take, where the URL does not say otherwise."""

DDL_LOCK = 0x5A41_4E1C
"""The number of the lock under which tables are created, one server at a time."""


@dataclass(frozen=True)
class Driver:
    """An asyncio driver: its name in a URL, the module it is, the extra that installs it."""

    name: str
    extra: str

    def missing(self) -> ConfigurationError | None:
        """Return the error that the driver's package cannot be imported, or None if it can."""
        try:
            import_module(self.name)
        except ImportError as error:
            # A psycopg that finds no libpq is there, and of no use.
            broken = not isinstance(error, ModuleNotFoundError)
            cause = f" (importing it failed: {error})" if broken else ""
            return ConfigurationError(
                f"the driver '{self.name}' is not installed. Install it with: "
                f"pip install 'sanic-db-bp[{self.extra}]'{cause}",
                entry="missing-driver",
            )
        return None


class Backend:
    """One kind of database, as SQLAlchemy's URLs call it."""

    name: ClassVar[str]
    spellings: ClassVar[frozenset[str]]
    drivers: ClassVar[tuple[Driver, ...]]
    one_writer: ClassVar[bool] = False
    """Whether one connection writes, and everybody else waits for it."""
    connection_limit: ClassVar[str | None] = None
    """The query for how many connections the server allows to the user, if it has a limit."""

    def resolve(self, url: URL) -> URL:
        """Return the URL with the asyncio driver to use.

        Raises:
            ConfigurationError: the driver is missing, is unknown, or would block the event loop.
        """
        _, _, asked_for = url.drivername.partition("+")
        driver = self._chosen(asked_for) if asked_for else self._first_installed()
        return url.set(drivername=f"{self.name}+{driver.name}")

    def _first_installed(self) -> Driver:
        errors = []
        for driver in self.drivers:
            error = driver.missing()
            if error is None:
                return driver
            errors.append(error)
        raise errors[0]

    def _chosen(self, name: str) -> Driver:
        # SQLAlchemy has psycopg_async for what create_async_engine takes psycopg for.
        wanted = name.removesuffix("_async")
        for driver in self.drivers:
            if driver.name == wanted:
                error = driver.missing()
                if error is not None:
                    raise error
                return driver
        usable = " or ".join(f"'{self.name}+{driver.name}'" for driver in self.drivers)
        raise ConfigurationError(
            f"the driver '{name}' is not an asyncio driver for {self.name}: it would block the "
            f"event loop. Write {usable}, or leave the driver out",
            entry="blocking-driver",
        )

    def check(self, url: URL) -> None:
        """Look whether what a URL asks for can be carried out.

        Raises:
            ConfigurationError: it cannot; without the URL's values, which may be secret.
        """

    def connect_args(
        self, url: URL, settings: DatabaseSettings, *, read_only: bool
    ) -> tuple[URL, dict[str, Any]]:
        """Return the URL and the driver's keyword arguments that carry out the settings."""
        raise NotImplementedError

    def engine_options(self, settings: DatabaseSettings, *, read_only: bool) -> dict[str, Any]:
        """Return what ``create_async_engine`` has to be told for this database alone."""
        return {}

    def with_users(self, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        """Return the connect arguments together with those of ``CONNECT_ARGS``, which win."""
        return {**ours, **theirs}

    def prepare(self, engine: Engine, settings: DatabaseSettings, *, read_only: bool) -> None:
        """Register the listeners that set up each connection and each transaction."""

    def is_closed(self, driver_connection: Any) -> bool:
        """Whether an idle connection is known to be dead, without asking the server."""
        raise NotImplementedError

    @contextmanager
    def ddl_lock(self, connection: Connection) -> Iterator[None]:
        """Hold off every other server that creates tables, for the length of the block."""
        yield

    def is_retryable(self, error: BaseException) -> bool:
        """Whether a transaction failed only because of another, and would succeed if run again."""
        driver_error = error.orig if isinstance(error, DBAPIError) else None
        return driver_error is not None and self._lost_a_race(driver_error)

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        raise NotImplementedError

    def may_end_transaction(self, connection: Connection, driver_error: BaseException) -> bool:
        """Whether a statement that failed so may have ended its transaction without a word."""
        return True

    def is_whole(self, dbapi_connection: Any) -> bool:
        """Whether COMMIT would keep all that was done since BEGIN; asked after such a failure."""
        return False


def last_value(value: Any) -> Any:
    """Return the value of a parameter of a URL, or the last if it has several."""
    return value[-1] if isinstance(value, tuple) else value


def in_milliseconds(seconds: float) -> str:
    """Return a time as whole milliseconds, one at least: servers take 0 for no limit."""
    return str(max(1, round(seconds * 1000)))


def execute_each(dbapi_connection: Any, statements: list[str]) -> None:
    """Execute statements on a new connection, before SQLAlchemy uses it."""
    cursor = dbapi_connection.cursor()
    for statement in statements:
        cursor.execute(statement)


def in_autocommit(connection: Connection) -> bool:
    """Whether each statement of a connection is a transaction of its own."""
    return connection.get_execution_options().get("isolation_level") == "AUTOCOMMIT"
