"""What has to be closed when the event loop ends, though nobody says so."""

from __future__ import annotations

import weakref
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress
from typing import Any


class EndOfLoop:
    """Closes something when the event loop shuts down, for scripts and commands that don't.

    Args:
        close: a method of what is to be closed, which is not kept alive for it; called with
            ``within``, the seconds that it may wait.
    """

    def __init__(self, close: Callable[..., Awaitable[None]]) -> None:
        self._close: weakref.WeakMethod[Any] = weakref.WeakMethod(close)
        self._watch: AsyncGenerator[None] | None = None

    def comes_with_the_loop(self, *_: object) -> None:
        """Close it at the end of the loop that runs; called any number of times."""
        if self._watch is None:
            # asyncio.run closes the asynchronous generators that were begun in its loop.
            self._watch = self._until_closed()
            with suppress(StopIteration):
                self._watch.__anext__().send(None)

    async def is_of_no_interest(self) -> None:
        """It was closed in good order."""
        watch, self._watch = self._watch, None
        if watch is not None:
            await watch.aclose()

    async def _until_closed(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            close = self._close()
            if close is not None and self._watch is not None:
                self._watch = None
                await close(within=0)
