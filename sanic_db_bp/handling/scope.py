"""The units of work of one request, and how far the request has come."""

from __future__ import annotations

import asyncio
import logging
import weakref
from typing import TYPE_CHECKING, Any, cast

from sanic.exceptions import BadRequest
from sanic.http.constants import Stage
from sqlalchemy.exc import DBAPIError

from ..bridge import run_in_bridge
from ..exceptions import DatabaseUnavailable, NoCurrentSession
from ..observers import status_of
from ..registry import DEFAULT_NAME
from ..unit_of_work import UnitOfWork
from .plan import NO_PLAN, Plan

if TYPE_CHECKING:
    from ..database import Database
    from .request import ScopedRequest

logger = logging.getLogger("sanic.root.db")


class Scope:
    """The units of work of one request, and how far the request has come.

    Args:
        request: the request; it is not kept alive.
    """

    __slots__ = (
        "_guarded",
        "_request",
        "broken",
        "failure",
        "finishing",
        "handling",
        "plan",
        "units",
        "used_by_middleware",
        "websocket",
    )

    def __init__(self, request: ScopedRequest) -> None:
        self._request = weakref.ref(request)
        self._guarded: asyncio.Task[Any] | None = None
        self.units: dict[str, UnitOfWork] = {}
        self.handling: bool = getattr(request, "_handling", False)
        self.finishing = False
        self.websocket = False
        self.broken = False
        self.failure: BaseException | None = None
        self.used_by_middleware = False
        self.plan: Plan = NO_PLAN

    def take(self, units: dict[str, UnitOfWork]) -> None:
        """Begin with units of work that were given to the handler before any was used."""
        for unit in units.values():
            unit.isolation_level, unit.plain = self.plan.transaction.isolation, self.plan.plain
            unit.before_use = None
        self.units = units

    def unit(self, database: Database) -> UnitOfWork:
        """Return the request's unit of work on a database.

        Raises:
            NoCurrentSession: in a websocket handler, which has one for each message.
        """
        unit = self.units.get(database.name)
        if unit is not None and not (unit.finished and self.goes_on()):
            return unit
        if self.websocket:
            raise NoCurrentSession(
                "A websocket handler has no session of its own, as it may stay open for days: "
                "ask for 'db: Database' and open 'async with db.session() as session' for each "
                "message.",
                entry="websocket-without-session",
            )
        plan = self.plan
        unit = UnitOfWork(database, plan.transaction.isolation, plan.plain)
        self.units[database.name] = unit
        if not self.handling or self.finishing:
            self._see_to(unit)
        return unit

    def _see_to(self, unit: UnitOfWork) -> None:
        """See that a unit of work is finished which no handler's wrapper knows of."""
        request = self._request()
        if request is None or not self.goes_on():
            unit.finished = True
            return
        request.finish_with_response()
        if self._guarded is None:
            self._guarded = cast("asyncio.Task[Any]", request.task)
            self._guarded.add_done_callback(self._task_ended)

    def _task_ended(self, _task: object) -> None:
        for unit in self.open_units:
            unit.database.live_units.roll_back(unit)

    def goes_on(self) -> bool:
        """Whether the answer is still to come, as seen from the current task."""
        if self.finishing:
            # A callback of on_commit asks: what it would do more, nobody would commit.
            return False
        if self.handling:
            return True
        request = self._request()
        return (
            request is not None
            and request.stream is not None
            and request.stream.stage is Stage.HANDLER
            and request.task is asyncio.current_task()
        )

    def reached(self, plan: Plan) -> None:
        """The handler was reached, and its wrapper sees to the end."""
        self.handling = True
        self.plan = plan
        if self._guarded is not None:
            self._unguard()

    def _unguard(self) -> None:
        if self._guarded is not None:
            self._guarded.remove_done_callback(self._task_ended)
            self._guarded = None

    @property
    def name(self) -> str:
        """The name of the first database that was used, for errors."""
        return next(iter(self.units), DEFAULT_NAME)

    @property
    def open_units(self) -> list[UnitOfWork]:
        """The units of work that are not finished."""
        return [unit for unit in self.units.values() if not unit.finished]

    def finish(self, *, good: bool) -> None:
        """End every unit of work, with a COMMIT if the answer is good; runs in the bridge.

        Raises:
            BadRequest: the client left before it had sent the whole body.
        """
        self.finishing = True
        try:
            request = self._request()
            if good and request is not None and request.truncated:
                raise BadRequest("The client left before it had sent the whole body.", quiet=True)
            if good and len(self.units) > 1:
                # What one database refuses is found before another has committed.
                for unit in self.open_units:
                    unit.flush()
            wanted = self.plan.transaction.commit
            for unit in list(self.units.values()):
                if good and (unit.database.commits_automatically if wanted is None else wanted):
                    unit.commit()
                else:
                    unit.rollback()
        except BaseException:
            self.rollback()
            raise
        finally:
            self.finishing = False

    def rollback(self) -> None:
        """End every unit of work with a ROLLBACK; runs in the bridge."""
        for unit in self.open_units:
            unit.rollback()

    async def finish_rest(self, *, good: bool) -> None:
        """End what no handler's wrapper has ended, if there is anything."""
        if self.open_units:
            await run_in_bridge(self.finish, good=good)
        self._unguard()

    def to_tell(self, error: BaseException) -> BaseException:
        """Return the error that is told: ``DatabaseUnavailable`` where the connection was lost."""
        if not isinstance(error, DBAPIError) or not error.connection_invalidated:
            return error
        unavailable = DatabaseUnavailable(self.name, "the connection was lost")
        unavailable.__cause__ = error
        return unavailable

    def commit_failed(self, request: ScopedRequest, error: BaseException) -> None:
        """Log that the COMMIT failed, and take note that the answer must not look complete."""
        self.failure = error
        self.broken = request.is_answered
        if not isinstance(error, Exception) or isinstance(error, DatabaseUnavailable):
            return
        told = getattr(error, "quiet", False)
        if not told and (self.broken or not self._is_clients_fault(error)):
            cause = str(getattr(error, "orig", None) or error).strip().partition("\n")[0]
            logger.error("%s: COMMIT failed: %s: %s", request.for_log, type(error).__name__, cause)
            # It has been logged: Sanic need not do it again, with a traceback.
            cast(Any, error).quiet = True

    def _is_clients_fault(self, error: Exception) -> bool:
        observers = (each for unit in self.units.values() for each in unit.database.observers)
        return status_of(observers, error) < 500
