"""Median seconds of a call, after one call to warm up."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    call()
    spent = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        spent.append(time.perf_counter() - start)
    return median(spent)
