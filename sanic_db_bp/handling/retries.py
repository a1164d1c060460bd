"""Whether a handler runs again whose transaction has lost a race, and when."""

from __future__ import annotations

import asyncio
import logging
import random
from typing import Any

from .request import ScopedRequest, scope_of
from .scope import Scope

logger = logging.getLogger("sanic.root.db")

LONGEST_PAUSE = 1.0
"""Seconds that a handler waits at most before it runs again."""


def may_run_again(request: ScopedRequest, scope: Scope, error: BaseException) -> bool:
    """Whether an error is that of a lost race, and nobody has seen anything of this run."""
    units = scope.units.values()
    if not any(unit.database.backend.is_retryable(error) for unit in units):
        return False
    if request.responded or any(unit.commits for unit in units):
        return False
    if hasattr(request.route and request.route.handler, "is_stream"):
        # The body is gone.
        return False
    if scope.used_by_middleware:
        logger.warning(
            "%s does not run again, although its transaction lost a race: a middleware used the "
            "session before it, and would not run again",
            request.for_log,
        )
    return not scope.used_by_middleware


async def pause(request: ScopedRequest, runs: int) -> None:
    """Wait before the next run, the longer the more of them there were."""
    logger.info("%s runs again: its transaction lost a race", request.for_log)
    # Jitter, or those who collided once would collide again.
    await asyncio.sleep(min(LONGEST_PAUSE, 0.01 * 2**runs) * (0.5 + random.random()))


class LostRace:
    """Stands for a dependency whose transaction lost a race, until its handler runs again."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


def raise_lost_race(kwargs: dict[str, Any]) -> None:
    """Raise the error of the first dependency that has lost a race."""
    for name, value in kwargs.items():
        if isinstance(value, LostRace):
            # Left there, it would make a reference cycle with its own traceback.
            raise kwargs.pop(name).error


def lost_race(request: ScopedRequest, error: BaseException) -> LostRace | None:
    """Return what stands for a dependency that has failed, if its handler will run again."""
    scope = scope_of(request)
    if not scope.plan.transaction.retries or not may_run_again(request, scope, error):
        return None
    return LostRace(error)
