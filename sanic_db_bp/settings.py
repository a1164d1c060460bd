"""The settings of one database: typed, validated, secrets masked."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    SecretStr,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    DotEnvSettingsSource,
    EnvSettingsSource,
    NoDecode,
    PydanticBaseSettingsSource,
    SecretsSettingsSource,
    SettingsConfigDict,
    SettingsError,
)
from sqlalchemy.engine import URL

from .dialects import parse_url
from .exceptions import ConfigurationError, InvalidSettings, SettingProblem
from .passwords import RotatingPassword

DEFAULT_PREFIX = "SANIC_DB_"

HIDDEN = "**********"
"""Stands for a value that may be a secret, as pydantic writes it."""

LONGEST = 2_000_000
"""Seconds: a bit less than what the strictest of the servers takes for a timeout."""


def _parsed_url(value: Any) -> Any:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if not isinstance(value, str | URL):
        raise ValueError(f"a URL is a string, not {type(value).__name__}")
    try:
        return parse_url(value)
    except ConfigurationError as error:
        raise ValueError(error.message) from None


def _parsed_mapping(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        raise ValueError("not a JSON object") from None


def _rotating(value: Any) -> Any:
    return RotatingPassword(value) if callable(value) else value


def _masked(url: URL) -> str:
    return str(url)


def _without_values(options: dict[str, Any]) -> dict[str, str]:
    # Nobody knows which of them are secret.
    return dict.fromkeys(options, HIDDEN)


DatabaseURL = Annotated[
    URL,
    BeforeValidator(_parsed_url),
    PlainSerializer(_masked, return_type=str),
    WithJsonSchema({"type": "string", "format": "uri"}),
]
Password = Annotated[
    SecretStr | RotatingPassword,
    BeforeValidator(_rotating),
    PlainSerializer(lambda password: HIDDEN, return_type=str, when_used="json-unless-none"),
    WithJsonSchema({"type": "string", "format": "password", "writeOnly": True}),
]
Options = Annotated[
    dict[str, Any],
    NoDecode,
    BeforeValidator(_parsed_mapping),
    PlainSerializer(_without_values, return_type=dict[str, str]),
]


class DatabaseSettings(BaseSettings):
    """What one database is and how it is used.

    A value is taken from, first to last: arguments in code, the environment, ``DATABASE_URL`` (for
    the URL alone), the file ``ENV_FILE``, the folder ``SECRETS_DIR``, the default. The names in
    the environment have the prefix ``SANIC_DB_``; a blueprint of another name has its own.

    Raises:
        InvalidSettings: with every wrong setting, by the name of its variable.
    """

    model_config = SettingsConfigDict(
        env_prefix=DEFAULT_PREFIX,
        env_ignore_empty=True,
        extra="ignore",
        frozen=True,
        hide_input_in_errors=True,
        arbitrary_types_allowed=True,
    )

    url: Annotated[DatabaseURL | None, NoDecode] = Field(
        None,
        description=(
            "The database, as a URL: postgresql://user:password@host:5432/name, "
            "mysql://user:password@host:3306/name or sqlite:///file.db. Without it the app has a "
            "SQLite file of its own name."
        ),
        examples=["postgresql://shop@localhost:5432/shop"],
    )
    password: Password | None = Field(
        None,
        description="The password, if it is not part of the URL. In code also a function that "
        "returns it, called for each new connection.",
        examples=["change-me"],
    )
    password_file: str | None = Field(
        None,
        repr=False,
        description="A file with the password, read again for each new connection.",
        examples=["/run/secrets/database-password"],
    )
    read_url: Annotated[DatabaseURL | None, NoDecode] = Field(
        None,
        description="Where read sessions read, such as a replica. Without it, the database itself.",
        examples=["postgresql://shop@replica:5432/shop"],
    )
    pool_size: int = Field(
        10,
        ge=1,
        le=10_000,
        description="Connections that one worker keeps open for read-write sessions, and as many "
        "for read sessions once one is used. SQLite has one for writing, whatever is set here.",
    )
    max_overflow: int = Field(
        0, ge=0, le=10_000, description="Connections that may be opened beyond that for a while."
    )
    pool_timeout: float = Field(
        10,
        gt=0,
        le=LONGEST,
        description="Seconds to wait for a free connection before the answer is 503.",
    )
    pool_recycle: float = Field(
        1800,
        ge=-1,
        le=LONGEST,
        description="Seconds after which a connection is replaced; -1 for never.",
    )
    pool_pre_ping: bool = Field(
        False,
        description="Ask the server before each use of a connection whether it still answers. "
        "Without it, closed connections are noticed all the same, at no cost.",
    )
    max_connections: int | None = Field(
        None,
        ge=1,
        description="Connections of the whole server, divided among its workers and their two "
        "pools. Without it, every pool has POOL_SIZE + MAX_OVERFLOW.",
        examples=[80],
    )
    statement_timeout: float = Field(
        60,
        ge=0,
        le=LONGEST,
        description="Seconds after which the server ends a statement; 0 for never.",
    )
    idle_in_transaction_timeout: float = Field(
        60,
        ge=0,
        le=LONGEST,
        description="Seconds after which the server ends a transaction in which nothing happens; "
        "0 for never.",
    )
    isolation_level: (
        Literal["READ UNCOMMITTED", "READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"] | None
    ) = Field(
        None,
        description="The isolation level of every transaction. Without it, the database's own.",
        examples=["REPEATABLE READ"],
    )
    commit: Literal["auto", "manual"] = Field(
        "auto",
        description="auto: a handler that succeeds commits. manual: only session.commit() does.",
    )
    expire_on_commit: bool = Field(
        False, description="Whether objects are read anew when used after a commit."
    )
    pgbouncer: bool = Field(
        False,
        description="Set when a PgBouncer in transaction mode stands before PostgreSQL.",
    )
    startup_timeout: float = Field(
        20,
        ge=0,
        le=LONGEST,
        description="Seconds that the start waits for a database that is coming up; 0 to try once.",
    )
    create_tables: bool = Field(
        False,
        description="Create the missing tables of the blueprint's metadata at the start. For "
        "demos and tests.",
    )
    require_head: Literal["off", "warn", "refuse"] = Field(
        "off",
        description="What the start does about a database that lacks migrations: off: nothing. "
        "warn: log a warning. refuse: not start. Needs the MigrationsBlueprint.",
    )
    echo: bool = Field(False, description="Log every statement.")
    slow_query_ms: float | None = Field(
        None,
        gt=0,
        le=1000 * LONGEST,
        description="Milliseconds from which a statement is logged as slow.",
        examples=[200],
    )
    slow_query_parameters: bool = Field(
        False, description="Log a slow statement with its parameters, which may be secret."
    )
    engine_options: Options = Field(
        {},
        repr=False,
        description="More arguments for SQLAlchemy's create_async_engine, as a JSON object.",
        examples=['{"query_cache_size": 1000}'],
    )
    connect_args: Options = Field(
        {},
        repr=False,
        description="More arguments for the driver's connect, as a JSON object.",
        examples=['{"server_settings": {"jit": "off"}}'],
    )
    env_file: str | None = Field(".env", description="A file with settings, read if it is there.")
    secrets_dir: str | None = Field(
        None,
        description="A folder with one file a setting, named like its variable in lower case.",
        examples=["/run/secrets"],
    )

    def __init__(self, **values: Any) -> None:
        prefix = values.get("_env_prefix") or DEFAULT_PREFIX
        unknown = [name for name in values if name not in _FIELDS and not name.startswith("_")]
        if unknown:
            raise InvalidSettings([_unknown(name) for name in unknown])
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidSettings(list(_problems(error, prefix))) from None
        except SettingsError:
            raise InvalidSettings([_problem(prefix, "secrets_dir", "not text files")]) from None

    @field_validator("isolation_level")
    @classmethod
    def _known_to_database(cls, level: str | None, info: ValidationInfo) -> str | None:
        if level is None or "url" not in info.data:
            return level
        url = info.data["url"] or URL.create("sqlite+aiosqlite")
        dialect: Any = url.get_dialect()()
        known = dialect.get_isolation_level_values(None)
        if level not in known:
            levels = " and ".join(each for each in known if each != "AUTOCOMMIT")
            raise ValueError(f"this database knows {levels} alone")
        return level

    @classmethod
    def load(cls, prefix: str = DEFAULT_PREFIX, **values: Any) -> Self:
        """Return the settings with the given prefix in the environment.

        Args:
            prefix: how the variables' names begin, such as ``SANIC_REPORTS_``.
            **values: settings that win over the environment, by their name in lower case.

        Raises:
            InvalidSettings: with every wrong setting, by the name of its variable.
        """
        return cls(_env_prefix=prefix, **values)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources; the two that name other sources are looked up first."""
        prefix = getattr(env_settings, "env_prefix", DEFAULT_PREFIX)
        environment = _Environment(settings_cls, env_prefix=prefix)
        known: Mapping[str, Any] = {**environment(), **init_settings()}
        env_file = known.get("env_file", _FIELDS["env_file"].default)
        try:
            dotenv = _DotEnv(settings_cls, env_file=env_file, env_prefix=prefix)
        except (OSError, TypeError, ValueError, RuntimeError):
            raise InvalidSettings([_problem(prefix, "env_file", "not a text file")]) from None
        folder = known.get("secrets_dir", dotenv().get("secrets_dir"))
        if folder is not None and not _is_folder(folder):
            raise InvalidSettings([_problem(prefix, "secrets_dir", "not a folder")])
        secrets = SecretsSettingsSource(settings_cls, secrets_dir=folder, env_prefix=prefix)
        return init_settings, environment, dotenv, secrets

    @field_validator("password_file")
    @classmethod
    def _only_source(cls, path: str | None, info: ValidationInfo) -> str | None:
        if path is not None and info.data.get("password") is not None:
            raise ValueError("there is a PASSWORD too; give one of the two")
        return path

    def connection_url(self, *, read_only: bool = False) -> URL | None:
        """Return the URL to connect to, or None if there is none.

        The password is part of it, unless it rotates.
        """
        url = (self.read_url if read_only else None) or self.url
        if url is None or not self._takes_password(url):
            return url
        if not isinstance(self.password, SecretStr):
            return url
        return url.set(password=self.password.get_secret_value())

    def rotating_password(self, *, read_only: bool = False) -> RotatingPassword | None:
        """Return what to ask for the password of each new connection, if it rotates."""
        url = (self.read_url if read_only else None) or self.url
        if url is None or not self._takes_password(url):
            return None
        if self.password_file is not None:
            return RotatingPassword(Path(self.password_file))
        return self.password if isinstance(self.password, RotatingPassword) else None

    def _takes_password(self, url: URL) -> bool:
        if url.drivername.startswith("sqlite"):
            return False
        return not (url is self.read_url and url.password)


