"""The database layer for Sanic: SQLAlchemy sessions by annotation, one transaction a request."""

from .blueprint import DatabaseBlueprint, db_bp
from .context import current_session, on_commit
from .database import Database
from .exceptions import (
    ConcurrentSessionUse,
    ConfigurationError,
    DatabaseUnavailable,
    InvalidSettings,
    NoCurrentSession,
    ReadOnlySession,
    SanicDBError,
    SessionError,
    SessionFinished,
    SessionOutsideBridge,
)
from .handling.handlers import transactional
from .injection import inject_session
from .sessions import AsyncReadSession, ReadSession
from .settings import DatabaseSettings

__version__ = "0.1.0"

__all__ = [
    "AsyncReadSession",
    "ConcurrentSessionUse",
    "ConfigurationError",
    "Database",
    "DatabaseBlueprint",
    "DatabaseSettings",
    "DatabaseUnavailable",
    "InvalidSettings",
    "NoCurrentSession",
    "ReadOnlySession",
    "ReadSession",
    "SanicDBError",
    "SessionError",
    "SessionFinished",
    "SessionOutsideBridge",
    "current_session",
    "db_bp",
    "inject_session",
    "on_commit",
    "transactional",
]
