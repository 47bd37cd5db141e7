"""Work in processes of its own, none of which outlives what asked for it."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager

from fedgc.errors import WorkFailedError


@contextmanager
def processes(workers: int, initializer: Callable[[], None] | None = None) -> Iterator[ProcessPoolExecutor]:
    """A pool that is ended at once, its work with it, where the block is left by an exception or an interrupt."""
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), initializer=initializer)
    try:
        yield pool
    except BaseException as error:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        pool.shutdown(wait=False, cancel_futures=True)
        if isinstance(error, BrokenProcessPool):
            raise WorkFailedError(
                "a worker process died, as one does that the system ends for want of memory: free memory, or take less at a "
                "time, and repeat the command, which goes on with what was not finished"
            ) from None
        raise
    pool.shutdown()
