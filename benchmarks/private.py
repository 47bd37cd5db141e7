"""Images per second and memory of private training: the ways of clipping that dp-sgd offers, Opacus as it comes, no privacy.

Every step is one batch through the same network: forward, backward, clipped, noised, taken. All ways take turns in one process;
figures are the least processor time of all turns. Opacus "as it comes" does not know the cosine head and falls back to functorch
for it. Memory is what a process of its own needs beyond its imports, at most.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from time import process_time
from typing import Any

import torch
import torch.nn.functional as F
from opacus import PrivacyEngine
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import memory
from benchmarks.training import best
from defenses.cosine_samplers import register_cosine_head
from defenses.dp_sgd import DPSGD
from fedgc import heads
from fedgc.doors import ClientPlan
from fedgc.models import BACKBONES, FaceModel, build_model
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.types import ModelSpec

Step = Callable[[], None]


class StrangeHead(heads.CosineHead):
    """The same, under a name for which nobody has told Opacus anything."""


def network(spec: ModelSpec, classes: int, known: bool = True) -> FaceModel:
    model = build_model(spec, classes)
    if not known:
        model.head = StrangeHead(classes, spec.embedding_size)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    return model.train()


def faces(spec: ModelSpec, classes: int, batch: int) -> tuple[Tensor, Tensor]:
    x = torch.rand(batch, 3, spec.image_size, spec.image_size, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(batch) % classes


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)


def ordinary(model: FaceModel, optimizer: Any, x: Tensor, y: Tensor, spec: ModelSpec) -> Step:
    def step() -> None:
        optimizer.zero_grad()
        heads.loss(model(x), y, spec).backward()
        optimizer.step()

    return step


def not_private(spec: ModelSpec, classes: int, batch: int) -> Step:
    model = network(spec, classes)
    return ordinary(model, sgd(model), *faces(spec, classes, batch), spec)


def ours(spec: ModelSpec, classes: int, batch: int, mode: Any) -> Step:
    model, noise = network(spec, classes), torch.Generator().manual_seed(0)
    defense = DPSGD(noise_multiplier=1.0, mode=mode)
    opened = defense.local_training(model, sgd(model), iter(()), ClientPlan(0, batch, batch, 1), None, noise)
    step = ordinary(model, opened.__enter__().optimizer, *faces(spec, classes, batch), spec)
    step.session = opened  # type: ignore[attr-defined]  # kept open for as long as the step is
    return step


class MarginLoss(nn.CrossEntropyLoss):
    """heads.loss as a criterion: cross entropy of the margin logits."""

    def __init__(self, spec: ModelSpec, reduction: str = "mean") -> None:
        super().__init__(reduction=reduction)
        self.spec = spec

    def forward(self, cosines: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(heads.margin_logits(cosines, labels, self.spec), labels, reduction=self.reduction)


def opacus(spec: ModelSpec, classes: int, batch: int, mode: str, known: bool = False) -> Step:
    if known:
        register_cosine_head()
    model = network(spec, classes, known)
    x, y = faces(spec, classes, batch)
    loader: Any = DataLoader(TensorDataset(x, y), batch_size=batch)
    criterion: Any = MarginLoss(spec)
    made: Any = PrivacyEngine().make_private(
        module=model, optimizer=sgd(model), criterion=criterion, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0,
        poisson_sampling=False, grad_sample_mode=mode,
    )  # fmt: skip
    private, optimizer = made[:2]
    criterion = made[2] if len(made) == 4 else criterion

    def step() -> None:
        optimizer.zero_grad()
        criterion(private(x), y).backward()
        optimizer.step()

    return step


def one_by_one(spec: ModelSpec, classes: int, batch: int) -> Step:
    """Photo after photo, clipped and added up: what needs no per-photo gradients and no trick."""
    model = network(spec, classes)
    optimizer, (x, y), own = sgd(model), faces(spec, classes, batch), list(model.parameters())

    def step() -> None:
        total = [torch.zeros_like(p) for p in own]
        for i in range(batch):
            grads = torch.autograd.grad(heads.loss(model(x[i : i + 1]), y[i : i + 1], spec), own)
            length = torch.stack(torch._foreach_norm(grads)).norm()
            torch._foreach_add_(total, torch._foreach_mul(list(grads), float((1 / (length + 1e-6)).clamp(max=1))))
        for p, t in zip(own, total, strict=True):
            p.grad = (t + torch.randn(t.shape)) / batch
        optimizer.step()

    return step


WAYS: dict[str, Callable[[ModelSpec, int, int], Step]] = {
    "no privacy": not_private,
    "dp-sgd, bookkeeping (default)": lambda *a: ours(*a, "bookkeeping"),
    "dp-sgd, hooks": lambda *a: ours(*a, "hooks"),
    "Opacus hooks, as it comes": lambda *a: opacus(*a, "hooks"),
    "Opacus functorch, as it comes": lambda *a: opacus(*a, "functorch"),
    "Opacus ghost, as it comes": lambda *a: opacus(*a, "ghost"),
    "Opacus ghost, told of the head": lambda *a: opacus(*a, "ghost", True),
    "photo after photo": one_by_one,
}


def needed(way: str, spec: ModelSpec, classes: int, batch: int) -> float:
    """MB beyond what the process had after its imports and a first little step."""
    torch.set_num_threads(1)
    WAYS[way](spec, 2, 2)()
    memory.forget_peak()
    before = memory.peak()
    step = WAYS[way](spec, classes, batch)
    for _ in range(3):
        step()
    return memory.peak() - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbone", default="small", choices=list(BACKBONES))
    parser.add_argument("--side", type=int, default=48)
    parser.add_argument("--features", type=int, default=128)
    parser.add_argument("--classes", type=int, default=14)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS), metavar="WAY")
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    spec = ModelSpec(options.backbone, "group", options.features, options.side, "cosface", 0.25, 30.0)
    size = (spec, options.classes, options.batch)
    print(f"{options.backbone}, {options.side} px, {options.classes} classes, batches of {options.batch}, one thread")
    spent = best({way: WAYS[way](*size) for way in options.ways}, options.repeats, process_time)
    theirs = min((s for way, s in spent.items() if way.startswith("Opacus")), default=None)
    print(f"{'':<34} {'ms':>8} {'images/s':>9} {'of no privacy':>14} {'x best Opacus':>14} {'MB':>7}")
    for way, seconds in spent.items():
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
            megabytes = pool.submit(needed, way, *size).result()
        share = f"{spent['no privacy'] / seconds:.2f}" if "no privacy" in spent else ""
        ratio = "" if theirs is None else f"{theirs / seconds:.2f}"
        print(
            f"{way:<34} {seconds * 1e3:>8.1f} {options.batch / seconds:>9.0f} {share:>14} {ratio:>14} {megabytes:>7.0f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
