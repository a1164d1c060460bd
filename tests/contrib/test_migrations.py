"""Migrations, by the commands that a user runs, on real databases."""

import re
from pathlib import Path

import pytest
from sanic import Sanic
from sqlalchemy import Column, MetaData, String

from sanic_db_bp import ConfigurationError, DatabaseBlueprint
from sanic_db_bp.contrib.migrations import MigrationsBlueprint
from sanic_db_bp.exceptions import link_to
from tests.contrib.migrated import (
    DIRECTORY,
    VERSIONS,
    Commands,
    make_app,
    names,
    run,
    shop_tables,
    with_migrations,
    write,
)
from tests.databases import on, on_servers
from tests.shop import Base, Observer, Shop

SECRET = "s3cr3t-pass"


# --- From nothing to a table and back


def test_the_commands_run_in_processes_of_their_own(tmp_path: Path, database_url: str) -> None:
    """Each command of ``sanic exec`` says what it did, and its exit status tells success."""
    commands = Commands(tmp_path, SANIC_DB_URL=database_url)
    assert commands.succeed("db-init") == "Made migrations/db."
    written = commands.succeed("db-revision", "--message", "create note")
    assert re.search(r"Wrote migrations/db/versions/\w+_create_note\.py\.$", written)
    status, output = commands.run("db-check")
    told = f"Alembic: Target database is not up to date.\n{link_to('alembic')}"
    assert (status, output.strip()) == (1, told)
    assert commands.succeed("db-upgrade").endswith("(head), create note")
    status, output = commands.run("db-check", WITH_AUTHOR="yes")
    assert status == 1
    assert "The tables of 'db' differ from the models. db-revision would write:\n\n" in output
    assert "add_column(" in output
    assert "create_index(" in output
    assert "Traceback" not in output
    assert "Uncaught" not in output