class _PlainDatabaseURL:
    """Takes the URL from ``DATABASE_URL`` if the variable with the prefix is not there."""

    env_prefix: str
    env_vars: Mapping[str, str | None]

    def __call__(self) -> dict[str, Any]:
        values: dict[str, Any] = super().__call__()  # type: ignore[misc]
        plain = self.env_vars.get("database_url")
        if plain and self.env_prefix == DEFAULT_PREFIX:
            values.setdefault("url", plain)
        return values


class _Environment(_PlainDatabaseURL, EnvSettingsSource):
    pass


class _DotEnv(_PlainDatabaseURL, DotEnvSettingsSource):
    pass


def _is_folder(path: object) -> bool:
    try:
        return isinstance(path, str) and Path(path).expanduser().is_dir()
    except (OSError, ValueError, RuntimeError):
        return False


_FIELDS = DatabaseSettings.model_fields


def _problems(error: ValidationError, prefix: str) -> Iterable[SettingProblem]:
    for problem in error.errors(include_url=False, include_context=False):
        reason = problem["msg"].removeprefix("Value error, ").rstrip(".")
        kind = type(problem["input"]).__name__
        yield _problem(prefix, str(problem["loc"][0]), f"{reason} (got a value of type {kind})")


def _problem(prefix: str, name: str, reason: str) -> SettingProblem:
    variable = f"{prefix}{name.upper()}"
    if name == "url" and prefix == DEFAULT_PREFIX and variable not in os.environ:
        variable = "DATABASE_URL" if "DATABASE_URL" in os.environ else variable
    return SettingProblem(variable, reason, f"Expected: {_FIELDS[name].description}")


def _unknown(name: str) -> SettingProblem:
    return SettingProblem(name, "no such setting", f"There are: {', '.join(_FIELDS)}")
