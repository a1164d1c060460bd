"""The sessions that a unit of work hands out: guarded, in a plain and an asyncio form."""

from .factory import SessionFactory
from .reading import AsyncReadSession, ReadSession
from .use import SessionUse

__all__ = ["AsyncReadSession", "ReadSession", "SessionFactory", "SessionUse"]
