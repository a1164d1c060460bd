"""Settings: where each value comes from, what is refused, and that no secret is ever shown."""

import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import SecretStr
from sqlalchemy.engine import URL

from sanic_db_bp import ConfigurationError, Database, DatabaseSettings, InvalidSettings
from sanic_db_bp.dialects import parse_url

ROOT = Path(__file__).parents[1]
SECRET = "Tr0ub4dor-and-3"

NAMES = {
    "URL",
    "PASSWORD",
    "PASSWORD_FILE",
    "READ_URL",
    "POOL_SIZE",
    "MAX_OVERFLOW",
    "POOL_TIMEOUT",
    "POOL_RECYCLE",
    "POOL_PRE_PING",
    "MAX_CONNECTIONS",
    "STATEMENT_TIMEOUT",
    "IDLE_IN_TRANSACTION_TIMEOUT",
    "ISOLATION_LEVEL",
    "COMMIT",
    "EXPIRE_ON_COMMIT",
    "PGBOUNCER",
    "STARTUP_TIMEOUT",
    "CREATE_TABLES",
    "REQUIRE_HEAD",
    "ECHO",
    "SLOW_QUERY_MS",
    "SLOW_QUERY_PARAMETERS",
    "ENGINE_OPTIONS",
    "CONNECT_ARGS",
    "ENV_FILE",
    "SECRETS_DIR",
}

NUMBERS = (
    "POOL_TIMEOUT",
    "POOL_RECYCLE",
    "STATEMENT_TIMEOUT",
    "IDLE_IN_TRANSACTION_TIMEOUT",
    "STARTUP_TIMEOUT",
    "SLOW_QUERY_MS",
)

NO_OBJECTS = (
    "[" * 100_000,
    '{"a": ' * 5_000,
    '{"a": ' + "9" * 5_000 + "}",
    "[1]",
    "null",
    "1",
    "{",
)


@pytest.fixture(autouse=True)
def empty_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty folder to work in, and no setting in the environment."""
    for name in os.environ:
        if name.upper().startswith(("SANIC_", "DATABASE_URL")):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


def url_in_use(**values: Any) -> str | None:
    url = DatabaseSettings(**values).connection_url()
    return None if url is None else url.render_as_string(hide_password=False)


def refused(**values: Any) -> InvalidSettings:
    with pytest.raises(InvalidSettings) as caught:
        DatabaseSettings(**values)
    return caught.value


def test_the_settings_are_those_of_the_documentation() -> None:
    """Every documented name is a setting, described, with a default that needs no variable."""
    fields = DatabaseSettings.model_fields
    assert {name.upper() for name in fields} == NAMES
    assert all(field.description for field in fields.values())
    assert DatabaseSettings().url is None


# Where a value comes from


def test_sources_are_asked_in_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Arguments, environment, DATABASE_URL, .env, secrets folder: the first that has it wins."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "sanic_db_url").write_text("sqlite:///secret.db\n")
    env_file = tmp_path / ".env"
    env_file.write_text("DATABASE_URL=sqlite:///plain-file.db\nSANIC_DB_URL=sqlite:///file.db\n")
    monkeypatch.setenv("SANIC_DB_SECRETS_DIR", str(secrets))
    monkeypatch.setenv("DATABASE_URL", "sqlite:///plain.db")
    monkeypatch.setenv("SANIC_DB_URL", "sqlite:///environment.db")

    assert url_in_use(url="sqlite:///argument.db") == "sqlite+aiosqlite:///argument.db"
    assert url_in_use() == "sqlite+aiosqlite:///environment.db"
    monkeypatch.delenv("SANIC_DB_URL")
    assert url_in_use() == "sqlite+aiosqlite:///plain.db"
    monkeypatch.delenv("DATABASE_URL")
    assert url_in_use() == "sqlite+aiosqlite:///file.db"
    env_file.write_text("DATABASE_URL=sqlite:///plain-file.db\n")
    assert url_in_use() == "sqlite+aiosqlite:///plain-file.db"
    env_file.unlink()
    assert url_in_use() == "sqlite+aiosqlite:///secret.db"
    (secrets / "sanic_db_url").unlink()
    assert url_in_use() is None


def test_an_empty_variable_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable that a deployment left empty does not hide the next source."""
    monkeypatch.setenv("SANIC_DB_URL", "")
    monkeypatch.setenv("SANIC_DB_POOL_SIZE", "")
    monkeypatch.setenv("DATABASE_URL", "sqlite:///plain.db")
    assert url_in_use() == "sqlite+aiosqlite:///plain.db"
    assert DatabaseSettings().pool_size == 10


