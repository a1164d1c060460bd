"""The errors of this package: one base class, each error names its cause and the remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

DOCUMENTATION = "docs/"
"""Where the pages are that every error links to: in the project, until it has a site."""


def link_to(entry: str) -> str:
    """Return the line that leads from a message to its entry on the page about errors."""
    return f"(See {DOCUMENTATION}troubleshooting.md#{entry})"


class SanicDBError(Exception):
    """Base class of every error that this package raises itself.

    Errors of the database keep their own class (``sqlalchemy.exc``); only what a caller of this
    package did, or can change, is told in a subclass of this one.

    Its text ends with a link to its entry in the documentation.

    Args:
        args: what a subclass tells of; here the message itself.
        entry: the anchor of the entry, if the message has one of its own.
    """

    entry: str = "troubleshooting"
    """The anchor of the entry on the page about errors."""

    def __init__(self, *args: object, entry: str | None = None) -> None:
        super().__init__(*args)
        if entry is not None:
            self.entry = entry

    @property
    def message(self) -> str:
        """The text without the link, for a log that has one line for each event."""
        return self._text()

    def _text(self) -> str:
        return super().__str__()

    def __str__(self) -> str:
        return f"{self.message}\n{link_to(self.entry)}"


class ConfigurationError(SanicDBError):
    """A setting, an annotation or the way of registration is wrong; raised while the app starts."""

    entry = "when-the-server-starts"


@dataclass(frozen=True)
class SettingProblem:
    """One wrong setting: the variable's name, why it was refused, and what to write instead."""

    variable: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.variable}: {self.reason}. {self.remedy}"


class InvalidSettings(ConfigurationError):
    """One or more settings were refused; ``problems`` has every one of them.

    Args:
        problems: the wrong settings, in the order of the settings class. Values are never shown,
            because any of them may hold a secret.
    """

    entry = "invalid-settings"

    def __init__(self, problems: Sequence[SettingProblem]) -> None:
        super().__init__(problems)
        self.problems = tuple(problems)

    def _text(self) -> str:
        count = len(self.problems)
        lines = "\n".join(f"  - {problem}" for problem in self.problems)
        return f"{count} wrong database setting{'s' if count > 1 else ''}:\n{lines}"


class SessionError(SanicDBError):
    """A session was used in a way that would lose or mix up data."""

    entry = "when-a-session-is-used"


class SessionFinished(SessionError):
    """A session was used after the end of its request or block.

    Args:
        database: the name of the database (of the blueprint).
    """

    entry = "session-finished"

    def __init__(self, database: str) -> None:
        super().__init__(database)
        self.database = database

    def _text(self) -> str:
        return (
            f"This session of '{self.database}' is finished: its request or block is over, and its "
            "transaction was committed or rolled back. Work that goes on afterwards (a background "
            f"task, a websocket message) opens its own: 'async with app.ctx.{self.database}"
            ".session() as session'."
        )


class ConcurrentSessionUse(SessionError):
    """Two tasks used one session at the same time.

    Args:
        database: the name of the database (of the blueprint).
    """

    entry = "concurrent-session-use"

    def __init__(self, database: str) -> None:
        super().__init__(database)
        self.database = database

    def _text(self) -> str:
        return (
            f"Two tasks use one session of '{self.database}' at the same time. A session is one "
            "transaction on one connection and does one thing at a time: await the first use "
            "before the second, or give each task a session of its own: 'async with app.ctx."
            f"{self.database}.session() as session'."
        )


class SessionOutsideBridge(SessionError):
    """A plain ``Session`` was used where it would block the event loop.

    Args:
        database: the name of the database (of the blueprint).
        place: where it was used, such as "in a task of its own".
    """

    entry = "session-outside-bridge"

    def __init__(self, database: str, place: str) -> None:
        super().__init__(database, place)
        self.database = database
        self.place = place

    def _text(self) -> str:
        return (
            f"A plain Session of '{self.database}' was used {self.place}, where it cannot wait for "
            "the database without blocking the event loop. Use it in the handler that asked for "
            f"it, call 'await app.ctx.{self.database}.run_sync(function)', or ask for an "
            "AsyncSession. If an attribute was loaded lazily: load it with its object, by an "
            "option such as selectinload()."
        )


class NoCurrentSession(SessionError):
    """There is no request and no block that a current session could belong to."""

    entry = "no-current-session"


class ReadOnlySession(SessionError):
    """A read session was asked to write.

    Args:
        database: the name of the database (of the blueprint).
    """

    entry = "read-only-session"

    def __init__(self, database: str) -> None:
        super().__init__(database)
        self.database = database

    def _text(self) -> str:
        return (
            f"A read session of '{self.database}' has changes to write, and it never writes. Ask "
            "for Session or AsyncSession in place of ReadSession or AsyncReadSession."
        )


class DatabaseUnavailable(SanicDBError):
    """The database did not answer: it is away, refuses connections, or the pool is exhausted.

    Args:
        database: the name of the database (of the blueprint).
        reason: what happened, without credentials.
    """

    entry = "database-unavailable"

    def __init__(self, database: str, reason: str) -> None:
        super().__init__(database, reason)
        self.database = database
        self.reason = reason

    def _text(self) -> str:
        return f"The database '{self.database}' is unavailable: {self.reason}"
