"""One line registers a database with an app; the blueprint opens and closes it."""

import asyncio
import logging
import sqlite3
from collections.abc import Callable
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
from sanic import Blueprint, HTTPResponse, Request, Sanic, empty, json, text
from sanic.exceptions import ServiceUnavailable
from sanic.response import BaseHTTPResponse
from sanic.worker.multiplexer import WorkerMultiplexer
from sqlalchemy import Column, Integer, MetaData, String, Table, inspect, literal, select
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.types import UserDefinedType

from sanic_db_bp import (
    AsyncReadSession,
    ConfigurationError,
    Database,
    DatabaseBlueprint,
    DatabaseSettings,
    DatabaseUnavailable,
    InvalidSettings,
    ReadSession,
    db_bp,
    transactional,
)
from tests.serving import serving

App = Sanic[Any, Any]

SECRET = "s3cr3t-pass"


class Base(DeclarativeBase):
    """The tables of these tests."""


class Note(Base):
    """A text."""

    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(50), unique=True)


class ReportsSession(Session):
    """The plain session of a second database."""


class ReportsAsyncSession(AsyncSession):
    """The asyncio session of a second database."""


class ReportsReadSession(ReadSession):
    """The plain read session of a second database."""


class ReportsAsyncReadSession(AsyncReadSession):
    """The asyncio read session of a second database."""


REPORTS_CLASSES: dict[str, Any] = {
    "session_class": ReportsSession,
    "async_session_class": ReportsAsyncSession,
    "read_session_class": ReportsReadSession,
    "async_read_session_class": ReportsAsyncReadSession,
}


@pytest.fixture(autouse=True)
def _own_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)


async def notes_of(database: Database) -> list[str]:
    """Return what was committed, as another connection sees it."""
    async with database.read_session() as session:
        return list(await session.scalars(select(Note.text).order_by(Note.id)))


# --- One line


async def test_one_line_gives_an_app_a_database(tmp_path: Path) -> None:
    """Without any setting there is a SQLite file with the name of the app."""
    app: App = Sanic("shop")
    app.blueprint(db_bp)

    @app.get("/")
    async def handler(request: Request, session: Session) -> HTTPResponse:
        return text(str(session.scalar(select(1))))

    async with serving(app) as client:
        assert isinstance(app.ctx.db, Database)
        assert (await client.get("/")).text == "1"
    assert (tmp_path / "shop.db").exists()


async def test_the_engine_is_disposed_at_the_stop_and_made_anew_at_the_next_start() -> None:
    """No connection is left after ``after_server_stop``."""
    app: App = Sanic("shop")
    app.blueprint(db_bp)
    engines = []
    for _ in range(2):
        async with serving(app):
            engines.append(app.ctx.db.engine)
            assert app.ctx.db.pool_status()["idle"] == 1
        assert engines[-1].pool.checkedin() == 0
    assert engines[0] is not engines[1]


async def test_one_connection_is_open_before_serving() -> None:
    """The first request need not wait for one."""
    app: App = Sanic("shop")
    app.blueprint(db_bp)
    seen = []

    @app.after_server_start
    async def look(app: App) -> None:
        seen.append(app.ctx.db.pool_status())

    async with serving(app):
        assert seen == [{"size": 1, "checked_out": 0, "idle": 1, "overflow": 0}]


async def test_the_apps_own_listeners_use_the_database() -> None:
    """At the default priority it is open, from before the start to before the stop."""
    app: App = Sanic("shop")
    found = []

    @app.before_server_start
    async def before_start(app: App) -> None:
        async with app.ctx.db.session() as session:
            session.add(Note(text="start"))

    app.blueprint(DatabaseBlueprint(metadata=Base.metadata, create_tables=True))

    @app.before_server_stop
    async def before_stop(app: App) -> None:
        found.append(await notes_of(app.ctx.db))

    @app.after_server_stop
    async def after_stop(app: App) -> None:
        found.append(await notes_of(app.ctx.db))

    async with serving(app):
        assert await notes_of(app.ctx.db) == ["start"]
    assert found == [["start"], ["start"]]