def test_an_empty_plain_url_counts_as_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty DATABASE_URL is no URL, rather than a wrong one."""
    monkeypatch.setenv("DATABASE_URL", "")
    assert url_in_use() is None


def test_another_prefix_reads_its_own_variables_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The database of another blueprint shares nothing with the first, DATABASE_URL included."""
    monkeypatch.setenv("SANIC_DB_POOL_SIZE", "3")
    monkeypatch.setenv("DATABASE_URL", "sqlite:///plain.db")
    monkeypatch.setenv("SANIC_REPORTS_POOL_SIZE", "4")
    reports = DatabaseSettings.load("SANIC_REPORTS_")
    assert (reports.pool_size, reports.url) == (4, None)
    assert DatabaseSettings().pool_size == 3


def test_a_prefix_holds_for_every_source(tmp_path: Path) -> None:
    """The .env file and the secrets folder are read with the prefix too, and so are errors."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "sanic_reports_password").write_text(f"{SECRET}\n")
    (tmp_path / ".env").write_text("SANIC_REPORTS_POOL_SIZE=4\nSANIC_DB_POOL_SIZE=3\n")
    reports = DatabaseSettings.load("SANIC_REPORTS_", secrets_dir=str(secrets))
    assert reports.pool_size == 4
    assert isinstance(reports.password, SecretStr)
    assert reports.password.get_secret_value() == SECRET
    with pytest.raises(InvalidSettings) as caught:
        DatabaseSettings.load("SANIC_REPORTS_", pool_size=0)
    assert [problem.variable for problem in caught.value.problems] == ["SANIC_REPORTS_POOL_SIZE"]


def test_names_in_the_environment_may_be_written_in_lower_case(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The case of a variable's name makes no difference."""
    monkeypatch.setenv("sanic_db_pool_size", "7")
    assert DatabaseSettings().pool_size == 7


def test_the_env_file_may_have_another_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """ENV_FILE in the environment or in code says which file is read; none is read for None."""
    (tmp_path / ".env").write_text("SANIC_DB_POOL_SIZE=3\n")
    (tmp_path / "production.env").write_text("SANIC_DB_POOL_SIZE=4\n")
    assert DatabaseSettings().pool_size == 3
    assert DatabaseSettings(env_file=None).pool_size == 10
    monkeypatch.setenv("SANIC_DB_ENV_FILE", "production.env")
    assert DatabaseSettings().pool_size == 4
    assert DatabaseSettings(env_file=".env").pool_size == 3


def test_the_env_file_may_name_the_secrets_folder(tmp_path: Path) -> None:
    """SECRETS_DIR is a setting like any other, also in the .env file."""
    secrets = tmp_path / "secrets"
    secrets.mkdir()
    (secrets / "sanic_db_password").write_text(SECRET)
    (tmp_path / ".env").write_text(f"SANIC_DB_SECRETS_DIR={secrets}\n")
    password = DatabaseSettings().password
    assert isinstance(password, SecretStr)
    assert password.get_secret_value() == SECRET


