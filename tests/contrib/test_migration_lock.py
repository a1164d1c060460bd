"""The lock: of several servers that start one migrates, and the others do not hold it up."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sanic_db_bp.contrib.migrations.lock import migration_lock
from tests.contrib.migrated import PATIENCE, Commands, make_app, run, with_migrations, write
from tests.databases import on, on_servers
from tests.shop import Observer, Shop


async def test_of_ten_upgrades_at_once_one_does_the_work(tmp_path: Path, database_url: str) -> None:
    """All ten succeed, the migration runs once, and each says where the database is."""
    app = with_migrations(make_app(database_url), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, "import time; time.sleep(1); op.execute('CREATE TABLE t (x INT)')")
    commands = Commands(tmp_path, SANIC_DB_URL=database_url)
    processes = [commands.start("db-upgrade") for _ in range(10)]
    ends = [process.end(PATIENCE) for process in processes]
    outputs = [output for _, output in ends]
    assert [status for status, _ in ends] == [0] * 10, outputs
    assert sum("ran " in output for output in outputs) == 1
    assert all("(head), by hand" in output for output in outputs)


def migrations_of(app: Shop) -> Any:
    """The object behind the commands."""
    return app.ctx.db.find_pending.__self__


@on_servers
async def test_waiting_for_the_lock_has_an_end(
    tmp_path: Path, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A command says that it waits, and gives up after ``lock_timeout``."""
    app = with_migrations(make_app(database_url), tmp_path, lock_timeout=0.7)
    await run(app, "db-init")
    async with migrations_of(app)._engine() as engine, migration_lock(engine, "db", 1):
        with pytest.raises(SystemExit, match=r"another server has been migrating it for 0\.7 s"):
            await run(app, "db-upgrade")
    assert "Waiting for the migrations of another server." in capsys.readouterr().out
    await run(app, "db-upgrade")


@on("postgresql", every_driver=True)
async def test_an_index_is_built_concurrently_while_others_wait(
    tmp_path: Path, database_url: str
) -> None:
    """PostgreSQL waits there for all statements; a server that waits for the lock has none."""
    app = with_migrations(make_app(database_url), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, "op.create_table('thing', sa.Column('id', sa.Integer))", "table")
    concurrently = (
        "context = op.get_context()\n    with context.autocommit_block():\n"
        "        op.create_index('by_id', 'thing', ['id'], postgresql_concurrently=True)"
    )
    await write(app, tmp_path, concurrently, "index")

    async def wait() -> None:
        async with migrations_of(app)._engine() as engine, migration_lock(engine, "db", 30):
            pass

    async with asyncio.TaskGroup() as tasks:
        upgrade = tasks.create_task(migrations_of(app).upgrade())
        for _ in range(3):
            tasks.create_task(wait())
        await asyncio.wait_for(upgrade, 20)
    indexes = "SELECT count(*) FROM pg_indexes WHERE indexname = 'by_id'"
    assert Observer(database_url).scalar(indexes) == 1