@on("mariadb", every_driver=True)
async def test_the_drivers_of_mariadb_have_nothing_to_add(
    tmp_path: Path, database_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Of Alembic's own table they would tell that the name of its key is not used."""
    app = with_migrations(make_app(database_url), tmp_path)
    await run(app, "db-init")
    await run(app, "db-revision", message="create the shop")
    await run(app, "db-upgrade")
    assert caplog.messages == []
    if "asyncmy" in database_url:
        await write(app, tmp_path, "op.execute(\"SELECT CAST('x' AS INTEGER)\")")
        await run(app, "db-upgrade")
        assert caplog.messages == ["Truncated incorrect INTEGER value: 'x'"]


def changed_tables() -> MetaData:
    """The tables after a change of the models."""
    metadata = shop_tables()
    item = metadata.tables["item"]
    item.append_column(Column("color", String(20), index=True))
    # SQLite can do this in batch mode alone.
    item.c.name.type = String(120)
    return metadata


async def test_the_commands_lead_from_models_to_tables_and_back(
    tmp_path: Path, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What autogenerate writes is what ``db-check`` compares, on each kind of database."""

    async def said(app: Shop, name: str, **arguments: str) -> list[str]:
        await run(app, name, **arguments)
        return capsys.readouterr().out.splitlines()

    app = with_migrations(make_app(database_url), tmp_path)
    await run(app, "db-init")
    with pytest.raises(SystemExit, match=r"would write:\n\n    op\.create_table\('item'"):
        await run(app, "db-check")
    await run(app, "db-revision", message="create the shop")
    first = capsys.readouterr().out.rpartition("/")[2].partition("_")[0]
    assert await said(app, "db-upgrade") == [
        f"ran {first}, create the shop",
        f"db: {first} (head), create the shop",
    ]
    agree = ["The tables of 'db' are as the models say."]
    assert await said(app, "db-check") == agree
    assert (await said(app, "db-revision", message="x"))[0].startswith("Nothing to write")

    app = with_migrations(make_app(database_url, changed_tables()), tmp_path)
    with pytest.raises(SystemExit, match="color"):
        await run(app, "db-check")
    await run(app, "db-revision", message="colors")
    with pytest.raises(SystemExit, match="not up to date"):
        await run(app, "db-check")
    await run(app, "db-upgrade")
    capsys.readouterr()
    assert await said(app, "db-check") == agree
    newest, oldest = await said(app, "db-history")
    assert re.fullmatch(rf"{first} -> \w+ \(head\) \(current\), colors", newest)
    assert oldest == f"<base> -> {first}, create the shop"

    assert (await said(app, "db-downgrade"))[-1] == f"db: {first}, create the shop"
    with pytest.raises(SystemExit, match="not up to date"):
        await run(app, "db-check")
    assert (await said(app, "db-stamp"))[-1].endswith("(head), colors")
    assert (await said(app, "db-current"))[-1].endswith("(head), colors")
    assert (await said(app, "db-stamp", revision="base")) == ["db: no migration"]


async def test_an_unreachable_database_is_a_message(tmp_path: Path) -> None:
    """No traceback, no password, and the exit status 1."""
    app = with_migrations(make_app(f"postgresql://me:{SECRET}@127.0.0.1:1/shop"), tmp_path)
    await run(app, "db-init")
    with pytest.raises(SystemExit, match="'db' is unavailable: connecting failed") as failure:
        await run(app, "db-upgrade")
    assert SECRET not in str(failure.value.code)


# --- Failures


async def test_a_failing_migration_is_rolled_back(
    tmp_path: Path, database_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The message has the line and the statement; where DDL has transactions nothing is left."""
    app = with_migrations(make_app(database_url), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, "op.execute('CREATE TABLE first (id INTEGER)')", "good")
    failing = (
        "op.execute('CREATE TABLE second (id INTEGER)'); "
        "op.get_bind().execute(sa.text('INSERT INTO nowhere VALUES (:x)'), {'x': 's3cr3t-pass'})"
    )
    await write(app, tmp_path, failing, "bad")
    with pytest.raises(SystemExit) as failure:
        await run(app, "db-upgrade")
    message = str(failure.value.code)
    assert re.search(
        rf"^{tmp_path}/migrations/db/versions/\w+_bad\.py:\d+: the migration failed: ", message
    )
    assert "INSERT INTO nowhere VALUES" in message
    assert SECRET not in message
    observer = Observer(database_url)
    if observer.kind == "mysql":
        assert message.splitlines()[-2].endswith("good"), "the first migration stays"
        assert observer.scalar("SELECT count(*) FROM second") == 0
    else:
        assert message.endswith(f"\ndb: no migration\n{link_to('a-migration-failed')}")
        for table in ("first", "second"):
            with pytest.raises(Exception, match=table):
                observer.scalar(f"SELECT count(*) FROM {table}")


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("db-upgrade", {}, "There are no migrations in .*Run: sanic <app> exec db-init"),
        ("db-current", {}, "There are no migrations in .*Run: sanic <app> exec db-init"),
        ("db-revision", {}, "Say what the migration is for: --message"),
    ],
)
async def test_what_is_missing_is_named(
    tmp_path: Path, command: str, arguments: dict[str, str], message: str
) -> None:
    """A command that cannot work yet says what to do first."""
    app = with_migrations(make_app(f"sqlite:///{tmp_path}/shop.db"), tmp_path)
    with pytest.raises(SystemExit, match=message):
        await run(app, command, **arguments)


async def test_without_metadata_nothing_is_compared(tmp_path: Path) -> None:
    """The message says where the tables belong; an empty migration needs none."""
    app: Shop = Sanic(f"migrated-{next(names)}")
    bp = DatabaseBlueprint(url=f"sqlite:///{tmp_path}/shop.db")
    app.blueprint(bp)
    with_migrations(app, tmp_path)
    await run(app, "db-init")
    for command, arguments in (("db-check", {}), ("db-revision", {"message": "x"})):
        with pytest.raises(SystemExit, match=r"DatabaseBlueprint\(metadata=Base\.metadata\)"):
            await run(app, command, **arguments)
    await write(app, tmp_path, "pass")
    await run(app, "db-upgrade")


async def test_init_leaves_existing_migrations_alone(tmp_path: Path) -> None:
    """A second ``db-init`` is refused, and what was edited stays."""
    app = with_migrations(make_app(f"sqlite:///{tmp_path}/shop.db"), tmp_path)
    await run(app, "db-init")
    (tmp_path / DIRECTORY / "env.py").write_text("# mine")
    with pytest.raises(SystemExit, match=r"There are migrations in .* already"):
        await run(app, "db-init")
    assert (tmp_path / DIRECTORY / "env.py").read_text() == "# mine"