def test_a_password_of_digits_stays_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing casts a password to a number: the leading zero is part of it."""
    monkeypatch.setenv("SANIC_DB_PASSWORD", "0123")
    assert url_in_use(url="postgresql+asyncpg://shop@db/shop") == (
        "postgresql+asyncpg://shop:0123@db/shop"
    )


def test_mappings_are_json_objects_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """ENGINE_OPTIONS and CONNECT_ARGS are written as JSON in a variable, as a dict in code."""
    monkeypatch.setenv("SANIC_DB_CONNECT_ARGS", '{"server_settings": {"jit": "off"}}')
    loaded = DatabaseSettings(engine_options={"query_cache_size": 10})
    assert loaded.connect_args == {"server_settings": {"jit": "off"}}
    assert loaded.engine_options == {"query_cache_size": 10}


def test_settings_cannot_be_changed_afterwards() -> None:
    """What an engine was built from stays true."""
    with pytest.raises(ValueError, match="frozen"):
        DatabaseSettings().pool_size = 3


# The URL


@pytest.mark.parametrize(
    ("written", "in_use"),
    [
        ("postgres://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgresql://u:p@h:5433/d", "postgresql+asyncpg://u:p@h:5433/d"),
        ("postgresql+asyncpg://u@h/d", "postgresql+asyncpg://u@h/d"),
        ("postgres+psycopg://u@h/d", "postgresql+psycopg://u@h/d"),
        ("mysql://u:p@h/d", "mysql+asyncmy://u:p@h/d"),
        ("mariadb://u:p@h:3307/d", "mysql+asyncmy://u:p@h:3307/d"),
        ("mysql+aiomysql://u@h/d", "mysql+aiomysql://u@h/d"),
        ("postgresql+psycopg_async://u@h/d", "postgresql+psycopg://u@h/d"),
        ("mariadb+asyncmy://u@h/d", "mysql+asyncmy://u@h/d"),
        ("sqlite:///file.db", "sqlite+aiosqlite:///file.db"),
        ("sqlite:////srv/file.db", "sqlite+aiosqlite:////srv/file.db"),
        ("sqlite+aiosqlite:///file.db", "sqlite+aiosqlite:///file.db"),
        ("sqlite://", "sqlite+aiosqlite://"),
        ("postgresql://u:p%40ss@h/d", "postgresql+asyncpg://u:p%40ss@h/d"),
        (" postgresql://u:p@h/d\n", "postgresql+asyncpg://u:p@h/d"),
        ("POSTGRESQL://u:p@h/d", "postgresql+asyncpg://u:p@h/d"),
        ("postgresql://[::1]:5432/d", "postgresql+asyncpg://[::1]:5432/d"),
        ("postgresql://u@h/d?passfile=pass", "postgresql+asyncpg://u@h/d?passfile=pass"),
    ],
)
def test_urls_are_accepted_as_people_have_them(written: str, in_use: str) -> None:
    """Every usual spelling is understood, and the asyncio driver is chosen."""
    assert url_in_use(url=written) == in_use


def test_a_url_may_be_a_secret_in_code() -> None:
    """A program that keeps its secrets in pydantic's type need not unpack it."""
    assert url_in_use(url=SecretStr("postgres://u:p@h/d")) == "postgresql+asyncpg://u:p@h/d"


def test_sqlite_takes_no_password() -> None:
    """A PASSWORD that is set for another database does no harm to a file."""
    assert url_in_use(url="sqlite:///x.db", password=SECRET) == "sqlite+aiosqlite:///x.db"


def test_a_url_object_is_accepted_in_code() -> None:
    """SQLAlchemy's own URL is as good as a string."""
    url = URL.create("postgresql", "u", "p@:/", "h", database="d")
    connection_url = DatabaseSettings(url=url).connection_url()
    assert connection_url == url.set(drivername="postgresql+asyncpg")


