"""Which line of the app is responsible for what happens deep inside the libraries."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from greenlet import getcurrent, greenlet

LIBRARIES = {
    *("asyncio", "concurrent", "contextlib", "greenlet", "threading"),
    *("sanic", "sanic_db_bp", "sanic_ext", "sqlalchemy"),
}
"""The packages whose lines nobody wants to read about."""


def calling_line() -> str:
    """Return the file, line and function of the app's code that is being run.

    In a handler that is bridged it stands below several greenlets, each with a stack of its own.
    """
    for frame in _frames():
        module: str = frame.f_globals.get("__name__", "")
        if module.partition(".")[0] not in LIBRARIES:
            code = frame.f_code
            return f"{code.co_filename}:{frame.f_lineno} in {code.co_name}"
    return "a line that is not known"


def _frames() -> Iterator[FrameType]:
    stack: greenlet | None = getcurrent()
    frame: FrameType | None = sys._getframe(1)
    while stack is not None:
        while frame is not None:
            yield frame
            frame = frame.f_back
        stack = stack.parent
        frame = None if stack is None else stack.gr_frame
