"""N+1 detection: an attribute that is loaded lazily for one object after another."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from sanic import Sanic
from sqlalchemy import event
from sqlalchemy.orm import (
    InstanceState,
    ORMExecuteState,
    RelationshipProperty,
    Session,
    SessionTransaction,
)

from ..context import current_origin
from ..database import Database
from ..observers import Observer
from ..registry import observers_of
from ._callers import calling_line

logger = logging.getLogger("sanic.root.db")

LIMIT = 3
"""How often an attribute may be loaded lazily in one transaction without a warning."""


def install(app: Sanic[Any, Any], *, limit: int = LIMIT, always: bool = False) -> None:
    """Warn of attributes that are loaded lazily again and again in one transaction.

    The warning names the route, the line, the attribute, how often, and the loader option that
    loads it for all objects at once ("Relationship Loading Techniques" in SQLAlchemy's
    documentation).

    Args:
        app: the app; all its databases are observed.
        limit: how often is too often.
        always: not just in debug mode.
    """
    observers_of(app).append(_LazyLoads(app, limit, always))


@dataclass
class _Loads:
    """How often one attribute was loaded."""

    attribute: str
    cure: str
    route: str | None
    line: str
    times: int = 0


class _LazyLoads(Observer):
    def __init__(self, app: Sanic[Any, Any], limit: int, always: bool) -> None:
        self._app = app
        self._limit = limit
        self._always = always

    def session_class_made(
        self, database: Database, session_class: type[Session], *, read_only: bool
    ) -> None:
        if self._app.debug or self._always:
            event.listen(session_class, "do_orm_execute", self._count)
            event.listen(session_class, "after_transaction_end", self._report)

    def _count(self, execution: ORMExecuteState) -> None:
        if not execution.is_select or execution.lazy_loaded_from is None:
            return
        way: Any = execution.loader_strategy_path
        attribute: RelationshipProperty[Any] = way[-1]
        loads = execution.session.info.setdefault(self, {})
        if attribute not in loads:
            origin = current_origin()
            cure = _cure(execution.lazy_loaded_from, attribute)
            route = None if origin is None else origin.route
            loads[attribute] = _Loads(str(attribute), cure, route, calling_line())
        loads[attribute].times += 1

    def _report(self, session: Session, transaction: SessionTransaction) -> None:
        if transaction.parent is not None or self not in session.info:
            return
        for loads in session.info.pop(self).values():
            if loads.times >= self._limit:
                self._warn(loads)

    def _warn(self, loads: _Loads) -> None:
        place = "" if loads.route is None else f" in {loads.route}"
        logger.warning(
            "N+1%s: %s was loaded lazily %d times in one transaction, first at %s. Load it with "
            "its objects: %s",
            *(place, loads.attribute, loads.times, loads.line, loads.cure),
            extra={"route": loads.route, "attribute": loads.attribute, "times": loads.times},
        )


def _cure(owner: InstanceState[Any], attribute: RelationshipProperty[Any]) -> str:
    """Return the statement that loads an attribute together with the object that has it."""
    way: tuple[object, ...] = owner.load_path.path
    relationships = [each for each in way if isinstance(each, RelationshipProperty)]
    chain = [*relationships, attribute]
    options = ".".join(f"{_loader(each)}({each})" for each in chain)
    return f"select({chain[0].parent.class_.__name__}).options({options})"


def _loader(attribute: RelationshipProperty[Any]) -> str:
    """Return the loader that suits: one more SELECT for collections, a JOIN for single objects."""
    return "selectinload" if attribute.uselist else "joinedload"