@pytest.mark.parametrize(
    ("missing", "written", "in_use"),
    [
        ({"asyncpg"}, "postgresql://h/d", "postgresql+psycopg://h/d"),
        ({"asyncmy"}, "mariadb://h/d", "mysql+aiomysql://h/d"),
    ],
)
def test_the_second_driver_stands_in_for_the_first(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], written: str, in_use: str
) -> None:
    """A URL without a driver takes the one that is installed."""
    without_drivers(monkeypatch, missing)
    assert url_in_use(url=written) == in_use


@pytest.mark.parametrize(
    ("missing", "written", "extra"),
    [
        ({"asyncpg", "psycopg"}, "postgres://u:{}@h/d", "sanic-db-bp[postgresql]"),
        ({"psycopg"}, "postgresql+psycopg://u:{}@h/d", "sanic-db-bp[psycopg]"),
        ({"asyncpg"}, "postgresql+asyncpg://u:{}@h/d", "sanic-db-bp[postgresql]"),
        ({"asyncmy", "aiomysql"}, "mysql://u:{}@h/d", "sanic-db-bp[mysql]"),
        ({"aiomysql"}, "mysql+aiomysql://u:{}@h/d", "sanic-db-bp[aiomysql]"),
        ({"aiosqlite"}, "sqlite:///x.db?note={}", "sanic-db-bp[sqlite]"),
    ],
)
def test_a_missing_driver_is_told_with_the_extra_to_install(
    monkeypatch: pytest.MonkeyPatch, missing: set[str], written: str, extra: str
) -> None:
    """The error names the package to install, and the variable."""
    without_drivers(monkeypatch, missing)
    text = str(refused(url=written.format(SECRET)))
    assert extra in text
    assert "SANIC_DB_URL" in text
    assert "importing it failed" not in text
    assert SECRET not in text


def test_a_driver_that_cannot_be_imported_is_as_good_as_missing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Such as a psycopg without its library: another driver is used, or the error tells why."""
    (tmp_path / "psycopg.py").write_text("raise ImportError('no pq wrapper available')")
    (tmp_path / "asyncpg.py").write_text("raise ImportError('wrong architecture')")
    monkeypatch.delitem(sys.modules, "psycopg", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    text = str(refused(url=f"postgresql+psycopg://u:{SECRET}@h/d"))
    assert "failed: no pq wrapper available" in text
    assert "sanic-db-bp[psycopg]" in text
    assert SECRET not in text
    monkeypatch.delitem(sys.modules, "asyncpg", raising=False)
    assert "failed: wrong architecture" in str(refused(url="postgresql://h/d"))


def without_drivers(monkeypatch: pytest.MonkeyPatch, missing: set[str]) -> None:
    for name in missing:
        monkeypatch.setitem(sys.modules, name, None)


@pytest.mark.parametrize(
    ("written", "instead"),
    [
        ("postgresql+psycopg2://u:{}@h/d", "postgresql+asyncpg"),
        ("postgres+pg8000://u:{}@h/d", "postgresql+asyncpg"),
        ("mysql+pymysql://u:{}@h/d", "mysql+asyncmy"),
        ("mariadb+mysqldb://u:{}@h/d", "mysql+asyncmy"),
        ("mysql+mysqlconnector://u:{}@h/d", "mysql+asyncmy"),
        ("sqlite+pysqlite:///x.db?note={}", "sqlite+aiosqlite"),
    ],
)
def test_a_driver_that_blocks_is_refused_with_one_that_does_not(written: str, instead: str) -> None:
    """The error says what to write in its place."""
    text = str(refused(url=written.format(SECRET)))
    assert "block the event loop" in text
    assert instead in text
    assert SECRET not in text


@pytest.mark.parametrize(
    "written",
    [
        "",
        "shop.db",
        "postgresql:/u:{}@h/d",
        "jdbc:postgresql://h/d?password={}",
        "postgresql://u:{}@h:port/d",
        "postgresql://u:{}@h:99999/d",
        "postgresql://u:{}@h:0/d",
        "mssql://u:{}@h/d",
        "oracle+oracledb://u:{}@h/d",
        "postgresql://u:a@{}@h/d",
        "postgresql://h/d?sslpassword={}",
        "postgresql://h/d?PASSWORD={}",
    ],
)
def test_what_is_no_usable_url_is_refused(written: str) -> None:
    """A wrong URL is told by its variable, and never repeated: a password may be part of it."""
    error = refused(url=written.format(SECRET))
    assert [problem.variable for problem in error.problems] == ["SANIC_DB_URL"]
    assert SECRET not in str(error) + repr(error)


def test_a_url_of_another_type_is_not_shown() -> None:
    """Nor is what is no text: it may be one for somebody."""
    error = refused(url=f"postgresql://u:{SECRET}@h/d".encode())
    assert "a URL is a string, not bytes" in str(error)
    assert SECRET not in str(error) + repr(error)


def test_a_wrong_url_is_in_no_traceback() -> None:
    """What stands in the place of the port may be the rest of a password."""
    with pytest.raises(ConfigurationError) as caught:
        parse_url(f"postgresql://u:p@h:{SECRET}/d")
    assert SECRET not in "".join(traceback.format_exception(caught.value))


def test_a_wrong_plain_url_is_told_by_its_own_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who has set DATABASE_URL is not sent to look for another variable."""
    monkeypatch.setenv("DATABASE_URL", f"mssql://u:{SECRET}@h/d")
    assert "DATABASE_URL" in str(refused())


