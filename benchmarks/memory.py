"""Memory of a process at its peak."""

from __future__ import annotations

import resource
import sys
from pathlib import Path

STATUS, FORGET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def peak() -> float:
    """MB, libraries included. On Linux from /proc: what `getrusage` says, a new process inherits from the one that started it."""
    if STATUS.exists():
        (line,) = (text for text in STATUS.read_text().splitlines() if text.startswith("VmHWM"))
        return int(line.split()[1]) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform.startswith("linux") else 2**20)


def forget_peak() -> None:
    """Begin again with what the process has now, where the system can (Linux)."""
    if FORGET.exists():
        FORGET.write_text("5")
