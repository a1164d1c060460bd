"""What Alembic is told about a database: its connection, its tables, and how it migrates."""

from __future__ import annotations

import logging
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from alembic.config import Config
from alembic.runtime.migration import MigrationContext, MigrationInfo
from alembic.script import Script
from alembic.util import to_list
from sqlalchemy import Connection, String, column, inspect, select, table
from sqlalchemy.engine.interfaces import DBAPIConnection

from .errors import MigrationFailed

Options = dict[str, Any]


def make_config(directory: Path, *, quiet: bool = False, **attributes: Any) -> Config:
    """Return Alembic's configuration, with attributes for ``env.py`` and no file of its own."""
    config = Config(stdout=sys.stdout, cmd_opts=Namespace(quiet=quiet), attributes=attributes)
    config.set_main_option("script_location", str(directory.absolute()).replace("%", "%%"))
    return config


def configure_options(connection: Connection, options: Options) -> Options:
    """Return the arguments of ``EnvironmentContext.configure()``."""
    callbacks: list[Callable[..., None]] = [announce]
    defaults: Options = {}
    if connection.dialect.name == "sqlite":
        # Our connections begin where SQLAlchemy says so, and DDL can be rolled back.
        defaults = {"render_as_batch": True, "transactional_ddl": True}
        callbacks.append(ReferenceCheck(connection))
    callbacks += to_list(options.get("on_version_apply"), [])
    return {**defaults, **options, "connection": connection, "on_version_apply": callbacks}


def announce(*, step: MigrationInfo, **_: Any) -> None:
    """Print which migration was run."""
    if not step.is_stamp:
        script = cast(Script, step.up_revision)
        print(f"{'ran' if step.is_upgrade else 'undid'} {script.revision}, {script.doc}")


class ReferenceCheck:
    """Refuses a migration that leaves SQLite with rows whose parents are gone.

    A batch migration makes a new table, and drops the old one. With foreign keys on that would
    delete what refers to its rows, so they are off and checked afterwards ("Making Other Kinds Of
    Table Schema Changes" in SQLite's documentation).
    """

    def __init__(self, connection: Connection) -> None:
        self._before = self._violations(connection)
        connection.rollback()

    def __call__(self, *, ctx: MigrationContext, step: MigrationInfo, **_: Any) -> None:
        """Check, at the end of a migration."""
        assert ctx.connection is not None
        found = self._violations(ctx.connection)
        if found > self._before:
            raise MigrationFailed(
                f"{step.up_revision_id} leaves {found - self._before} rows with foreign keys that "
                "lead nowhere.",
                entry="lost-references",
            )

    @staticmethod
    def _violations(connection: Connection) -> int:
        asked = "SELECT count(*) FROM pragma_foreign_key_check"
        return int(connection.exec_driver_sql(asked).scalar_one())


def turn_off_foreign_keys(dbapi_connection: DBAPIConnection, _record: object) -> None:
    """Prepare a connection of SQLite for migrations; within a transaction it would be too late."""
    cursor = dbapi_connection.cursor()
    cursor.execute("PRAGMA foreign_keys = OFF")
    cursor.close()


@contextmanager
def without_note_of_the_key() -> Iterator[None]:
    """Keep asyncmy from telling that MariaDB gives no name to the key of Alembic's own table."""

    def is_told(record: logging.LogRecord) -> bool:
        return not record.getMessage().endswith("_pkc' ignored for PRIMARY key.")

    logger = logging.getLogger("asyncmy")
    logger.addFilter(is_told)
    try:
        yield
    finally:
        logger.removeFilter(is_told)


def heads_of(connection: Connection, options: Options) -> Sequence[str]:
    """Return the revisions that a database is at: none, one, or one for each branch."""
    name = options.get("version_table", "alembic_version")
    schema = options.get("version_table_schema")
    if not inspect(connection).has_table(name, schema=schema):
        return []
    versions = select(column("version_num", String)).select_from(table(name, schema=schema))
    return connection.scalars(versions).all()
