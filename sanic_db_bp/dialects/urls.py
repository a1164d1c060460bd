"""Database URLs as people have them, and which kind of database each of them names."""

from __future__ import annotations

from collections.abc import Mapping

from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError

from ..exceptions import ConfigurationError
from .base import Backend, last_value
from .mysql import MySQL
from .postgresql import PostgreSQL
from .sqlite import SQLite

BACKENDS: Mapping[str, Backend] = {
    spelling: backend
    for backend in (PostgreSQL(), MySQL(), SQLite())
    for spelling in backend.spellings
}


def parse_url(value: str | URL) -> URL:
    """Return a database URL in SQLAlchemy's form, with the asyncio driver to use.

    Args:
        value: the URL as people have it: ``postgres://``, ``postgresql://``, ``mysql://``,
            ``mariadb://`` or ``sqlite:///``, with or without a driver.

    Raises:
        ConfigurationError: it is no URL, or of a database or driver that cannot be used. The
            message never has the URL in it, because the URL may have a password.
    """
    try:
        url = make_url(value.strip() if isinstance(value, str) else value)
    except (ArgumentError, ValueError):
        raise ConfigurationError(
            "not a database URL. Write it as postgresql://user:password@host:5432/name, "
            "mysql://user:password@host:3306/name or sqlite:///file.db",
            entry="not-a-database-url",
        ) from None
    url = _with_credentials_in_place(url.set(drivername=url.drivername.lower()))
    if url.host and "@" in url.host:
        raise ConfigurationError(
            "the password has a character with a meaning of its own in a URL. Write @ as %40, : as "
            "%3A and / as %2F, or give the password in PASSWORD",
            entry="password-in-url",
        )
    if url.port is not None and not 0 < url.port < 65536:
        raise ConfigurationError(
            "the port is not a number from 1 to 65535", entry="not-a-database-url"
        )
    if not str(last_value(url.query.get("connect_timeout", "1"))).isdecimal():
        raise ConfigurationError(
            "connect_timeout is not a number of seconds", entry="not-a-database-url"
        )
    backend = backend_of(url)
    resolved = backend.resolve(url)
    backend.check(resolved)
    return resolved


def _with_credentials_in_place(url: URL) -> URL:
    """Move user and password out of the query, where they would be shown."""
    query = dict(url.query)
    user, password = query.pop("user", None), query.pop("password", query.pop("passwd", None))
    if any("pass" in name.lower() for name in query.keys() - {"passfile"}):
        raise ConfigurationError(
            "a secret does not belong into the query. Give it in CONNECT_ARGS",
            entry="secret-in-query",
        )
    return url.set(
        username=last_value(user),
        password=last_value(password),
        query=query,
    )


def backend_of(url: URL) -> Backend:
    """Return the kind of database that a URL names.

    Raises:
        ConfigurationError: this package does not know it.
    """
    name = url.drivername.partition("+")[0]
    try:
        return BACKENDS[name]
    except KeyError:
        raise ConfigurationError(
            f"'{name}' is not a database that this package knows. "
            f"It knows {', '.join(sorted(BACKENDS))}",
            entry="unknown-database",
        ) from None


def is_memory(url: URL) -> bool:
    """Whether a URL asks for a SQLite database that lives in memory."""
    return url.drivername.startswith("sqlite") and url.database in (None, "", ":memory:")