async def test_the_log_says_which_database_and_masks_the_password(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The URL is logged with the driver in use, with ``***`` for the password."""
    app: App = Sanic("shop")
    url = f"postgres://me:{SECRET}@127.0.0.1:1/shop"
    app.blueprint(DatabaseBlueprint(url=url, startup_timeout=0))
    with caplog.at_level(logging.DEBUG), pytest.raises(DatabaseUnavailable) as caught:
        async with serving(app):
            pass
    assert "database db: postgresql+asyncpg://me:***@127.0.0.1:1/shop" in caplog.text
    assert SECRET not in caplog.text
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(app.ctx.db)
    assert SECRET not in str(app.ctx.db.settings)


async def test_a_failed_start_leaves_no_connection(tmp_path: Path) -> None:
    """When tables cannot be created, the connection that was opened is closed again."""
    wrong = MetaData()

    class Broken(UserDefinedType[str]):
        cache_ok = True

        def get_col_spec(self, **_: Any) -> str:
            return "((("

    Table("wrong", wrong, Column("id", Broken()))
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(metadata=wrong, create_tables=True))
    with pytest.raises(OperationalError):
        async with serving(app):
            pass
    assert app.ctx.db.pool_status()["idle"] == 0


async def test_a_listener_that_fails_after_the_opening_leaves_no_connection() -> None:
    """When something else stops the start, ``dispose()`` still closes everything."""
    app: App = Sanic("shop")
    app.blueprint(db_bp)

    @app.before_server_start
    async def fail(app: App) -> None:
        raise RuntimeError("failed")

    with pytest.raises(RuntimeError, match="failed"):
        async with serving(app):
            pass
    await app.ctx.db.dispose()


# --- Registration


def test_registering_twice_is_a_clear_error() -> None:
    """The same blueprint is refused with the remedy; another one of its name, by Sanic."""
    app: App = Sanic("shop")
    app.blueprint(db_bp)
    with pytest.raises(ConfigurationError) as caught:
        app.blueprint(db_bp)
    assert "'db' is registered with the app 'shop' already" in str(caught.value)
    assert "another name" in str(caught.value)
    with pytest.raises(AssertionError, match="must be unique"):
        app.blueprint(DatabaseBlueprint())


def test_a_taken_name_on_the_context_is_refused() -> None:
    """What the app keeps at ``app.ctx.<name>`` is not overwritten."""
    app: App = Sanic("shop")
    app.ctx.db = "mine"
    with pytest.raises(ConfigurationError, match=r"app\.ctx\.db is something else already"):
        app.blueprint(DatabaseBlueprint())
    assert app.ctx.db == "mine"


@pytest.mark.parametrize("name", ["reports-eu", "class"])
def test_a_name_that_no_variable_can_have_is_refused(name: str) -> None:
    """The database would be out of reach for code and for the environment, a copy's too."""
    app: App = Sanic("shop")
    with pytest.raises(ConfigurationError, match=f"'{name}' cannot be the name of a database"):
        app.blueprint(db_bp.copy(name))


async def test_one_blueprint_serves_two_apps() -> None:
    """Each app has a database of its own."""
    bp = DatabaseBlueprint(metadata=Base.metadata, create_tables=True)
    apps: list[App] = [Sanic("first"), Sanic("second")]
    for app in apps:
        app.blueprint(bp)
    async with serving(apps[0]), serving(apps[1]):
        assert apps[0].ctx.db is not apps[1].ctx.db
        async with apps[0].ctx.db.session() as session:
            session.add(Note(text="first"))
        assert await notes_of(apps[0].ctx.db) == ["first"]
        assert await notes_of(apps[1].ctx.db) == []


async def test_routes_of_the_blueprint_itself_work() -> None:
    """It is a Blueprint: routes and listeners may be added, before and after."""
    app: App = Sanic("shop")
    bp = DatabaseBlueprint()
    ran: list[str] = []

    @bp.get("/early")
    async def early(request: Request, session: Session) -> HTTPResponse:
        return text(str(session.scalar(select(1))))

    @bp.on_request
    async def middleware(request: Request) -> None:
        ran.append("middleware")

    app.blueprint(bp)

    @bp.get("/late")
    async def late(request: Request, session: AsyncSession) -> HTTPResponse:
        return text(str(await session.scalar(select(literal(2)))))

    @bp.before_server_start
    async def listener(app: App) -> None:
        ran.append("listener")

    async with serving(app) as client:
        assert (await client.get("/early")).text == "1"
        assert (await client.get("/late")).text == "2"
        assert app.ctx.db.pool_status()["idle"] == 1
    assert ran == ["listener", "middleware"], "Sanic binds middleware to the routes of the time"


async def test_a_group_registers_it_like_any_blueprint() -> None:
    """``Blueprint.group`` with other blueprints, prefixes and versions."""
    app: App = Sanic("shop")
    other = Blueprint("other", url_prefix="/other")

    @other.get("/")
    async def handler(request: Request, session: Session) -> HTTPResponse:
        return text(str(session.scalar(select(1))))

    app.blueprint(Blueprint.group(DatabaseBlueprint(), other, url_prefix="/api", version=1))
    async with serving(app) as client:
        assert (await client.get("/v1/api/other/")).text == "1"


async def test_a_list_of_blueprints_registers_it() -> None:
    """``app.blueprint([db_bp, other])``."""
    app: App = Sanic("shop")
    app.blueprint([DatabaseBlueprint(), Blueprint("other")])
    async with serving(app):
        assert await app.ctx.db.ping() > 0


async def test_a_copy_is_a_database_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """``bp.copy(name)`` has the settings, the place and the name of the copy."""
    monkeypatch.setenv("SANIC_LIBRARY_URL", "sqlite:///books.db")
    app: App = Sanic("shop")
    copy = DatabaseBlueprint(metadata=Base.metadata, create_tables=True).copy("library")
    app.blueprint(copy)

    @app.get("/")
    async def handler(request: Request, session: Session) -> HTTPResponse:
        session.add(Note(text="x"))
        return empty()

    async with serving(app) as client:
        assert (await client.get("/")).status_code == 204
        assert app.ctx.library.url.database == "books.db"
        assert await notes_of(app.ctx.library) == ["x"]
        assert not hasattr(app.ctx, "db")


async def test_a_copy_has_the_tables_that_are_defined_after_it() -> None:
    """The copy shares the metadata with the original, it does not copy that too."""
    metadata = MetaData()
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(metadata=metadata, create_tables=True).copy("library"))
    Table("late", metadata, Column("id", Integer, primary_key=True))

    def tables(session: Session) -> list[str]:
        return inspect(session.connection()).get_table_names()

    async with serving(app):
        assert await app.ctx.library.run_sync(tables) == ["late"]