def test_the_password_completes_the_url() -> None:
    """PASSWORD goes into the URL, escaped, and into READ_URL unless that has one of its own."""
    both = DatabaseSettings(
        url="postgresql://u@h/d", read_url="postgresql://r:own@replica/d", password="a@:/b"
    )
    assert both.connection_url() == URL.create(
        "postgresql+asyncpg", "u", "a@:/b", "h", database="d"
    )
    read_url = both.connection_url(read_only=True)
    assert read_url is not None
    assert (read_url.host, read_url.password) == ("replica", "own")

    one = DatabaseSettings(
        url="postgresql://u@h/d", read_url="postgresql://r@replica/d", password="x"
    )
    read_url = one.connection_url(read_only=True)
    assert read_url is not None
    assert read_url.password == "x"


def test_the_password_wins_over_that_of_the_url() -> None:
    """The URL may be that of an old configuration, the password the one of today."""
    both = DatabaseSettings(url="postgresql://u:old@h/d", password="new")
    for read_only in (False, True):
        url = both.connection_url(read_only=read_only)
        assert url is not None
        assert url.password == "new"


def test_without_a_read_url_reading_goes_to_the_database_itself() -> None:
    """READ_URL is optional, and so is the URL."""
    loaded = DatabaseSettings(url="postgresql://u@h/d", password="x")
    assert loaded.connection_url(read_only=True) == loaded.connection_url()
    assert DatabaseSettings(password="x").connection_url(read_only=True) is None


# What is refused


def test_every_wrong_variable_is_listed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """One start shows all there is to mend: each variable, the reason and what is expected."""
    wrong = {
        "URL": f"mssql://u:{SECRET}@h/d",
        "READ_URL": SECRET,
        "POOL_SIZE": f"1{SECRET}",
        "MAX_OVERFLOW": "-1",
        "POOL_TIMEOUT": "0",
        "POOL_RECYCLE": "-2",
        "POOL_PRE_PING": SECRET,
        "MAX_CONNECTIONS": "0",
        "STATEMENT_TIMEOUT": "-1",
        "IDLE_IN_TRANSACTION_TIMEOUT": SECRET,
        "ISOLATION_LEVEL": SECRET,
        "COMMIT": SECRET,
        "EXPIRE_ON_COMMIT": SECRET,
        "PGBOUNCER": SECRET,
        "STARTUP_TIMEOUT": "-1",
        "CREATE_TABLES": SECRET,
        "ECHO": SECRET,
        "SLOW_QUERY_MS": "0",
        "ENGINE_OPTIONS": f'{{"{SECRET}"',
        "CONNECT_ARGS": f'["{SECRET}"]',
    }
    for name, value in wrong.items():
        monkeypatch.setenv(f"SANIC_DB_{name}", value)
    error = refused()
    assert {problem.variable for problem in error.problems} == {f"SANIC_DB_{n}" for n in wrong}
    assert all(problem.reason and problem.remedy for problem in error.problems)
    text = str(error)
    assert text.startswith("20 wrong database settings:")
    assert all(f"SANIC_DB_{name}: " in text for name in wrong)
    assert SECRET not in text + repr(error)


