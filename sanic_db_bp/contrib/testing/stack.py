"""Which lines of the test or of the app a call comes from, greenlets included."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from greenlet import getcurrent

PACKAGE = str(Path(__file__).parents[2])
LINES = 3


def calling_lines() -> str:
    """Return the innermost lines that belong neither to this package nor to a library."""
    found = []
    for frame in _frames():
        if _is_own(frame.f_code.co_filename):
            found.append(
                traceback.FrameSummary(
                    frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
                )
            )
        if len(found) == LINES:
            break
    return "".join(traceback.format_list(found[::-1]))


def _frames() -> Iterator[FrameType]:
    """The frames of the caller, the innermost first, and of those that its greenlet serves."""
    greenlet = getcurrent()
    frame: FrameType | None = sys._getframe(1)
    while True:
        while frame is not None:
            yield frame
            frame = frame.f_back
        if greenlet.parent is None:
            return
        greenlet = greenlet.parent
        frame = greenlet.gr_frame


def _is_own(filename: str) -> bool:
    if filename.startswith((PACKAGE, "<", sys.prefix, sys.base_prefix)):
        return False
    return "site-packages" not in filename
