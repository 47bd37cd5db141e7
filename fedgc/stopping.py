"""Stopping on SIGINT and SIGTERM: an exception at the next Python instruction, and an end within seconds in any case.

What is on disk is whole at every instant, so that ending in the midst of anything costs at most the round in progress.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
from typing import Any, NoReturn

GRACE = 3.0  # seconds for the exception to reach the top; a backward pass of a big network may take longer
SIGNALS = (signal.SIGINT, signal.SIGTERM)
FORCED = b"\nstopped at once; all that was saved is whole: repeat the command (`train` and `sweep` with --resume)\n"


class StopSignalError(BaseException):
    """SIGINT or SIGTERM, with the exit code that goes with it. Nobody's ``except Exception`` may swallow it."""

    def __init__(self, code: int) -> None:
        self.code = code


def stop_on_signals() -> None:
    """SIGINT and SIGTERM raise StopSignalError in the main thread; a second signal, or GRACE seconds more, end the process."""
    for number in SIGNALS:
        signal.signal(number, _raise)
    heard, told = os.pipe()
    os.set_blocking(told, False)
    signal.set_wakeup_fd(
        told, warn_on_full_buffer=False
    )  # written by the system's handler, whatever Python is busy with
    threading.Thread(target=_make_sure, args=(heard,), daemon=True).start()


def _raise(number: int, _frame: Any) -> None:
    for each in SIGNALS:
        signal.signal(
            each, lambda *_: None
        )  # raised once: nothing may disturb the way out, and the thread hears the second
    raise StopSignalError(128 + number)


def end(stop: StopSignalError, message: str) -> NoReturn:
    """Say so and end, without the seconds that taking down loaded libraries costs."""
    print(message, file=sys.stderr, flush=True)
    os._exit(stop.code)


def _make_sure(heard: int) -> None:
    while (number := os.read(heard, 1)[0]) not in SIGNALS:
        pass
    select.select([heard], [], [], GRACE)
    os.write(2, FORCED)
    os._exit(128 + number)
