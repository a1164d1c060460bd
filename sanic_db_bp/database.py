"""The database of an app: its engines, sessions outside requests, and its end."""

from __future__ import annotations

import asyncio
import inspect
import logging
import shutil
import tempfile
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar, cast

from sqlalchemy import Connection, MetaData, event, text
from sqlalchemy import inspect as inspection
from sqlalchemy.engine import URL
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, AsyncSession
from sqlalchemy.orm import Session

from .bridge import run_in_bridge
from .connections.pool import PoolStatus, close_connections, status_of
from .dialects import Backend, backend_of, is_memory, parse_url
from .end_of_loop import EndOfLoop
from .engine import make_engine, share_of
from .exceptions import ConfigurationError, DatabaseUnavailable, SessionError
from .live_units import LiveUnits
from .observers import FindOrigin, Observer
from .sessions import AsyncReadSession, ReadSession, SessionFactory
from .settings import DatabaseSettings
from .unit_of_work import SessionForm, UnitOfWork, enter_block, leave_block

logger = logging.getLogger("sanic.root.db")

P = ParamSpec("P")
T = TypeVar("T")

SHORTEST_ATTEMPT = 1.0
"""Seconds that the last attempt to reach a database at the start has at least."""

RETRY_EVERY = 0.25
"""Seconds between two attempts to reach a database that is coming up."""

_MADE_OF_SETTINGS = (
    "settings",
    "commits_automatically",
    "url",
    "engine",
    "read_engine",
    "factory",
    "read_factory",
)
"""What a database forgets when it is disposed, and makes anew of the settings of its next start."""


