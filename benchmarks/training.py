"""Images per second of a bare loop and of federated rounds over the same photos, interleaved in one process.

The bare loop is plain SGD on contiguous float32 tensors, every photo once, gradients clipped as in training. A round is timed
with what a run adds to training itself (loading and averaging parameters, the correction), without evaluation and files. The
share of rounds in a round is the time of `Federation.play` beside that of the same minibatches in the bare loop. Peak memory is
that of a fresh process that trains one round.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from time import perf_counter

import torch

from benchmarks import memory
from fedgc import heads
from fedgc.config import Config, load_config
from fedgc.federation import Federation
from fedgc.models import build_model
from fedgc.pipeline import setting as settings
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.pipeline.setting import Setting, federation, prepare
from fedgc.schedule import Party

SETTINGS = ("data.source=synthetic:160x12", "data.augment=false", "federation.local_epochs=1", "record.victims=0")
SCHEMES = (("centralized", 1), ("fedavg", 8), ("fedgc", 8), ("fedavg", 37), ("fedgc", 37))


def config(algorithm: str, clients: int, batch: int, *more: str) -> Config:
    chosen = f"federation.algorithm={algorithm}", f"federation.clients={clients}", f"federation.batch_size={batch}"
    return load_config(settings=(*SETTINGS, *chosen, *more))


def bare_loop(parties: tuple[Party, ...], config: Config) -> Callable[[], None]:
    """Plain SGD over each party's photos once, one party after another."""
    spec, clip = config.spec(), config.federation.clip_norm or math.inf
    model = build_model(spec, sum(len(p.classes) for p in parties))
    torch.nn.init.normal_(model.head.weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)

    def run() -> None:
        for party in parties:
            for index in torch.randperm(len(party.photos)).split(config.federation.batch_size):
                optimizer.zero_grad()
                heads.loss(model(party.photos[index].float() / 255), party.labels[index], spec).backward()
                torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                optimizer.step()

    return run


def played(made: Federation) -> Callable[[], None]:
    state = made.initial_state()
    return lambda: void(made.play(state, keep=lambda client: False))


def void(_: object) -> None:
    pass


def best(
    calls: dict[str, Callable[[], None]], repeats: int, clock: Callable[[], float] = perf_counter
) -> dict[str, float]:
    """Least seconds of each call, all taking turns, after one turn to warm up."""
    spent = dict.fromkeys(calls, math.inf)
    for turn in range(repeats + 1):
        for name, call in calls.items():
            start = clock()
            call()
            spent[name] = min(spent[name], clock() - start) if turn else math.inf
    return spent


def peak(algorithm: str, clients: int, batch: int) -> float:
    """MB of a process that trains one round, libraries included."""
    keep_freed_memory()
    played(federation(prepare(config(algorithm, clients, batch))))()
    return memory.peak()


def in_a_fresh_process(algorithm: str, clients: int, batch: int) -> float:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(peak, algorithm, clients, batch).result()


def table(batch: int, repeats: int) -> None:
    whole = prepare(config("centralized", 1, batch))
    settings.load_config_faces = lambda *_: whole.faces  # the same for all: painting them takes longer than training
    images = len(whole.parties[0].photos)
    calls = {"bare loop": bare_loop(whole.parties, whole.config)}
    same: dict[str, str] = {}
    for algorithm, clients in SCHEMES:
        for precision in ("float32", "bfloat16"):
            setting: Setting = prepare(config(algorithm, clients, batch, f"federation.precision={precision}"))
            name = f"{algorithm}, {clients} clients, {precision}"
            calls[name] = played(federation(setting))
            if clients > 1 and algorithm == "fedavg" and precision == "float32":
                same[name] = f"bare loop, minibatches of {clients} clients"
                calls[same[name]] = bare_loop(setting.parties, setting.config)
    spent = best(calls, repeats)
    for name, seconds in spent.items():
        share = f", {spent[name] / spent[same[name]]:.3f} of the time of its minibatches" if name in same else ""
        print(f"{batch:>5} {name:<42} {images / seconds:>8.0f} {spent['bare loop'] / seconds:>8.2f}{share}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 128])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    keep_freed_memory()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads; default net, 48 px; least of {options.repeats}"
    )
    print(f"{'batch':>5} {'what':<42} {'images/s':>8} {'x bare':>8}")
    for batch in options.batches:
        table(batch, options.repeats)
    for algorithm, clients in SCHEMES:
        print(f"peak memory, {algorithm}, {clients} clients: {in_a_fresh_process(algorithm, clients, 32):.0f} MB")


if __name__ == "__main__":
    main()