def test_one_wrong_setting_is_told_in_the_singular() -> None:
    """The text is written for a reader."""
    assert str(refused(pool_size=0)).startswith(
        "1 wrong database setting:\n  - SANIC_DB_POOL_SIZE: "
    )


def test_the_refusal_has_no_trace_of_its_origin() -> None:
    """The validation error that came before has the values in it, so it is not chained."""
    error = refused(url=f"mssql://u:{SECRET}@h/d")
    assert error.__cause__ is None
    assert error.__suppress_context__
    assert SECRET not in str(refused(pool_size=SECRET).__context__)


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e12"])
def test_numbers_that_no_clock_can_count_are_refused(name: str, value: str) -> None:
    """Infinity and what is longer than a timer can run are wrong settings, not a later crash."""
    error = refused(**{name.lower(): value})
    assert [problem.variable for problem in error.problems] == [f"SANIC_DB_{name}"]


@pytest.mark.parametrize(
    "value",
    ["[" * 100_000, '{"a": ' * 5_000, '{"a": ' + "9" * 5_000 + "}", "[1]", "null", "1", "{"],
)
@pytest.mark.parametrize("name", ["engine_options", "connect_args"])
def test_what_is_no_json_object_is_refused(name: str, value: str) -> None:
    """However deep or long it is."""
    error = refused(**{name: value})
    assert [problem.variable for problem in error.problems] == [f"SANIC_DB_{name.upper()}"]


def test_an_env_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """The error names ENV_FILE, and shows nothing of the file."""
    (tmp_path / ".env").write_bytes(b"SANIC_DB_PASSWORD=\xff\xfe" + SECRET.encode())
    error = refused()
    assert [problem.variable for problem in error.problems] == ["SANIC_DB_ENV_FILE"]
    assert SECRET not in str(error)


def test_a_secret_that_is_not_text_is_refused(tmp_path: Path) -> None:
    """A binary file among the secrets is told by the folder's variable."""
    (tmp_path / "sanic_db_password").write_bytes(b"\xff" + SECRET.encode())
    error = refused(secrets_dir=str(tmp_path))
    assert [problem.variable for problem in error.problems] == ["SANIC_DB_SECRETS_DIR"]
    assert SECRET not in str(error)


@pytest.mark.parametrize("kind", ["file", "missing", "long" * 2000, "nul\0"])
def test_a_secrets_folder_that_is_none_is_refused(tmp_path: Path, kind: str) -> None:
    """A folder that was asked for by name must be there."""
    (tmp_path / "file").write_text(SECRET)
    error = refused(secrets_dir=str(tmp_path / kind))
    assert [problem.variable for problem in error.problems] == ["SANIC_DB_SECRETS_DIR"]
    assert SECRET not in str(error)


@pytest.mark.parametrize("name", ["env_file", "secrets_dir"])
def test_a_home_of_nobody_is_refused(name: str) -> None:
    """No user of that name is here to have one."""
    error = refused(**{name: "~nobody-of-this-name/shop"})
    assert [problem.variable for problem in error.problems] == [f"SANIC_DB_{name.upper()}"]


