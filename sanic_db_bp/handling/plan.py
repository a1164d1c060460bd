"""What a handler wants: the parameters that are injected, and how its transaction is to be."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sanic import Request

    from .request import ScopedRequest

PLANS = "__sanic_db_bp__"
"""The attribute of a wrapped handler that says how it wants its units of work."""

Handler = Callable[..., Any]
Provider = Callable[["ScopedRequest"], Any]


@dataclass(frozen=True)
class Transaction:
    """How a handler wants its transaction; see ``transactional``."""

    commit: bool | None = None
    isolation: str | None = None
    retries: int = 0


AS_SET = Transaction()
"""As the settings say."""


@dataclass(frozen=True)
class Plan:
    """What the wrapper of a handler has to do.

    Args:
        providers: the parameters that this package injects, and where each comes from.
        uses_sessions: whether the handler, or a dependency of it, asks for a session.
        plain: whether what it asks for is a plain session.
        transaction: how its transaction is to be.
        dependencies: what sanic-ext injects, computed anew for another run.
        dependency_names: the parameters that it injects.
    """

    providers: Mapping[str, Provider] = field(default_factory=dict)
    uses_sessions: bool = False
    plain: bool = False
    transaction: Transaction = AS_SET
    dependencies: Callable[[Request, dict[str, Any]], Awaitable[dict[str, Any]]] | None = None
    dependency_names: frozenset[str] = frozenset()

    @property
    def needs_bridge(self) -> bool:
        """Whether calls run in the bridge, or are just watched."""
        return self.uses_sessions or bool(self.providers) or self.transaction != AS_SET

    async def arguments_again(
        self, request: ScopedRequest, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return the injected arguments for another run, with sessions of its own."""
        own = {name: provide(request) for name, provide in self.providers.items()}
        if self.dependencies is None:
            return own
        return {**own, **await self.dependencies(request, kwargs)}


NO_PLAN = Plan()
"""That of a handler which asks for nothing."""


@dataclass(frozen=True)
class Wrapped:
    """The original of a wrapped handler, and the plan for each method (``None``: for all)."""

    original: Handler
    plans: Mapping[str | None, Plan]

    def plan(self, request: Request) -> Plan:
        """Return the plan for a request."""
        return self.plans.get(request.method) or self.plans.get(None) or NO_PLAN