async def test_a_copy_beside_its_original() -> None:
    """A blueprint and its copy on two apps do not disturb each other."""
    original = DatabaseBlueprint(metadata=Base.metadata, create_tables=True)
    first: App = Sanic("first")
    second: App = Sanic("second")
    first.blueprint(original)
    second.blueprint(original.copy("other"))
    async with serving(first), serving(second):
        assert first.ctx.db.name == "db"
        assert second.ctx.other.name == "other"
        assert await notes_of(second.ctx.other) == []


# --- Settings


def test_unknown_settings_are_refused_where_they_are_written() -> None:
    """A misspelt argument is an error of its own line, which lists the right names."""
    with pytest.raises(ConfigurationError, match="pool_sise: no such setting") as caught:
        DatabaseBlueprint(pool_sise=3)
    assert "pool_size" in str(caught.value)


def test_settings_and_single_values_exclude_each_other() -> None:
    """Nobody need ask which of them wins."""
    with pytest.raises(ConfigurationError, match="not both"):
        DatabaseBlueprint(settings=DatabaseSettings(), pool_size=3)


async def test_settings_may_be_given_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """``settings=DatabaseSettings(...)`` stands in place of the environment."""
    monkeypatch.setenv("SANIC_DB_URL", "sqlite:///environment.db")
    settings = DatabaseSettings(url="sqlite:///given.db")
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(settings=settings))
    async with serving(app):
        assert app.ctx.db.settings is settings
        assert app.ctx.db.url.database == "given.db"


async def test_arguments_win_over_config_and_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Arguments in code > ``app.config`` set in code > environment > ``DATABASE_URL``."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///plain.db")
    for name, value in {"POOL_TIMEOUT": "1", "POOL_RECYCLE": "1", "ECHO": "false"}.items():
        monkeypatch.setenv(f"SANIC_DB_{name}", value)
    app: App = Sanic("shop")
    app.config.DB_POOL_TIMEOUT = 2
    app.config.DB_POOL_RECYCLE = 2
    app.blueprint(DatabaseBlueprint(pool_timeout=3))
    async with serving(app):
        settings = app.ctx.db.settings
        assert (settings.pool_timeout, settings.pool_recycle, settings.echo) == (3, 2, False)
        assert app.ctx.db.url.database == "plain.db"