@pytest.mark.parametrize("value", [3, 1.5, ["a"], {"a": 1}, b"\xff"])
@pytest.mark.parametrize("name", ["env_file", "secrets_dir"])
def test_files_are_named_by_a_string(name: str, value: object) -> None:
    """Any other type is a wrong setting, not a TypeError."""
    error = refused(**{name: value})
    assert [problem.variable for problem in error.problems] == [f"SANIC_DB_{name.upper()}"]


def test_an_unknown_argument_is_refused() -> None:
    """A misspelt setting in code does not pass in silence."""
    with pytest.raises(InvalidSettings, match=r"(?i)pool_sise"):
        DatabaseSettings(pool_sise=3)


@pytest.mark.parametrize(
    ("url", "level", "known"),
    [
        ("sqlite:///x.db", "REPEATABLE READ", "READ UNCOMMITTED and SERIALIZABLE"),
        ("postgresql+asyncpg://h/d", "READ UNCOMMITTED", "READ COMMITTED and REPEATABLE READ"),
    ],
)
def test_an_isolation_level_that_the_database_does_not_know_is_refused(
    url: str, level: str, known: str
) -> None:
    """The start does not wait for it to learn another."""
    error = refused(url=url, isolation_level=level)
    assert "SANIC_DB_ISOLATION_LEVEL" in str(error)
    assert known in str(error)


# Secrets


@pytest.mark.parametrize(
    "values",
    [
        {"url": f"postgresql://u:{SECRET}@h/d"},
        {"url": f"postgresql://u:{SECRET}@h/d", "read_url": f"postgresql://u:{SECRET}@h/d"},
        {"url": "postgresql://u@h/d", "password": SECRET},
        {"url": f"postgresql://h/d?user=u&password={SECRET}"},
        {"url": f"mysql://h/d?user=u&passwd={SECRET}"},
        {"connect_args": {"password": SECRET}},
        {"connect_args": json.dumps({"password": SECRET})},
        {"engine_options": {"connect_args": {"password": SECRET}}},
        {"url": "postgresql://u@h/d", "read_url": f"postgresql://u:{SECRET}@h/d"},
        {"url": "postgresql://u@h/d", "password": lambda: SECRET},
    ],
)
def test_no_secret_is_shown(values: dict[str, Any]) -> None:
    """Neither the settings nor the database that uses them show a password."""
    loaded = DatabaseSettings(**values)
    database = Database(loaded)
    shown = f"{loaded!r} {loaded!s} {database!r} {database.url!s} {database.url!r}"
    assert SECRET not in shown
    assert SECRET not in repr(loaded.model_dump()) + repr(loaded.model_dump(mode="json"))
    assert SECRET not in loaded.model_dump_json()


def test_what_is_dumped_tells_which_options_there_are() -> None:
    """By their names alone; also those that JSON has no form for, and a password's function."""
    loaded = DatabaseSettings(
        password=lambda: SECRET,
        connect_args={"ssl": object(), "passfile": SECRET},
        engine_options={"echo_pool": True},
    )
    dumped = json.loads(loaded.model_dump_json())
    hidden = "**********"
    assert dumped["password"] == hidden
    assert dumped["connect_args"] == {"ssl": hidden, "passfile": hidden}
    assert dumped["engine_options"] == {"echo_pool": hidden}
    assert SECRET not in str(loaded.model_dump())


def test_credentials_among_the_parameters_are_used() -> None:
    """libpq's form of a URL means the same as the usual one, and the last of several counts."""
    assert url_in_use(url="postgresql://h/d?user=u&password=p") == ("postgresql+asyncpg://u:p@h/d")
    several = "postgresql://h/d?user=x&user=u&password=x&password=p"
    assert url_in_use(url=several) == "postgresql+asyncpg://u:p@h/d"


unhurried = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    database=None,
    # It judges by the clock.
    suppress_health_check=[HealthCheck.too_slow],
)

anything = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(),
    st.binary(),
    st.lists(st.text()),
    st.dictionaries(st.text(), st.text()),
    st.sampled_from(["1e400", "9" * 5000, "-0", "0x10", "\x00", "\udcff", "{}", "{" * 2000, "\n"]),
    st.builds("{}://{}:{}@{}/{}?{}".format, *[st.text(max_size=8)] * 6),
)


