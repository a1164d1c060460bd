"""TLS as libpq's parameters ask for it (``sslmode``, ...), for drivers without them.

"SSL Support" in libpq's part of PostgreSQL's documentation has what the modes mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from ssl import CERT_NONE, SSLContext, SSLError, create_default_context
from typing import Any

from ..exceptions import ConfigurationError
from .base import last_value

SYSTEM = "system"
"""The ``sslrootcert`` that stands for the authorities which the system trusts."""

_NAMES = {
    "sslmode": "sslmode",
    "ssl_mode": "sslmode",
    "ssl-mode": "sslmode",
    "sslrootcert": "sslrootcert",
    "ssl_ca": "sslrootcert",
    "ssl-ca": "sslrootcert",
    "sslcert": "sslcert",
    "ssl_cert": "sslcert",
    "ssl-cert": "sslcert",
    "sslkey": "sslkey",
    "ssl_key": "sslkey",
    "ssl-key": "sslkey",
}
"""libpq's names, and those of MySQL and MariaDB that mean the same."""

_MODES = {
    "disable": "disable",
    "disabled": "disable",
    "require": "require",
    "required": "require",
    "verify-ca": "verify-ca",
    "verify_ca": "verify-ca",
    "verify-full": "verify-full",
    "verify_identity": "verify-full",
}
"""The same of the modes."""


def split_tls(query: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the parameters of a URL that ask for TLS, by libpq's names, and the others.

    Raises:
        ConfigurationError: one begins with ``ssl`` and is none that is known.
    """
    tls: dict[str, str] = {}
    others: dict[str, Any] = {}
    for name, value in query.items():
        if name in _NAMES:
            tls[_NAMES[name]] = str(last_value(value))
        elif name.startswith("ssl"):
            raise ConfigurationError(
                f"{name} is not a parameter of TLS that this package knows. It knows sslmode, "
                "sslrootcert, sslcert and sslkey; for more, give an ssl.SSLContext in CONNECT_ARGS",
                entry="tls",
            )
        else:
            others[name] = value
    return tls, others


def tls_context(parameters: Mapping[str, str]) -> SSLContext | None:
    """Return the context that carries out the parameters, or None for a connection in the clear.

    A certificate of an authority without a mode asks for ``verify-full``; with ``require`` it is
    verified too, as libpq does.

    Raises:
        ConfigurationError: the mode is unknown, or a file cannot be used.
    """
    if not parameters:
        return None
    root = parameters.get("sslrootcert")
    mode = _mode(parameters.get("sslmode", "verify-full"))
    if mode == "disable":
        return None
    check_files(parameters)
    try:
        context = create_default_context(cafile=None if root == SYSTEM else root)
        if "sslcert" in parameters:
            context.load_cert_chain(parameters["sslcert"], parameters.get("sslkey"))
    except (OSError, SSLError) as error:
        files = "sslrootcert, sslcert or sslkey"
        raise ConfigurationError(
            f"{files}: the file cannot be used: {error}", entry="tls"
        ) from None
    context.check_hostname = mode == "verify-full" or root == SYSTEM
    if mode == "require" and root is None:
        context.verify_mode = CERT_NONE
    return context


def check_files(parameters: Mapping[str, str]) -> None:
    """Look whether the files are there.

    Raises:
        ConfigurationError: one is not, or may not be read; the drivers do not say which.
    """
    for name in ("sslrootcert", "sslcert", "sslkey"):
        file = parameters.get(name, SYSTEM)
        try:
            if file != SYSTEM:
                open(file).close()
        except OSError as error:
            raise ConfigurationError(
                f"{name}: the file cannot be used: {error}", entry="tls"
            ) from None


def _mode(name: str) -> str:
    try:
        return _MODES[name.lower()]
    except KeyError:
        known = "disable, require, verify-ca, verify-full"
        raise ConfigurationError(
            f"sslmode is none of those that are possible here: {known}", entry="tls"
        ) from None
