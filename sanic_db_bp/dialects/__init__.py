"""What each database needs: its driver, connect arguments, pragmas, read-only mode, timeouts."""

from .base import CONNECT_TIMEOUT, Backend
from .urls import BACKENDS, backend_of, is_memory, parse_url

__all__ = ["BACKENDS", "CONNECT_TIMEOUT", "Backend", "backend_of", "is_memory", "parse_url"]
