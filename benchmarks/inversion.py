"""Steps of gradient matching: eager double backward against one compiled graph, and photos attacked an hour on all cores.

    OMP_NUM_THREADS=1 python -m benchmarks.inversion [--batch 1 4] [--iterations 400]

The rows take turns in one run, on a random net of the default kind at 48 px and a photo of noise: the time of a step does not
depend on what is in it. Compiling is timed on its own; a second run finds the graphs on disk.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import click
import torch
from torch import Tensor

from attacks.fast_step import distance_of, graph
from attacks.gradient_matching import Schedule, match
from attacks.objectives import HeadMatching, Objective, PullMatching
from attacks.priors import Pixels
from fedgc import heads
from fedgc.models import build_model
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.rng import generator
from fedgc.types import HEAD, ModelSpec

SPEC = ModelSpec("small", "group", 128, 48, "cosface", 0.25, 30.0)
CLASSES, TURNS = 14, 5


def problems(batch: int) -> dict[str, Objective]:
    """The step of published methods, which goes through the head, and ours, which does not."""
    draw = generator("inversion", batch)
    model = build_model(SPEC, CLASSES).eval()
    torch.nn.init.normal_(model.head.weight, std=1 / math.sqrt(SPEC.embedding_size), generator=draw)
    x, labels = torch.rand((batch, 3, 48, 48), generator=draw), torch.arange(batch) % CLASSES
    z = model.backbone(x)
    z.retain_grad()
    heads.loss(model.head(z), labels, SPEC).backward()
    gradient = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    before = {name: p.detach() for name, p in model.named_parameters()}
    assert z.grad is not None
    assert HEAD in gradient
    return {
        "through the head": HeadMatching.of(before, gradient, labels, SPEC),
        "through the known pull": PullMatching.of(before, gradient, z.grad, SPEC),
    }


def step(distance: Callable[[Tensor], Tensor], images: Tensor) -> None:
    x = images.clone().requires_grad_()
    torch.autograd.grad(distance(x), x)


def milliseconds(distance: Callable[[Tensor], Tensor], images: Tensor, count: int = 20) -> float:
    """Processor time of a step."""
    begin = time.process_time()
    for _ in range(count):
        step(distance, images)
    return (time.process_time() - begin) / count * 1e3


def victim(task: tuple[int, bool, int]) -> None:
    """One photo, attacked with a thread of its own."""
    number, compiled, iterations = task
    torch.set_num_threads(1)
    keep_freed_memory()
    objective = problems(1)["through the head"]
    prior = Pixels(torch.full((3, 48, 48), 0.5), True, 0.1)
    schedule = Schedule(iterations, optimizer="signed-adam")
    match(distance_of(objective, compiled), prior, (1, 3, 48, 48), schedule, generator(number), lambda done: None)


@click.command(help=__doc__)
@click.option("--batch", multiple=True, type=int, default=(1, 4))
@click.option("--iterations", default=400, show_default=True)
@click.option("--victims", default=8, show_default=True)
def main(batch: tuple[int, ...], iterations: int, victims: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()
    print("batch | step | eager, ms | compiled, ms | eager / compiled | compiling, s")
    for size in batch:
        images = torch.rand((size, 3, 48, 48), generator=generator("images"))
        for name, objective in problems(size).items():
            begin = time.monotonic()
            graph(objective, objective.inputs, images)
            compiling = time.monotonic() - begin
            ways = [distance_of(objective, compiled) for compiled in (False, True)]
            least = [math.inf, math.inf]
            for _ in range(TURNS):
                least = [min(best, milliseconds(way, images)) for best, way in zip(least, ways, strict=True)]
            eager, fast = least
            print(f"{size} | {name} | {eager:.2f} | {fast:.2f} | {eager / fast:.2f} | {compiling:.0f}", flush=True)
    per_hour(iterations, victims)


def per_hour(iterations: int, victims: int) -> None:
    """One process with eager steps, one victim after another, against one process a core with the compiled graph."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores, get_context("spawn")) as pool:
        list(pool.map(victim, [(i, True, 2) for i in range(cores)]))  # imports and graphs, once a process
        begin = time.monotonic()
        list(pool.map(victim, [(i, True, iterations) for i in range(victims)]))
        shared = time.monotonic() - begin
    begin = time.monotonic()
    for i in range(victims // 2):
        victim((i, False, iterations))
    alone = (time.monotonic() - begin) * 2
    rate = [3600 * victims / seconds for seconds in (alone, shared)]
    print(f"photos an hour: eager on one core {rate[0]:.0f}, compiled on {cores} {rate[1]:.0f}: {alone / shared:.1f}x")


if __name__ == "__main__":
    main()
