"""PostgreSQL: connect arguments of its two drivers, timeouts, read-only mode, TLS."""

from __future__ import annotations

import re
import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from sqlalchemy import event, text
from sqlalchemy.engine import URL

from ..exceptions import ConfigurationError
from .base import CONNECT_TIMEOUT, DDL_LOCK, Backend, Driver, in_milliseconds, last_value
from .tls import SYSTEM, check_files, tls_context

if TYPE_CHECKING:
    from sqlalchemy import Connection, Engine
    from sqlalchemy.engine import ExceptionContext

    from ..settings import DatabaseSettings

READ_ONLY = ("default_transaction_read_only",)
"""The parameters that keep a connection from writing."""

LOOK_FOR_CLIENT = ("client_connection_check_interval", "1000")
"""How often, in milliseconds, a working server looks whether its client is still there."""

LAST_WORDS = frozenset(
    {
        "57P01",  # admin_shutdown, also pg_terminate_backend
        "57P02",  # crash_shutdown
        "57P04",  # database_dropped
        "57P05",  # idle_session_timeout
        "25P03",  # idle_in_transaction_session_timeout
        "25P04",  # transaction_timeout
        "08003",  # connection_does_not_exist, by asyncpg
        "08006",  # connection_failure
    }
)
"""The errors with which a server ends a connection."""


