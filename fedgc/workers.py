"""Clients side by side: each worker trains one client at a time, on a network of its own.

The networks of face recognition on a laptop are too small to keep several cores busy on one batch, and clients do not wait
for each other within a round. So every worker gets its share of the threads; what comes out depends on how many threads a
worker has, and not on which worker trained whom.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from queue import SimpleQueue
from typing import TypeVar

import torch
from torch import nn

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers:
    """``models``: resident networks, one a worker, lent to one client after another."""

    def __init__(self, models: list[nn.Module]) -> None:
        self.models = models

    def map(self, train: Callable[[nn.Module, Item], Result], items: Iterable[Item]) -> Iterator[Result]:
        """train(model, item) for every item, results in their order; few are kept waiting, so that memory does not grow."""
        if len(self.models) == 1:
            yield from (train(self.models[0], item) for item in items)
            return
        threads = torch.get_num_threads()
        idle: SimpleQueue[nn.Module] = SimpleQueue()
        for model in self.models:
            idle.put(model)

        def job(item: Item) -> Result:
            model = idle.get()
            try:
                return train(model, item)
            finally:
                idle.put(model)

        share = max(1, threads // len(self.models))
        pool = ThreadPoolExecutor(len(self.models), initializer=torch.set_num_threads, initargs=(share,))
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(job, item))
                if len(waiting) > 2 * len(self.models):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # some libraries below torch keep one number for all threads
