"""``REQUIRE_HEAD``: what the start does about a database that lacks migrations."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sanic_db_bp import ConfigurationError
from sanic_db_bp.contrib.migrations import MigrationFailed
from tests.contrib.migrated import APP, DIRECTORY, VERSIONS, make_app, run, with_migrations, write
from tests.databases import on_sqlite
from tests.processes import Process
from tests.serving import serving
from tests.shop import Observer, Shop
from tests.test_startup import SINGLE


@pytest.fixture
def behind(tmp_path: Path, database_url: str) -> Callable[..., Any]:
    """Make an app whose database lacks the second of two migrations."""

    async def make(**settings: Any) -> tuple[Shop, str]:
        app = with_migrations(make_app(database_url, **settings), tmp_path)
        if not (tmp_path / DIRECTORY).exists():
            await run(app, "db-init")
            await write(app, tmp_path, "pass", "first")
            await run(app, "db-upgrade")
            await write(app, tmp_path, "pass", "second")
        (script,) = (tmp_path / VERSIONS).glob("*_second.py")
        return app, script.name.partition("_")[0]

    return make


async def test_a_database_that_is_behind_keeps_the_server_from_starting(
    behind: Callable[..., Any],
) -> None:
    """The error names the migrations and the command; after it the server starts."""
    app, second = await behind(require_head="refuse")
    message = f"The database 'db' lacks migrations: {second}. Run: sanic <app> exec db-upgrade"
    with pytest.raises(ConfigurationError, match=re.escape(message)):
        async with serving(app):
            pass
    await run(app, "db-upgrade")
    app, _ = await behind(require_head="refuse")
    async with serving(app):
        pass


@on_sqlite
@pytest.mark.parametrize(("setting", "warned"), [("warn", True), ("off", False)])
async def test_a_database_that_is_behind_is_warned_of(
    behind: Callable[..., Any], caplog: pytest.LogCaptureFixture, setting: str, warned: bool
) -> None:
    """The server starts all the same."""
    app, second = await behind(require_head=setting)
    async with serving(app):
        pass
    assert (f"lacks migrations: {second}" in caplog.text) is warned


@on_sqlite
async def test_a_database_that_is_ahead_is_no_reason_to_refuse(
    behind: Callable[..., Any], database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """While a newer version is rolled out, the older one must be able to start again."""
    app, _ = await behind(require_head="refuse")
    Observer(database_url).run("UPDATE alembic_version SET version_num = 'newer'")
    async with serving(app):
        pass
    assert "is at newer, which is not in" in caplog.text


async def test_require_head_needs_the_migrations(tmp_path: Path) -> None:
    """Without the blueprint, or without a folder, nothing could be required."""
    url = f"sqlite:///{tmp_path}/shop.db"
    app = make_app(url, require_head="warn")
    with pytest.raises(ConfigurationError, match="Nothing knows the migrations of 'db'"):
        async with serving(app):
            pass
    app = with_migrations(make_app(url, require_head="warn"), tmp_path)
    with pytest.raises(MigrationFailed, match="There are no migrations in"):
        async with serving(app):
            pass


async def test_a_refused_server_ends_with_an_error(tmp_path: Path) -> None:
    """The process ends with a status that is not zero, and says why."""
    app = with_migrations(make_app(f"sqlite:///{tmp_path}/shop.db"), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, "pass")
    (tmp_path / "shop.py").write_text(APP)
    environment = {"SANIC_DB_URL": "sqlite:///shop.db", "SANIC_DB_REQUIRE_HEAD": "refuse"}
    with Process(tmp_path, SINGLE, environment) as server:
        assert server.wait_for_end() != 0
        assert "The database 'db' lacks migrations" in server.words
