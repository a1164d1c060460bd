"""Finds the connections that a test took out of a pool and did not give back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
from sanic import Request
from sqlalchemy import event
from sqlalchemy.pool import Pool

from .stack import calling_lines
from .thread import in_loop_thread


@dataclass(frozen=True)
class Checkout:
    """By whom a connection was taken."""

    route: str | None
    lines: str

    def __str__(self) -> str:
        """Return it for the report of a test."""
        return (f"by {self.route}, " if self.route else "") + f"at\n{self.lines}"


@contextmanager
def no_leaked_connections() -> Iterator[None]:
    """Fail a test that ends while a connection it has used is still out of its pool.

    The report says by which request, and at which line, it was taken.
    """
    out: dict[Any, Checkout] = {}

    def taken(_connection: object, record: Any, _fairy: object) -> None:
        if not in_loop_thread():
            out[record] = Checkout(_route(), calling_lines())

    def given_back(_connection: object, record: Any) -> None:
        out.pop(record, None)

    event.listen(Pool, "checkout", taken)
    event.listen(Pool, "checkin", given_back)
    try:
        yield
    finally:
        event.remove(Pool, "checkout", taken)
        event.remove(Pool, "checkin", given_back)
    if out:
        leaks = "\n".join(f"- {checkout}" for checkout in out.values())
        pytest.fail(f"connections that were not given back: {len(out)}\n{leaks}", pytrace=False)


def _route() -> str | None:
    request = Request._current.get(None)
    return None if request is None else f"{request.method} {request.path}"
