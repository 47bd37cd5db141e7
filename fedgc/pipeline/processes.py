"""Work in processes of its own, none of which outlives what asked for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager


@contextmanager
def processes(workers: int, initializer: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool that is ended at once, its work with it, where the block is left by an exception or an interrupt."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=initializer)
    try:
        yield pool
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    pool.shutdown()