@pytest.mark.parametrize("when", ["before", "after"])
def test_config_set_in_code_wins_and_its_secrets_leave_it(
    monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """``app.config.DB_*`` counts before and after the registration; the URL does not stay there."""
    monkeypatch.setenv("SANIC_DB_URL", "postgresql://me@environment/shop")
    app: App = Sanic("shop")

    def configure() -> None:
        app.config.DB_URL = f"postgresql://me:{SECRET}@code/shop"
        app.config.DB_PASSWORD = SECRET
        app.config.DB_READ_URL = f"postgresql://me:{SECRET}@replica/shop"
        app.config.DB_POOL_TIMEOUT = 4
        app.config.DB_CONNECT_ARGS = {"password": SECRET}

    if when == "before":
        configure()
    app.blueprint(DatabaseBlueprint())
    if when == "after":
        configure()
    settings = app.ctx.db.settings
    assert app.ctx.db.url.host == "code"
    assert settings.read_url.host == "replica"
    assert settings.password.get_secret_value() == SECRET
    assert settings.connect_args == {"password": SECRET}
    assert settings.pool_timeout == 4
    assert SECRET not in str(app.config)
    for name in ("URL", "PASSWORD", "READ_URL", "CONNECT_ARGS"):
        assert f"DB_{name}" not in app.config
    assert app.config.DB_POOL_TIMEOUT == 4


def test_secrets_from_the_environment_leave_the_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Sanic copies ``SANIC_*`` into ``app.config``, and makes 0123 a number; here neither stays."""
    monkeypatch.setenv("SANIC_DB_URL", "postgresql://me@environment/shop")
    monkeypatch.setenv("SANIC_DB_PASSWORD", "0123")
    app: App = Sanic("shop")
    assert app.config.DB_PASSWORD == 123
    app.blueprint(DatabaseBlueprint())
    assert "DB_URL" not in app.config
    assert "DB_PASSWORD" not in app.config
    assert app.ctx.db.url.host == "environment"
    assert app.ctx.db.url.password == "0123"


def test_a_password_does_not_disturb_a_sqlite_url() -> None:
    """SQLite has no users: a password that is set for another deployment does no harm."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(url="sqlite:///shop.db", password=SECRET))
    assert app.ctx.db.engine.url.database == "shop.db"


async def test_a_prefix_of_the_apps_own_environment_counts_as_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Variables that ``Sanic(env_prefix=...)`` puts into ``app.config`` are found there."""
    monkeypatch.setenv("SHOP_DB_URL", "sqlite:///prefix.db")
    app: App = Sanic("shop", env_prefix="SHOP_")
    app.blueprint(DatabaseBlueprint())
    async with serving(app):
        assert app.ctx.db.url.database == "prefix.db"
        assert "DB_URL" not in app.config


async def test_wrong_settings_are_all_told_by_their_variables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The start fails with every wrong variable, and no value."""
    monkeypatch.setenv("SANIC_REPORTS_URL", f"nonsense-{SECRET}")
    monkeypatch.setenv("SANIC_REPORTS_POOL_SIZE", "0")
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint("reports"))
    with pytest.raises(InvalidSettings) as caught:
        async with serving(app):
            pass
    message = str(caught.value)
    assert "SANIC_REPORTS_URL" in message
    assert "SANIC_REPORTS_POOL_SIZE" in message
    assert SECRET not in message


