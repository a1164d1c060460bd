"""What has to be closed when the event loop ends, though nobody says so."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress


class EndOfLoop:
    """Closes something when the event loop shuts down, for scripts and commands that don't.

    Args:
        close: called then, with ``within=0``: there is no time to wait.
    """

    def __init__(self, close: Callable[..., Awaitable[None]]) -> None:
        self._close = close
        self._watch: AsyncGenerator[None] | None = None

    def comes_with_the_loop(self, *_: object) -> None:
        """Close it at the end of the loop that runs; called any number of times."""
        if self._watch is None:
            _expected.add(self)
            # asyncio.run closes the asynchronous generators that were begun in its loop.
            self._watch = self._until_closed()
            with suppress(StopIteration):
                self._watch.__anext__().send(None)

    async def is_of_no_interest(self) -> None:
        """It was closed in good order."""
        _expected.discard(self)
        watch, self._watch = self._watch, None
        if watch is not None:
            await watch.aclose()

    async def _until_closed(self) -> AsyncGenerator[None]:
        try:
            yield
        finally:
            if self._watch is not None:
                self._watch = None
                _expected.discard(self)
                await self._close(within=0)


_expected: set[EndOfLoop] = set()
"""The loop itself keeps no generator alive, and the garbage collector cannot close a connection."""
