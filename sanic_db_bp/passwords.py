"""Passwords that rotate: read again, or asked for again, each time that a connection is opened."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from inspect import isawaitable
from pathlib import Path
from typing import Any

from .bridge import await_only

PasswordFunction = Callable[[], str | Awaitable[str]]
"""Returns the password to connect with, at once or to be awaited, such as a token of IAM."""


class RotatingPassword:
    """A password that may be another one the next time.

    Args:
        source: a file that has it, or a function that returns it.
    """

    def __init__(self, source: Path | PasswordFunction) -> None:
        self._source = source

    def __repr__(self) -> str:
        # A function may be a partial, with secrets among its arguments.
        return "RotatingPassword('**********')"

    def now(self) -> str:
        """Return the password of this moment; runs in the bridge.

        Raises:
            ValueError: there is none.
            OSError: the file cannot be read.
        """
        source = self._source
        if isinstance(source, Path):
            # In a thread: it may be of a network's file system.
            text = await_only(asyncio.to_thread(source.read_text, encoding="utf-8"))
            password: Any = text.rstrip("\r\n")
        else:
            password = source()
            if isawaitable(password):
                password = await_only(password)
        if not isinstance(password, str) or not password:
            raise ValueError("the source of the password gave none")
        return password


def rotate(dialect: Any, password: RotatingPassword) -> None:
    """Have a dialect ask for the password each time that it connects."""
    connect = dialect.connect

    def connect_with_password(*args: Any, **arguments: Any) -> Any:
        return connect(*args, **{**arguments, "password": password.now()})

    dialect.connect = connect_with_password