async def test_the_connections_are_divided_among_the_workers() -> None:
    """``MAX_CONNECTIONS`` is of the whole server."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(url="sqlite:///shop.db", max_connections=12))

    @app.listener("before_server_start", priority=2000)
    async def as_one_of_three_workers(app: App) -> None:
        app.state.workers = 3

    async with serving(app):
        assert app.ctx.db.workers == 3


async def test_a_worker_counts_those_that_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """It only knows the processes beside it, and not every one of them serves."""
    monkeypatch.setenv("SANIC_WORKER_NAME", "Sanic-Server-1-0")
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(url="sqlite:///shop.db", max_connections=12))
    processes = {f"Sanic-Server-{number}-0": {"server": True} for number in range(2)}
    others = {"Sanic-Main": {}, "Sanic-Reloader-0": {"server": False}}
    reading, writing = Pipe(duplex=False)
    with reading, writing:
        app.multiplexer = WorkerMultiplexer(writing, {**others, **processes})
        async with serving(app):
            assert app.ctx.db.workers == 2


# --- Tables


async def test_missing_tables_are_created_if_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """``CREATE_TABLES`` is off by default, and keeps what is there."""

    def tables(session: Session) -> list[str]:
        return inspect(session.connection()).get_table_names()

    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(metadata=Base.metadata))
    async with serving(app):
        assert await app.ctx.db.run_sync(tables) == []
    monkeypatch.setenv("SANIC_DB_CREATE_TABLES", "true")
    for expected in ([], ["kept"]):
        async with serving(app):
            assert await app.ctx.db.run_sync(tables) == ["note"]
            assert await notes_of(app.ctx.db) == expected
            if not expected:
                async with app.ctx.db.session() as session:
                    session.add(Note(text="kept"))


async def test_create_tables_without_metadata_creates_nothing() -> None:
    """The setting alone does no harm."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(create_tables=True))
    async with serving(app):
        assert await app.ctx.db.ping() > 0


# --- Several databases


@pytest.fixture
def two(monkeypatch: pytest.MonkeyPatch) -> App:
    """An app with a second database, both from the environment."""
    for name in ("DB", "REPORTS"):
        monkeypatch.setenv(f"SANIC_{name}_URL", f"sqlite:///{name.lower()}-file.db")
        monkeypatch.setenv(f"SANIC_{name}_CREATE_TABLES", "true")
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(metadata=Base.metadata))
    app.blueprint(DatabaseBlueprint("reports", metadata=Base.metadata, **REPORTS_CLASSES))
    return app


async def test_one_handler_uses_two_databases_and_each_commits_its_own(two: App) -> None:
    """Each session writes into its own database; an error status rolls back both."""

    @two.post("/async/<status:int>")
    async def in_async(
        request: Request, status: int, session: AsyncSession, reports: ReportsAsyncSession
    ) -> HTTPResponse:
        session.add(Note(text="db"))
        reports.add(Note(text="reports"))
        await session.flush()
        await reports.flush()
        return json([type(session).__name__, type(reports).__name__], status)

    @two.post("/plain/<status:int>")
    def in_plain(
        request: Request, status: int, reports: ReportsSession, session: Session
    ) -> HTTPResponse:
        session.add(Note(text="plain db"))
        reports.add(Note(text="plain reports"))
        session.flush()
        reports.flush()
        return empty(status)

    async with serving(two) as client:
        for path in ("async", "plain"):
            assert (await client.post(f"/{path}/400")).status_code == 400
            assert await notes_of(two.ctx.db) == await notes_of(two.ctx.reports) == []
        response = await client.post("/async/200")
        assert response.json() == ["AsyncSession", "ReportsAsyncSession"]
        assert (await client.post("/plain/204")).status_code == 204
        assert await notes_of(two.ctx.db) == ["db", "plain db"]
        assert await notes_of(two.ctx.reports) == ["reports", "plain reports"]


async def test_a_commit_that_fails_rolls_back_the_other_database_too(two: App) -> None:
    """At once, also if no handler used them, and not when the connection ends."""

    @two.get("/")
    async def handler(request: Request) -> HTTPResponse:
        return empty()

    @two.middleware("response")
    async def after(request: Request, response: BaseHTTPResponse) -> None:
        request.ctx.session.add_all([Note(text="twice"), Note(text="twice")])
        request.ctx.reports_session.add(Note(text="reports"))
        await request.ctx.reports_session.flush()

    async with serving(two) as client:
        assert (await client.get("/")).status_code == 500
        assert two.ctx.reports.pool_status()["checked_out"] == 0
        assert await notes_of(two.ctx.db) == await notes_of(two.ctx.reports) == []


async def test_a_handler_of_two_databases_is_tried_again_as_often_as_it_says(two: App) -> None:
    """Each handler is wrapped once, however many databases the app has."""
    runs: list[int] = []

    @two.post("/")
    @transactional(retries=1)
    async def handler(request: Request, session: Session) -> HTTPResponse:
        runs.append(1)
        busy = sqlite3.OperationalError("database is locked")
        busy.sqlite_errorcode = sqlite3.SQLITE_BUSY
        session.execute(select(1))
        raise OperationalError("SELECT 1", {}, busy)

    async with serving(two) as client:
        assert (await client.post("/")).status_code == 500
    assert len(runs) == 2


