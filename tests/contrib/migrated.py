"""Apps with migrations, and two ways to run their commands."""

import os
from itertools import count
from pathlib import Path
from typing import Any

from sanic import HTTPResponse, Request, Sanic, empty
from sqlalchemy import MetaData

import sanic_db_bp
from sanic_db_bp import DatabaseBlueprint
from sanic_db_bp.contrib.migrations import MigrationsBlueprint
from tests.forkserver import ForkedProcess
from tests.serving import make_light
from tests.shop import Base, Shop

PATIENCE = 120
"""Seconds that ten processes may take on a busy machine."""

DIRECTORY = "migrations/db"
VERSIONS = f"{DIRECTORY}/versions"

APP = """
import os

from sanic import Sanic
from sqlalchemy import String
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from sanic_db_bp import DatabaseBlueprint
from sanic_db_bp.contrib.migrations import MigrationsBlueprint


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"

    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(String(20))
    if os.environ.get("WITH_AUTHOR"):
        author: Mapped[str | None] = mapped_column(String(50), index=True)


app = Sanic("shop")
app.config.MOTD = False
db = DatabaseBlueprint(metadata=Base.metadata)
app.blueprint(db)
app.blueprint(MigrationsBlueprint(db))


@app.get("/alive")
async def alive(request):
    return None
"""

names = count(1)


class Commands:
    """``sanic shop:app exec ...`` in processes of their own."""

    def __init__(self, folder: Path, **environment: str) -> None:
        (folder / "shop.py").write_text(APP)
        self.folder = folder
        inherited = {name: each for name, each in os.environ.items() if name[:6] != "SANIC_"}
        package = str(Path(sanic_db_bp.__file__).parents[1])
        self.environment = {**inherited, "PYTHONPATH": package, **environment}

    def start(self, *arguments: str, **environment: str) -> ForkedProcess:
        """Start a command."""
        return ForkedProcess(
            ["sanic", "shop:app", "exec", *arguments],
            cwd=self.folder,
            env={**self.environment, **environment},
        )

    def run(self, *arguments: str, **environment: str) -> tuple[int, str]:
        """Run a command; returns its exit status and its output."""
        return self.start(*arguments, **environment).end(PATIENCE)

    def succeed(self, *arguments: str, **environment: str) -> str:
        """Run a command that has to succeed; returns its output."""
        status, output = self.run(*arguments, **environment)
        assert status == 0, output
        return output.strip()


def shop_tables() -> MetaData:
    """The tables of the shop that Alembic can write down: not those that differ by database."""
    metadata = MetaData()
    Base.metadata.tables["item"].to_metadata(metadata)
    return metadata


async def _alive(request: Request) -> HTTPResponse:
    return empty()


def make_app(url: str, metadata: MetaData | None = None, **settings: Any) -> Shop:
    """Make an app whose database has the tables of the shop, once it is migrated."""
    app: Shop = Sanic(f"migrated-{next(names)}")
    make_light(app)
    app.blueprint(DatabaseBlueprint(metadata=metadata or shop_tables(), url=url, **settings))
    app.add_route(_alive, "/")
    return app


def with_migrations(app: Shop, folder: Path, **options: Any) -> Shop:
    """Register the migrations of the app's database."""
    bp = app.blueprints["db"]
    assert isinstance(bp, DatabaseBlueprint)
    app.blueprint(MigrationsBlueprint(bp, folder / DIRECTORY, **options))
    return app


async def run(app: Shop, name: str, **arguments: str) -> None:
    """Run a command of the app in the event loop of the test."""
    commands = {each.name: each.func for each in app._future_commands}
    await commands[name](**arguments)


async def write(app: Shop, folder: Path, upgrade: str, message: str = "by hand") -> str:
    """Write a migration by hand; returns its revision."""
    before = set((folder / VERSIONS).glob("*.py"))
    await run(app, "db-revision", message=message, empty="yes")
    (written,) = set((folder / VERSIONS).glob("*.py")) - before
    source = written.read_text().replace("    pass\n", f"    {upgrade}\n", 1)
    written.write_text(source)
    return written.name.partition("_")[0]