async def test_a_database_in_memory_is_refused(tmp_path: Path) -> None:
    """It would be migrated, and gone."""
    app = with_migrations(make_app("sqlite://"), tmp_path)
    await run(app, "db-init")
    with pytest.raises(SystemExit, match="gone at the end of each process"):
        await run(app, "db-upgrade")


async def test_an_unknown_revision_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A database that another version migrated is told as such, and can be stamped anew."""
    url = f"sqlite:///{tmp_path}/shop.db"
    app = with_migrations(make_app(url), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, "pass")
    await run(app, "db-upgrade")
    Observer(url).run("UPDATE alembic_version SET version_num = 'abc'")
    await run(app, "db-current")
    assert capsys.readouterr().out.endswith(f"db: abc (not in {tmp_path}/migrations/db)\n")
    with pytest.raises(SystemExit, match="Can't locate revision identified by 'abc'"):
        await run(app, "db-upgrade")
    await run(app, "db-stamp", purge="yes")
    assert capsys.readouterr().out.endswith("(head), by hand\n")


@on_servers
async def test_a_migration_may_take_longer_than_a_request(
    tmp_path: Path, database_url: str
) -> None:
    """``STATEMENT_TIMEOUT`` is for the app's own statements."""
    app = with_migrations(make_app(database_url, statement_timeout=0.2), tmp_path)
    await run(app, "db-init")
    sleep = "SLEEP(0.6)" if "mysql" in database_url else "pg_sleep(0.6)"
    await write(app, tmp_path, f"op.execute('CREATE TABLE slow AS SELECT 1 AS x, {sleep} IS NULL')")
    await run(app, "db-upgrade")
    assert Observer(database_url).scalar("SELECT count(*) FROM slow") == 1


# --- SQLite


FAMILY = (
    "op.execute('CREATE TABLE parent (id INTEGER PRIMARY KEY, name TEXT)');"
    "op.execute('CREATE TABLE child (parent_id INTEGER REFERENCES parent ON DELETE CASCADE)');"
    "op.execute('INSERT INTO parent VALUES (1, NULL)');"
    "op.execute('INSERT INTO child VALUES (1)')"
)


async def test_a_batch_migration_keeps_the_rows_that_refer_to_the_table(tmp_path: Path) -> None:
    """The old table is dropped, and its children do not go with it."""
    url = f"sqlite:///{tmp_path}/shop.db"
    app = with_migrations(make_app(url), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, FAMILY)
    batch = (
        "with op.batch_alter_table('parent', recreate='always') as batch:\n"
        "        batch.add_column(sa.Column('age', sa.Integer))"
    )
    await write(app, tmp_path, batch)
    await run(app, "db-upgrade")
    assert Observer(url).scalar("SELECT count(*) FROM child") == 1
    assert Observer(url).scalar("SELECT age IS NULL FROM parent") == 1


async def test_a_migration_that_leaves_orphans_is_rolled_back(tmp_path: Path) -> None:
    """Foreign keys are checked at the end of each migration; older orphans do not matter."""
    url = f"sqlite:///{tmp_path}/shop.db"
    app = with_migrations(make_app(url), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, FAMILY)
    await run(app, "db-upgrade")
    Observer(url).run("INSERT INTO child VALUES (77)")
    await write(app, tmp_path, "op.execute('UPDATE parent SET name = 1')")
    await run(app, "db-upgrade")
    await write(app, tmp_path, "op.execute('DELETE FROM parent')")
    with pytest.raises(SystemExit, match="leaves 1 rows with foreign keys that lead nowhere"):
        await run(app, "db-upgrade")
    assert Observer(url).scalar("SELECT count(*) FROM parent") == 1


# --- Several heads, databases, options