async def test_read_sessions_of_two_databases_are_kept_apart(two: App) -> None:
    """Every class stands for its own database."""

    @two.get("/")
    async def handler(
        request: Request,
        read: ReadSession,
        reports: ReportsReadSession,
        async_reports: ReportsAsyncReadSession,
    ) -> HTTPResponse:
        statement = select(Note.text)
        return json(
            [
                read.scalar(statement),
                reports.scalar(statement),
                await async_reports.scalar(statement),
            ]
        )

    async with serving(two) as client:
        for database in (two.ctx.db, two.ctx.reports):
            async with database.session() as session:
                session.add(Note(text=database.name))
        assert (await client.get("/")).json() == ["db", "reports", "reports"]


async def test_dependencies_of_two_databases(two: App) -> None:
    """A constructor may take a session of each."""

    class Both:
        def __init__(self, session: Session, reports: ReportsSession) -> None:
            self.found = [session.scalar(select(Note.text)), reports.scalar(select(Note.text))]

    two.ext.add_dependency(Both)

    @two.get("/")
    async def handler(request: Request, both: Both) -> HTTPResponse:
        return json(both.found)

    async with serving(two) as client:
        async with two.ctx.reports.session() as session:
            session.add(Note(text="reports"))
        assert (await client.get("/")).json() == [None, "reports"]


async def test_the_first_database_stands_for_the_classes_without_a_name() -> None:
    """Without a database ``db``, the one that was registered first is meant."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint("library", url="sqlite:///library.db"))

    @app.get("/")
    async def handler(request: Request, session: Session, db: Database) -> HTTPResponse:
        return json([str(session.scalar(select(1))), db.name])

    async with serving(app) as client:
        assert (await client.get("/")).json() == ["1", "library"]


async def test_db_stands_for_the_classes_without_a_name_even_if_it_comes_later(
    two: App,
) -> None:
    """The order of registration does not matter for ``db``."""
    app: App = Sanic("other")
    app.blueprint(DatabaseBlueprint("reports", url="sqlite:///r.db", **REPORTS_CLASSES))
    app.blueprint(DatabaseBlueprint(url="sqlite:///d.db"))

    @app.get("/")
    async def handler(request: Request, db: Database, session: AsyncSession) -> HTTPResponse:
        return json([db.name, session.bind is app.ctx.db.engine])

    async with serving(app) as client:
        assert (await client.get("/")).json() == ["db", True]


async def test_what_one_database_refuses_keeps_the_other_from_committing(two: App) -> None:
    """All are flushed before the first COMMIT."""

    @two.post("/")
    def handler(request: Request, session: Session, reports: ReportsSession) -> HTTPResponse:
        session.add(Note(text="db"))
        reports.add_all([Note(text="twice"), Note(text="twice")])
        return empty()

    async with serving(two) as client:
        assert (await client.post("/")).status_code == 500
        assert await notes_of(two.ctx.db) == await notes_of(two.ctx.reports) == []


@pytest.mark.parametrize(
    ("argument", "given"),
    [
        ("session_class", int),
        ("session_class", AsyncSession),
        ("async_session_class", Session),
        ("read_session_class", "ReportsSession"),
    ],
)
async def test_a_class_that_is_none_of_sessions_is_refused(argument: str, given: Any) -> None:
    """When the blueprint is made, by the name of the argument."""
    with pytest.raises(ConfigurationError, match=f"{argument} is to be a subclass of"):
        DatabaseBlueprint("reports", **{argument: given})


async def test_two_databases_with_one_session_class_are_refused() -> None:
    """The error names both, the class and the remedy."""
    app: App = Sanic("shop")
    app.blueprint(
        DatabaseBlueprint("first", url="sqlite:///first.db", session_class=ReportsSession)
    )
    app.blueprint(
        DatabaseBlueprint("second", url="sqlite:///second.db", session_class=ReportsSession)
    )
    with pytest.raises(ConfigurationError) as caught:
        async with serving(app):
            pass
    message = str(caught.value)
    assert "'first' and 'second' both inject ReportsSession" in message
    assert "session_class=..." in message
    await app.ctx.first.dispose()
    await app.ctx.second.dispose()


async def test_a_second_database_without_classes_is_used_by_its_name() -> None:
    """It is not injected, but it is at ``app.ctx`` and on the context."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(url="sqlite:///db.db"))
    app.blueprint(DatabaseBlueprint("other", url="sqlite:///other.db"))

    @app.get("/")
    async def handler(request: Request, session: AsyncSession) -> HTTPResponse:
        other = request.ctx.other_session
        return json([session.bind is other.bind, await other.scalar(select(1))])

    async with serving(app) as client:
        assert (await client.get("/")).json() == [False, 1]