@unhurried
@given(st.dictionaries(st.sampled_from(sorted(DatabaseSettings.model_fields)), anything))
def test_any_value_in_code_is_taken_or_refused(values: dict[str, Any]) -> None:
    """Whatever is given, the settings are valid or the error is the documented one."""
    try:
        told = repr(DatabaseSettings(**{"env_file": None, **values}))
    except InvalidSettings as error:
        told = str(error)
    assert "\n  - SANIC_DB_" in told or told.startswith("DatabaseSettings(")


hostile = st.one_of(
    st.just(SECRET),
    st.builds(lambda before, after: before + SECRET + after, *[st.text(max_size=6)] * 2),
    st.builds(f"postgresql://{{}}:{SECRET}@{{}}/{{}}".format, *[st.text(max_size=6)] * 3),
    st.builds(f"{{}}+{{}}://u:{SECRET}@h/d".format, *[st.text(max_size=6)] * 2),
    st.builds(lambda key: json.dumps({key: SECRET}), st.text(max_size=6)),
).filter(lambda text: "\0" not in text and text.isprintable())


@unhurried
@given(
    st.dictionaries(
        # The names of files are no secrets.
        st.sampled_from(sorted(DatabaseSettings.model_fields.keys() - {"env_file", "secrets_dir"})),
        hostile,
        min_size=1,
    )
)
def test_no_value_of_the_environment_is_shown(values: dict[str, str]) -> None:
    """Whichever variable holds a secret by mistake, no error and no repr gives it away."""
    environment = {f"SANIC_DB_{name.upper()}": value for name, value in values.items()}
    with patch.dict(os.environ, environment):
        try:
            shown = repr(DatabaseSettings(env_file=None))
        except InvalidSettings as error:
            shown = f"{error!s} {error!r}"
    assert SECRET not in shown


# The files in config/


def test_the_reference_file_is_fresh(tmp_path: Path) -> None:
    """config/reference.env is what config/generate.py makes of the settings class."""
    target = tmp_path / "reference.env"
    subprocess.run(
        [sys.executable, ROOT / "config" / "generate.py", target],
        check=True,
        timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert target.read_text() == (ROOT / "config" / "reference.env").read_text(), (
        "stale: run 'python config/generate.py'"
    )


@pytest.mark.parametrize(
    ("name", "driver"),
    [
        ("sqlite", "sqlite+aiosqlite"),
        ("postgresql", "postgresql+asyncpg"),
        ("mariadb", "mysql+asyncmy"),
        ("reference", None),
    ],
)
def test_the_files_in_config_are_valid(tmp_path: Path, name: str, driver: str | None) -> None:
    """Each of them loads as it is, and once more with every commented setting switched on."""
    source = ROOT / "config" / f"{name}.env"
    loaded = DatabaseSettings(env_file=str(source))
    assert (loaded.url and loaded.url.drivername) == driver

    everything = tmp_path / "all.env"
    lines = source.read_text().splitlines()
    names = [line.lstrip("#").partition("=")[0] for line in lines if is_setting(line)]
    switched_on = (line.lstrip("#") if is_setting(line) else line for line in lines)
    # A folder of this name may not be here, and there is one password.
    left_out = ("SANIC_DB_SECRETS_DIR", "SANIC_DB_PASSWORD_FILE")
    kept = [line for line in switched_on if not line.startswith(left_out)]
    everything.write_text("\n".join(kept))
    DatabaseSettings(env_file=str(everything))
    assert {line.removeprefix("SANIC_DB_") for line in names} <= NAMES
    if name == "reference":
        assert {line.removeprefix("SANIC_DB_") for line in names} == NAMES


def is_setting(line: str) -> bool:
    return line.lstrip("#").startswith("SANIC_DB_")
