"""The units of work of a database that are under way, and the wait for their end."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from .bridge import run_in_bridge

if TYPE_CHECKING:
    from .unit_of_work import UnitOfWork


class LiveUnits(set["UnitOfWork"]):
    """Those that have something open, which must not outlive the engine."""

    def __init__(self) -> None:
        super().__init__()
        self._closing: set[asyncio.Task[None]] = set()
        self._drained: asyncio.Future[None] | None = None

    def discard(self, unit: object) -> None:
        """Keep account of one that is over."""
        super().discard(unit)
        if self._drained is not None and not self and not self._drained.done():
            self._drained.set_result(None)

    def roll_back(self, unit: UnitOfWork) -> None:
        """End one whose task is gone, in a task of its own."""
        task = asyncio.get_running_loop().create_task(run_in_bridge(unit.rollback))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def drain(self, within: float) -> None:
        """Wait for all to end, and cut off what is left.

        Args:
            within: seconds to wait.
        """
        if self and within:
            self._drained = asyncio.get_running_loop().create_future()
            await asyncio.wait({self._drained}, timeout=within)
            self._drained = None
        await asyncio.gather(*(run_in_bridge(unit.discard) for unit in self))