async def test_databases_without_a_url_have_files_of_their_own() -> None:
    """Two embedded databases of one app never share a file, where one would lock the other."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint())
    app.blueprint(DatabaseBlueprint("reports", **REPORTS_CLASSES))
    async with serving(app):
        assert app.ctx.db.url.database == "shop.db"
        assert app.ctx.reports.url.database != "shop.db"


async def test_the_plain_database_url_is_for_db_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """``DATABASE_URL`` does not make a second database the same as the first."""
    monkeypatch.setenv("DATABASE_URL", "sqlite:///plain.db")
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint())
    app.blueprint(DatabaseBlueprint("reports", **REPORTS_CLASSES))
    async with serving(app):
        assert app.ctx.db.url.database == "plain.db"
        assert app.ctx.reports.url.database != "plain.db"


# --- The database is away


def add_holding_handlers(app: App) -> tuple[asyncio.Event, asyncio.Event]:
    """Add a handler that holds the one writer connection, and one that wants it."""
    held, release = asyncio.Event(), asyncio.Event()

    @app.get("/hold")
    async def hold(request: Request, session: AsyncSession) -> HTTPResponse:
        await session.execute(select(1))
        held.set()
        await release.wait()
        return empty()

    @app.get("/want")
    async def want(request: Request, session: Session) -> HTTPResponse:
        session.execute(select(1))
        return empty()

    return held, release


async def test_an_exhausted_pool_is_answered_with_503_and_one_line_in_the_log(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """``Retry-After`` tells the client to come back."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(pool_timeout=0.05))
    held, release = add_holding_handlers(app)
    async with serving(app) as client:
        holding = asyncio.create_task(client.get("/hold"))
        await held.wait()
        caplog.clear()
        response = await client.get("/want")
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        errors = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert [record.getMessage().partition(":")[0] for record in errors] == ["503 for GET /want"]
        release.set()
        assert (await holding).status_code == 204
        assert (await client.get("/want")).status_code == 204


async def test_the_answer_has_the_format_of_the_apps_other_errors() -> None:
    """``FALLBACK_ERROR_FORMAT`` and the Accept header count."""
    app: App = Sanic("shop")
    app.config.FALLBACK_ERROR_FORMAT = "json"
    app.blueprint(DatabaseBlueprint(pool_timeout=0.05))
    held, release = add_holding_handlers(app)
    async with serving(app) as client:
        holding = asyncio.create_task(client.get("/hold"))
        await held.wait()
        response = await client.get("/want")
        assert response.json()["message"] == "The database is unavailable."
        assert response.json()["status"] == 503
        release.set()
        await holding


@pytest.mark.parametrize("form", ["async", "plain"])
@pytest.mark.parametrize("wanted", ["unavailable", "service"])
async def test_an_answer_of_the_apps_own_comes_first(form: str, wanted: str) -> None:
    """An exception handler for DatabaseUnavailable, or for 503 in general, is respected."""
    app: App = Sanic("shop")
    app.blueprint(DatabaseBlueprint(pool_timeout=0.05))
    held, release = add_holding_handlers(app)
    error_class = DatabaseUnavailable if wanted == "unavailable" else ServiceUnavailable

    async def own_async(request: Request, error: Exception) -> HTTPResponse:
        return text("mine", 503)

    def own_plain(request: Request, error: Exception) -> HTTPResponse:
        return text("mine", 503)

    handlers: dict[str, Callable[..., Any]] = {"async": own_async, "plain": own_plain}
    app.error_handler.add(error_class, handlers[form])
    async with serving(app) as client:
        holding = asyncio.create_task(client.get("/hold"))
        await held.wait()
        response = await client.get("/want")
        assert (response.status_code, response.text) == (503, "mine")
        release.set()
        await holding
