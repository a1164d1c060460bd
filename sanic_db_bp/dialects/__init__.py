"""What each database needs: its driver, connect arguments, pragmas, read-only mode, timeouts."""

from .base import CONNECT_TIMEOUT, Backend, in_autocommit
from .urls import BACKENDS, backend_of, is_memory, parse_url

__all__ = [
    "BACKENDS",
    "CONNECT_TIMEOUT",
    "Backend",
    "backend_of",
    "in_autocommit",
    "is_memory",
    "parse_url",
]