class Database:
    """One database: engines, session factories, and what uses them.

    In an app the blueprint makes it and puts it at ``app.ctx.db``; a script makes its own. Nothing
    connects before a session is first used.

    Args:
        settings: what the database is, or a function that returns it when it is first needed; by
            default taken from the environment.
        name: the name in errors and logs.
        session_class: the plain session class, a subclass of ``sqlalchemy.orm.Session``.
        async_session_class: the asyncio session class.
        read_session_class: the plain class for reading.
        async_read_session_class: the asyncio class for reading.
        default_url: the database if the settings name none.
        workers: among how many processes ``MAX_CONNECTIONS`` is divided.
        origin: tells on whose behalf the current code runs, for the log.
        observers: who adds events to what is made here; more may come until it is first used.
    """

    def __init__(
        self,
        settings: DatabaseSettings | Callable[[], DatabaseSettings] = DatabaseSettings,
        *,
        name: str = "db",
        session_class: type[Session] = Session,
        async_session_class: type[AsyncSession] = AsyncSession,
        read_session_class: type[ReadSession] = ReadSession,
        async_read_session_class: type[AsyncReadSession] = AsyncReadSession,
        default_url: str = "sqlite:///app.db",
        workers: int = 1,
        origin: FindOrigin = lambda: None,
        observers: list[Observer] | None = None,
    ) -> None:
        self.name = name
        self.observers = [] if observers is None else observers
        self._origin = origin
        self._load = settings if callable(settings) else lambda: settings
        self.classes: dict[SessionForm, type[Session | AsyncSession]] = {
            "session": session_class,
            "async_session": async_session_class,
            "read_session": read_session_class,
            "async_read_session": async_read_session_class,
        }
        self._classes = session_class, async_session_class
        self._read_classes = read_session_class, async_read_session_class
        self.workers = workers
        # Set by the MigrationsBlueprint.
        self.find_pending: Callable[[Connection], Sequence[str]] | None = None
        self._default_url = default_url
        self._scratch: Path | None = None
        self.live_units = LiveUnits()
        self._end = EndOfLoop(self.dispose)

    def __repr__(self) -> str:
        return f"<Database {self.name}: {self.url}>"

    @cached_property
    def settings(self) -> DatabaseSettings:
        """The settings in force."""
        return self._load()

    @cached_property
    def url(self) -> URL:
        """The URL with the driver in use; as a string it has no password."""
        return self.settings.connection_url() or parse_url(self._default_url)

    @property
    def backend(self) -> Backend:
        """What kind of database it is."""
        return backend_of(self.url)

    @cached_property
    def engine(self) -> AsyncEngine:
        """The read-write engine."""
        return self._make_engine(self._stored(self.url), read_only=False)

    @cached_property
    def read_engine(self) -> AsyncEngine:
        """The read-only engine, with connections of its own."""
        url = self.settings.connection_url(read_only=True) or self.url
        return self._make_engine(self._stored(url), read_only=True)

    def _make_engine(self, url: URL, *, read_only: bool) -> AsyncEngine:
        engine = make_engine(
            self.settings,
            url,
            name=self.name,
            read_only=read_only,
            connections=share_of(self.settings, self.workers, read_only=read_only),
            origin=self._origin,
        )
        for observer in self.observers:
            observer.engine_made(self, engine, read_only=read_only)
        event.listen(engine.sync_engine, "connect", self._end.comes_with_the_loop)
        return engine

    async def allowed_connections(self) -> int | None:
        """Ask the server how many connections it allows to the user of the URL.

        Returns:
            None if there is no limit, or, behind PgBouncer, none that could be asked for.
        """
        limit = None if self.settings.pgbouncer else self.backend.connection_limit
        if limit is None:
            return None
        async with self.engine.connect() as connection:
            return cast("int | None", await connection.scalar(text(limit)))

    def _stored(self, url: URL) -> URL:
        if not is_memory(url):
            return url
        # Several connections cannot share SQLite's memory safely; a private file they can.
        if self._scratch is None:
            self._scratch = Path(tempfile.mkdtemp(prefix="sanic-db-"))
            weakref.finalize(self, shutil.rmtree, self._scratch, ignore_errors=True)
        return url.set(database=str(self._scratch / f"{self.name}.db"))

    @cached_property
    def factory(self) -> SessionFactory:
        """Makes the read-write sessions."""
        return self._observed(
            SessionFactory(
                self.engine, *self._classes, expire_on_commit=self.settings.expire_on_commit
            ),
            read_only=False,
        )

    @cached_property
    def read_factory(self) -> SessionFactory:
        """Makes the read sessions."""
        return self._observed(
            SessionFactory(self.read_engine, *self._read_classes, expire_on_commit=False),
            read_only=True,
        )

    def _observed(self, factory: SessionFactory, *, read_only: bool) -> SessionFactory:
        for observer in self.observers:
            observer.session_class_made(self, factory.session_class, read_only=read_only)
        return factory

    @cached_property
    def commits_automatically(self) -> bool:
        """Whether what a handler did is committed when it succeeds."""
        return self.settings.commit == "auto"

    def form_of(self, session_class: type[Session | AsyncSession]) -> SessionForm | None:
        """Return which form of a unit of work's sessions a class stands for, if any."""
        for form, own_class in self.classes.items():
            if own_class is session_class:
                return form
        return None

    def unit_of_work(
        self, *, isolation_level: str | None = None, plain: bool = False
    ) -> UnitOfWork:
        """Return a new unit of work; whoever asks for it must end it.

        Raises:
            ConfigurationError: the database has no such isolation level.
        """
        if isolation_level is not None:
            self.check_isolation_level(isolation_level)
        return UnitOfWork(self, isolation_level=isolation_level, plain=plain)

    def check_isolation_level(self, level: str, wanted_by: str = "session") -> None:
        """Refuse an isolation level before a connection is taken that SQLAlchemy would lose.

        Args:
            level: the isolation level.
            wanted_by: what asks for it, for the error.

        Raises:
            ConfigurationError: the database has no such level.
        """
        no_connection: Any = None
        known = self.engine.dialect.get_isolation_level_values(no_connection)
        if level.replace("_", " ") not in known:
            raise ConfigurationError(
                f"The {wanted_by} asks for the isolation level '{level}', and the database "
                f"'{self.name}' has no such level. There are: {', '.join(known)}.",
                entry="unknown-isolation-level",
            )

    @asynccontextmanager
    async def session(self, *, isolation_level: str | None = None) -> AsyncIterator[AsyncSession]:
        """Open a unit of work of its own, for work outside of requests.

        Committed at the end of the block, rolled back if it raises. ``current_session()`` finds
        the session inside the block.

        Args:
            isolation_level: of its transaction, if not the engine's.

        Raises:
            ConfigurationError: the database has no such isolation level.
            DatabaseUnavailable: the database does not answer, or the pool is exhausted.
        """
        async with self.block(isolation_level=isolation_level) as unit:
            yield unit.async_session

    @asynccontextmanager
    async def read_session(self) -> AsyncIterator[AsyncReadSession]:
        """Open a read session for a block."""
        async with self.block() as unit:
            yield unit.async_read_session

    async def run_sync(
        self, function: Callable[Concatenate[Session, P], T], *args: P.args, **kwargs: P.kwargs
    ) -> T:
        """Call ``function(session, *args)`` with a plain session in a unit of work of its own.

        Committed when the function returns, rolled back if it raises. The event loop is not
        blocked meanwhile.

        Returns:
            What the function returns.

        Raises:
            SessionError: it is a coroutine function; nothing was done.
        """
        if inspect.iscoroutinefunction(function):
            called = getattr(function, "__qualname__", function)
            raise SessionError(
                f"run_sync calls plain functions, and '{called}' is a coroutine "
                f"function. Write 'async with app.ctx.{self.name}.session() as session', and await "
                "it there.",
                entry="coroutine-function-in-run-sync",
            )
        async with self.block(plain=True) as unit:
            return await run_in_bridge(function, unit.session, *args, **kwargs)

    @asynccontextmanager
    async def block(
        self, *, isolation_level: str | None = None, plain: bool = False
    ) -> AsyncIterator[UnitOfWork]:
        """Open a unit of work for a block, with all its sessions; see :meth:`session`."""
        unit = self.unit_of_work(isolation_level=isolation_level, plain=plain)
        unit.task = asyncio.current_task()
        token = enter_block(self.name, unit)
        try:
            yield unit
        except BaseException:
            await run_in_bridge(unit.rollback)
            raise
        else:
            await run_in_bridge(unit.commit)
        finally:
            leave_block(token)

    async def ping(self) -> float:
        """Ask the database for an answer.

        Returns:
            The seconds that it took.

        Raises:
            DatabaseUnavailable: it did not answer.
        """
        clock = asyncio.get_running_loop().time
        start = clock()
        try:
            async with self.engine.connect() as connection:
                await connection.execute(text("SELECT 1"))
        except DatabaseUnavailable:
            raise
        except (SQLAlchemyError, OSError) as error:
            cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            raise DatabaseUnavailable(self.name, f"{type(error).__name__}: {cause}") from error
        return clock() - start

    def pool_status(self) -> PoolStatus:
        """Return how the connections of the read-write pool are used at this moment."""
        return status_of(self.engine)

    def read_pool_status(self) -> PoolStatus | None:
        """Return the same of the read pool, or None while no read session was ever used."""
        return status_of(self.read_engine) if "read_engine" in self.__dict__ else None

    async def wait_until_up(self) -> None:
        """Wait for a database that is coming up, at most ``STARTUP_TIMEOUT`` seconds.

        One connection is open afterwards, so that the first request need not open it.

        Raises:
            DatabaseUnavailable: it did not come up.
        """
        clock = asyncio.get_running_loop().time
        deadline = clock() + self.settings.startup_timeout
        told = False
        while True:
            try:
                async with asyncio.timeout(max(deadline - clock(), SHORTEST_ATTEMPT)):
                    await self.ping()
                return
            except TimeoutError:
                raise DatabaseUnavailable(self.name, "no answer in STARTUP_TIMEOUT") from None
            except DatabaseUnavailable as error:
                if clock() >= deadline:
                    raise
                if not told:
                    logger.warning("%s: waiting for it to come up", error.message)
                    told = True
                await asyncio.sleep(RETRY_EVERY)

    async def create_missing_tables(self, metadata: MetaData) -> None:
        """Create the tables that are missing; of several servers that start, one creates them."""
        async with self.engine.begin() as connection:
            await connection.run_sync(self._create_missing_tables, metadata)

    def _create_missing_tables(self, connection: Connection, metadata: MetaData) -> None:
        with self.backend.ddl_lock(connection):
            existing = inspection(connection)
            if not all(
                existing.has_table(table.name, schema=table.schema)
                for table in metadata.tables.values()
            ):
                metadata.create_all(connection)

    async def pending_migrations(self, connection: AsyncConnection | None = None) -> Sequence[str]:
        """Return the migrations that the database lacks, in the order in which they would run.

        Args:
            connection: where to ask; by default one of the read-write pool.

        Raises:
            ConfigurationError: the app has no ``MigrationsBlueprint`` for the database.
        """
        if self.find_pending is None:
            raise ConfigurationError(
                f"Nothing knows the migrations of '{self.name}'. Register "
                "sanic_db_bp.contrib.migrations.MigrationsBlueprint(...) with the app.",
                entry="unknown-migrations",
            )
        if connection is not None:
            return await connection.run_sync(self.find_pending)
        async with self.engine.connect() as own:
            return await own.run_sync(self.find_pending)

    def retried(self) -> None:
        """Tell the observers that a transaction runs again."""
        for observer in self.observers:
            observer.retried(self)

    async def dispose(self, *, within: float = 5.0) -> None:
        """Wait for the units of work that are under way, then close every connection.

        Args:
            within: seconds to wait for them; what is left then is cut off.
        """
        end, self._end = self._end, EndOfLoop(self.dispose)
        await self.live_units.drain(within)
        await asyncio.gather(*(close_connections(engine) for engine in self._engines()))
        if self._scratch is not None:
            shutil.rmtree(self._scratch, ignore_errors=True)
            self._scratch = None
        for name in _MADE_OF_SETTINGS:
            self.__dict__.pop(name, None)
        await end.is_of_no_interest()

    def _engines(self) -> list[AsyncEngine]:
        names = ("engine", "read_engine")
        return [cast(AsyncEngine, self.__dict__[name]) for name in names if name in self.__dict__]