async def test_two_heads_are_merged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two developers wrote a migration at the same time."""
    app = with_migrations(make_app(f"sqlite:///{tmp_path}/shop.db"), tmp_path)
    await run(app, "db-init")
    first = await write(app, tmp_path, "pass")
    second = await write(app, tmp_path, "pass")
    script = next((tmp_path / VERSIONS).glob(f"{second}*"))
    script.write_text(script.read_text().replace(f"'{first}'", "None"))
    await run(app, "db-upgrade")
    current = capsys.readouterr().out.splitlines()[-1]
    assert first in current
    assert second in current
    await run(app, "db-merge")
    await run(app, "db-upgrade")
    assert capsys.readouterr().out.splitlines()[-1].endswith("(head) (mergepoint), merge")


async def test_each_database_has_migrations_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Commands, folders and tables go by the name of the blueprint."""
    monkeypatch.chdir(tmp_path)
    app: Shop = Sanic(f"migrated-{next(names)}")
    for name in ("db", "reports"):
        metadata = MetaData()
        Base.metadata.tables["item"].to_metadata(metadata, name=f"{name}_item")
        url = f"sqlite:///{tmp_path}/{name}.db"
        bp = DatabaseBlueprint(name, metadata=metadata, url=url)
        app.blueprint(bp)
        app.blueprint(MigrationsBlueprint(bp))
    for command in ("init", "revision", "upgrade", "check"):
        for name in ("db", "reports"):
            arguments = {"message": f"for {name}"} if command == "revision" else {}
            await run(app, f"{name}-{command}", **arguments)
    for name in ("db", "reports"):
        observer = Observer(f"sqlite:///{tmp_path}/{name}.db")
        assert observer.scalar(f"SELECT count(*) FROM {name}_item") == 0
        (script,) = (tmp_path / "migrations" / name / "versions").glob("*.py")
        assert script.name.endswith(f"_for_{name}.py")
    assert "reports: " in capsys.readouterr().out


async def test_options_are_handed_to_alembic(tmp_path: Path) -> None:
    """The version table has the name that was asked for, and the user's callback is called."""
    url = f"sqlite:///{tmp_path}/shop.db"
    applied: list[str] = []
    app = with_migrations(
        make_app(url),
        tmp_path,
        version_table="versions",
        on_version_apply=lambda *, step, **_: applied.append(step.up_revision_id),
    )
    await run(app, "db-init")
    revision = await write(app, tmp_path, "pass")
    assert await app.ctx.db.pending_migrations() == [revision]
    await run(app, "db-upgrade")
    assert applied == [revision]
    assert Observer(url).scalar("SELECT version_num FROM versions") == revision
    assert await app.ctx.db.pending_migrations() == []
    await app.ctx.db.dispose()


async def test_migrations_come_after_their_database(tmp_path: Path) -> None:
    """Registered before it, or twice, they are refused."""
    app: Shop = Sanic(f"migrated-{next(names)}")
    bp = DatabaseBlueprint(url="sqlite://")
    with pytest.raises(ConfigurationError, match="Register the blueprint 'db' with the app"):
        app.blueprint(MigrationsBlueprint(bp))
    app = with_migrations(make_app("sqlite://"), tmp_path)
    with pytest.raises(ConfigurationError, match=r"are registered with the app .* already"):
        app.blueprint(app.blueprints["db_migrations"])


async def test_an_error_that_is_no_database_error_is_told_with_its_line(tmp_path: Path) -> None:
    """What a migration raises itself, such as one that cannot be undone."""
    app = with_migrations(make_app(f"sqlite:///{tmp_path}/shop.db"), tmp_path)
    await run(app, "db-init")
    await write(app, tmp_path, "raise NotImplementedError('not without a backup')")
    with pytest.raises(SystemExit) as failure:
        await run(app, "db-upgrade")
    message = str(failure.value.code)
    what = "the migration failed: NotImplementedError: not without a backup"
    assert re.search(rf"_by_hand\.py:\d+: {what}\n", message)


async def test_an_error_of_the_apps_own_code_keeps_its_traceback(tmp_path: Path) -> None:
    """It came about in none of the migrations, and is no failure of one."""

    def fail(**_: object) -> None:
        raise LookupError("of the app")

    app = with_migrations(
        make_app(f"sqlite:///{tmp_path}/shop.db"), tmp_path, on_version_apply=fail
    )
    await run(app, "db-init")
    await write(app, tmp_path, "pass")
    with pytest.raises(LookupError, match="of the app"):
        await run(app, "db-upgrade")


async def test_copies_of_the_blueprint_share_what_it_was_given(tmp_path: Path) -> None:
    """Sanic copies blueprints, such as for another version of an API."""
    metadata = shop_tables()
    app = make_app(f"sqlite:///{tmp_path}/shop.db", metadata)
    bp = app.blueprints["db"]
    assert isinstance(bp, DatabaseBlueprint)
    app.blueprint(MigrationsBlueprint(bp, tmp_path / DIRECTORY).copy("migrations_again"))
    await run(app, "db-init")
    await run(app, "db-revision", message="first")
    await run(app, "db-upgrade")
    await run(app, "db-check")