class PostgreSQL(Backend):
    """PostgreSQL through asyncpg or psycopg 3."""

    name = "postgresql"
    spellings = frozenset({"postgres", "postgresql"})
    drivers = (Driver("asyncpg", "postgresql"), Driver("psycopg", "psycopg"))

    _IN_FAILED_TRANSACTION = "25P02"
    # reserved_connections is there from PostgreSQL 16 on.
    connection_limit = """
        SELECT least(
            current_setting('max_connections')::int
            - current_setting('superuser_reserved_connections')::int
            - coalesce(current_setting('reserved_connections', true), '0')::int,
            (SELECT nullif(datconnlimit, -1) FROM pg_database WHERE datname = current_database()),
            (SELECT nullif(rolconnlimit, -1) FROM pg_roles WHERE rolname = current_user)
        )
        """

    _MODES = ("disable", "allow", "prefer", "require", "verify-ca", "verify-full")

    _TLS = frozenset(
        {
            "sslmode",
            "sslcert",
            "sslkey",
            "sslpassword",
            "sslrootcert",
            "sslcrl",
            "ssl_min_protocol_version",
            "ssl_max_protocol_version",
            "sslnegotiation",
            "passfile",
        }
    )

    _LIBPQ_ONLY = frozenset(
        {
            "channel_binding",
            "gssencmode",
            "keepalives",
            "keepalives_idle",
            "keepalives_interval",
            "keepalives_count",
            "tcp_user_timeout",
        }
    )

    def check(self, url: URL) -> None:
        tls = {name: str(last_value(url.query[name])) for name in self._TLS & url.query.keys()}
        mode = tls.get("sslmode", "verify-full")
        if mode not in self._MODES:
            raise ConfigurationError(
                f"sslmode is none of those that are possible here: {', '.join(self._MODES)}",
                entry="tls",
            )
        if mode != "disable":
            check_files(tls)
        if tls.get("sslrootcert") == SYSTEM and mode != "verify-full":
            # libpq refuses it, and asyncpg takes it for the name of a file.
            raise ConfigurationError("sslrootcert=system needs sslmode=verify-full", entry="tls")

    def connect_args(
        self, url: URL, settings: DatabaseSettings, *, read_only: bool
    ) -> tuple[URL, dict[str, Any]]:
        parameters = self._server_parameters(settings, read_only=read_only)
        if url.drivername.endswith("+asyncpg"):
            return self._asyncpg(url, parameters, settings)
        return self._psycopg(url, parameters, settings)

    def _server_parameters(self, settings: DatabaseSettings, *, read_only: bool) -> dict[str, str]:
        if settings.pgbouncer:
            return {}
        parameters = {}
        if settings.statement_timeout:
            parameters["statement_timeout"] = in_milliseconds(settings.statement_timeout)
        if settings.idle_in_transaction_timeout:
            parameters["idle_in_transaction_session_timeout"] = in_milliseconds(
                settings.idle_in_transaction_timeout
            )
        if read_only:
            parameters.update(dict.fromkeys(READ_ONLY, "on"))
        return parameters

    def _asyncpg(
        self, url: URL, parameters: dict[str, str], settings: DatabaseSettings
    ) -> tuple[URL, dict[str, Any]]:
        query = {name: value for name, value in url.query.items() if name not in self._LIBPQ_ONLY}
        arguments: dict[str, Any] = {
            "timeout": float(last_value(query.pop("connect_timeout", CONNECT_TIMEOUT)))
        }
        if "application_name" in query:
            parameters["application_name"] = str(last_value(query.pop("application_name")))
        if "options" in query:
            asked_for = re.findall(r"-c\s*([\w.]+)=(\S+)", str(last_value(query.pop("options"))))
            parameters = {**dict(asked_for), **parameters}
        tls = {name: last_value(query.pop(name)) for name in sorted(self._TLS & query.keys())}
        if tls.get("sslrootcert") == SYSTEM:
            arguments["ssl"] = tls_context(tls)
        elif tls:
            # asyncpg reads libpq's own names from a DSN, with libpq's meaning.
            arguments["dsn"] = URL.create("postgresql", query=tls).render_as_string()
        if parameters:
            arguments["server_settings"] = parameters
        if settings.pgbouncer:
            arguments["statement_cache_size"] = 0
        return url.set(query=query), arguments

    def _psycopg(
        self, url: URL, parameters: dict[str, str], settings: DatabaseSettings
    ) -> tuple[URL, dict[str, Any]]:
        arguments: dict[str, Any] = {
            "keepalives_idle": 30,
            "keepalives_interval": 10,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
            "connect_timeout": CONNECT_TIMEOUT,
        }
        arguments = {name: value for name, value in arguments.items() if name not in url.query}
        options = " ".join(f"-c {name}={value}" for name, value in parameters.items())
        if options:
            asked_for = last_value(url.query.get("options", ""))
            arguments["options"] = f"{asked_for} {options}".strip()
            url = url.difference_update_query(["options"])
        if settings.pgbouncer:
            arguments["prepare_threshold"] = None
        return url, arguments

    def prepare(self, engine: Engine, settings: DatabaseSettings, *, read_only: bool) -> None:
        event.listen(engine, "handle_error", _know_the_last_word)
        if not settings.pgbouncer:
            _look_for_client(engine.dialect)

    def engine_options(self, settings: DatabaseSettings, *, read_only: bool) -> dict[str, Any]:
        if read_only and settings.pgbouncer:
            # Behind a transaction pooler nothing may be set for a whole connection.
            return {"execution_options": {"postgresql_readonly": True}}
        return {}

    def with_users(self, ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        merged = super().with_users(ours, theirs)
        if "server_settings" in theirs:
            read_only = {k: v for k, v in ours.get("server_settings", {}).items() if k in READ_ONLY}
            merged["server_settings"] = {
                **ours.get("server_settings", {}),
                **theirs["server_settings"],
                **read_only,
            }
        if "options" in theirs:
            # The last one wins: theirs over the timeouts, but nothing over reading alone.
            left = str(ours.get("options", ""))
            read_only_options = " ".join(f"-c {name}=on" for name in READ_ONLY if name in left)
            merged["options"] = f"{left} {theirs['options']} {read_only_options}".strip()
        return merged

    def is_closed(self, driver_connection: Any) -> bool:
        if hasattr(driver_connection, "is_closed"):
            return bool(driver_connection.is_closed())
        return bool(driver_connection.closed) or _has_unread_input(driver_connection.fileno())

    @contextmanager
    def ddl_lock(self, connection: Connection) -> Iterator[None]:
        connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": DDL_LOCK})
        yield

    def _lost_a_race(self, driver_error: BaseException) -> bool:
        return getattr(driver_error, "sqlstate", None) in {"40001", "40P01"}

    def is_whole(self, dbapi_connection: Any) -> bool:
        # COMMIT of an aborted transaction is answered with ROLLBACK, which no driver looks at.
        try:
            dbapi_connection.cursor().execute("SELECT 1")
        except Exception as error:
            if getattr(error, "sqlstate", None) != self._IN_FAILED_TRANSACTION:
                # Such as a lost connection, on which some drivers' COMMIT does nothing at all.
                raise
            return False
        return True


def _know_the_last_word(context: ExceptionContext) -> None:
    """Take the connection for lost where the server has said so, and its socket is open still."""
    driver_error = context.original_exception
    if getattr(driver_error, "sqlstate", None) in LAST_WORDS or (
        # asyncpg's own state after an error that no statement was waiting for.
        str(driver_error).startswith("cannot switch to state")
    ):
        context.is_disconnect = True


def _look_for_client(dialect: Any) -> None:
    """Have the server end a statement whose client is gone.

    A driver asks it to over another connection, but a server that has not read the statement yet
    ignores that ("Canceling Requests in Progress" in PostgreSQL's documentation), and nobody asks
    for a process that was killed.
    """
    connect = dialect.connect
    refused = False

    def connect_and_look(*args: Any, **arguments: Any) -> Any:
        nonlocal refused
        if not refused:
            try:
                return connect(*args, **_looking_for_client(dialect.driver, arguments))
            except Exception as error:
                # Servers before PostgreSQL 14 do not know it, those on Windows cannot do it.
                if LOOK_FOR_CLIENT[0] not in str(error):
                    raise
                refused = True
        return connect(*args, **arguments)

    dialect.connect = connect_and_look


def _looking_for_client(driver: str, arguments: dict[str, Any]) -> dict[str, Any]:
    name, value = LOOK_FOR_CLIENT
    if driver == "asyncpg":
        server_settings = {name: value, **arguments.get("server_settings", {})}
        return {**arguments, "server_settings": server_settings}
    # The last one wins: theirs over ours.
    options = f"-c {name}={value} {arguments.get('options', '')}".strip()
    return {**arguments, "options": options}


def _has_unread_input(descriptor: int) -> bool:
    # An idle server only speaks to say that it is going away.
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))
