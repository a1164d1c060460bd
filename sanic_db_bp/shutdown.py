"""What a server does before it stops: the tasks that Sanic has cancelled come to their end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from typing import Any

from sanic import Sanic

from .bridge import run_in_bridge
from .database import Database

logger = logging.getLogger("sanic.root.db")

CANCELLED_WITHIN = 5.0
"""Seconds that cancelled tasks have to roll back, and once more after their connections were cut.
"""


async def end_cancelled_tasks(app: Sanic[Any, Any], databases: Iterable[Database]) -> None:
    """Wait for the tasks of ``app.add_task`` that Sanic has cancelled.

    Sanic waits for them when the event loop does not run any longer, in vain and for ever. A
    ROLLBACK needs it, and so does the end of another app that is served in the same process.
    """
    tasks = {task for task in app.tasks if task.cancelling() and not task.done()}
    if not tasks:
        return
    _, late = await asyncio.wait(tasks, timeout=CANCELLED_WITHIN)
    if late:
        units = [each for one in databases for each in one.live_units if each.task in late]
        logger.warning(
            "tasks that were cancelled still run: %s", ", ".join(task.get_name() for task in late)
        )
        await asyncio.gather(*(run_in_bridge(unit.discard) for unit in units))
        await asyncio.wait(late, timeout=CANCELLED_WITHIN)
