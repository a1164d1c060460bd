"""Sanic's manager of workers says when it may be asked to stop.

A signal that it gets while it still waits for its workers makes it wait for ever:
https://github.com/sanic-org/sanic/issues/2997. One that it gets while it asks after their states
makes it fail, as it asks the same process anew in between. ``python -m tests.manager MODULE ...``
is ``python -m MODULE ...`` with a manager that tells when the first is over, and puts signals off
meanwhile.
"""

from __future__ import annotations

import runpy
import signal
import sys
from collections.abc import Callable
from functools import wraps

from sanic.worker.manager import WorkerManager

MAY_STOP = "the manager may be stopped"


def tell_when_it_may_stop() -> None:
    """Have the manager of this process, or of one forked from it, print that it may be stopped."""
    wait_for_workers: Callable[[WorkerManager], None] = WorkerManager.wait_for_ack

    @wraps(wait_for_workers)
    def wait_and_tell(manager: WorkerManager) -> None:
        wait_for_workers(manager)
        # In one piece, as the workers write to the same file.
        sys.stdout.write(f"{MAY_STOP}\n")
        sys.stdout.flush()

    WorkerManager.wait_for_ack = wait_and_tell  # type: ignore[method-assign]
    ask_for_states: Callable[[WorkerManager], None] = WorkerManager._sync_states

    @wraps(ask_for_states)
    def ask_undisturbed(manager: WorkerManager) -> None:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        try:
            ask_for_states(manager)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    WorkerManager._sync_states = ask_undisturbed  # type: ignore[method-assign]


if __name__ == "__main__":
    tell_when_it_may_stop()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
