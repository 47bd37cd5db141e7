"""What stands between dp-sgd and a false epsilon, measured: gradients, sensitivity, noise, sampling, accountants and the ledger.

Each line is one property with its amount and its worst figure beside what it may be. The audit of the whole mechanism, with bugs
planted in it, is `fedgc-priv audit` and tests/defenses.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from scipy import stats
from torch import Tensor, nn

from defenses.accounting import epsilon_of, pld_epsilon
from defenses.dp_sgd import DPSGD, poisson_units
from fedgc import heads
from fedgc.doors import ClientPlan
from fedgc.models import FaceModel, build_model
from fedgc.rng import generator
from fedgc.runs import RunDirectory
from fedgc.types import Charge, ModelSpec

CLASSES, CLIP = 5, 0.3
MODES = ("bookkeeping", "hooks")
NETWORKS = (  # backbone, norm, margin of the head, clipping norm
    ("small", "group", "cosface", 1e6),
    ("small", "frozen", "arcface", 0.5),
    ("small", "group", "none", 0.5),
    ("mobilefacenet", "group", "cosface", 1e6),
    ("mobilefacenet", "frozen", "arcface", 0.5),
)


def made(spec: ModelSpec, dtype: torch.dtype) -> FaceModel:
    model = build_model(spec, CLASSES, 0)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    return model.to(dtype).train()


def batch(spec: ModelSpec, photos: int, seed: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    x = torch.rand(photos, 3, spec.image_size, spec.image_size, generator=drawn, dtype=dtype)
    return x, torch.randint(CLASSES, (photos,), generator=drawn)


def clipped_sum(
    model: FaceModel, spec: ModelSpec, x: Tensor, y: Tensor, mode: str, clip: float, people: Tensor | None = None
) -> Tensor:
    """All parameters in one vector, before noise."""
    unit = "image" if people is None else "identity"
    defense = DPSGD(noise_multiplier=1.0, max_grad_norm=clip, mode=cast(Any, mode), unit=cast(Any, unit))
    optimizer, plan = torch.optim.SGD(model.parameters(), lr=1.0), ClientPlan(0, len(x), 4, 1, people=people)
    with defense.local_training(
        model, optimizer, iter([torch.arange(len(x))]), plan, None, torch.Generator()
    ) as session:
        for index in session.batches:
            session.optimizer.zero_grad()
            heads.loss(model(x[index]), y[index], spec).backward()
            session.optimizer.clip_and_accumulate()
        return torch.cat([cast(Any, p).summed_grad.flatten() for p in model.parameters()])


def looped(model: FaceModel, spec: ModelSpec, x: Tensor, y: Tensor, clip: float) -> Tensor:
    total = torch.zeros(sum(p.numel() for p in model.parameters()), dtype=x.dtype)
    for i in range(len(x)):
        grads = torch.autograd.grad(heads.loss(model(x[i : i + 1]), y[i : i + 1], spec), list(model.parameters()))
        own = torch.cat([g.flatten() for g in grads])
        total += own * min(1.0, clip / (float(own.norm()) + 1e-6))
    return total


def gradients() -> Iterator[str]:
    """The worst relative error of a clipped sum, against a loop over photos in float64; the loop's own in float32 beside."""
    for backbone, norm, margin, clip in NETWORKS:
        spec = ModelSpec(cast(Any, backbone), cast(Any, norm), 16, 32, cast(Any, margin), 0.2, 8.0)
        models = {dtype: made(spec, dtype) for dtype in (torch.float64, torch.float32)}
        worst: dict[str, float] = {}
        for photos in (1, 2, 7, 16):
            x, y = batch(spec, photos, photos, torch.float32)
            truth = looped(models[torch.float64], spec, x.double(), y, clip)
            for dtype, model in models.items():
                found = {mode: clipped_sum(model, spec, x.to(dtype), y, mode, clip) for mode in MODES}
                if dtype == torch.float32:
                    found["loop"] = looped(model, spec, x, y, clip)
                for mode, total in found.items():
                    name, error = f"{mode} {str(dtype)[6:]}", float((total.double() - truth).norm() / truth.norm())
                    worst[name] = max(worst.get(name, 0.0), error)
        errors = ", ".join(f"{name} {error:.1e}" for name, error in worst.items())
        yield f"D1 gradients, {backbone}, {norm}, {margin}, batches of 1, 2, 7, 16: worst relative error {errors}"


def sensitivity(trials: int) -> Iterator[str]:
    """How far one photo, or one person, moves the sum, in clipping norms; among them photos that are infinite or undefined."""
    spec = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
    model = made(spec, torch.float32)
    odd = (1.0, 1e4, 1e20, math.inf, math.nan, -math.inf)
    for mode in MODES:
        for unit in ("image", "identity"):
            worst, unbounded = 0.0, 0
            for trial in range(trials):
                x, y = batch(spec, 2 + trial % 6, trial, torch.float32)
                x = x * 10.0 ** (trial % 7 - 3)
                if trial % 2:
                    x[0] = odd[trial // 2 % 6]
                people = None if unit == "image" else torch.arange(len(x)) // 2
                rest = slice(1, None) if people is None else slice(2, None)
                whole = clipped_sum(model, spec, x, y, mode, CLIP, people).double()
                left = people if people is None else people[rest]
                other = torch.zeros_like(whole)
                if len(x[rest]):
                    other = clipped_sum(model, spec, x[rest], y[rest], mode, CLIP, left).double()
                moved = float((whole - other).norm()) / CLIP
                unbounded += not math.isfinite(moved) or moved > 1 + 1e-6
                worst = max(worst, moved)
            bound = f"worst {worst:.7f} C; beyond C (1 + 1e-6): {unbounded}"
            yield f"D2 sensitivity, {mode}, unit {unit}, float32: {trials} batches: {bound}"


def noise(draws: int) -> Iterator[str]:
    """Variance, normality and freshness of what is released where no photo was drawn."""
    spec = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
    for mode in MODES:
        model = made(spec, torch.float32)
        defense, found = DPSGD(noise_multiplier=1.5, max_grad_norm=CLIP, mode=cast(Any, mode)), []
        plan, optimizer = ClientPlan(0, 100, 4, 1), torch.optim.SGD(model.parameters(), lr=0.0)
        stream = generator("guarantee", mode)
        with defense.local_training(model, optimizer, iter(()), plan, None, stream) as session:
            while sum(map(len, found)) < draws:
                session.optimizer.zero_grad()
                heads.loss(model(torch.zeros(0, 3, 32, 32)), torch.zeros(0, dtype=torch.long), spec).backward()
                session.optimizer.step()
                found.append(torch.cat([p.grad.flatten() for p in model.parameters()]) * 4 / (1.5 * CLIP))
        same = max(float(torch.corrcoef(torch.stack([a, b]))[0, 1].abs()) for a, b in pairwise(found))
        values = torch.cat(found)[:draws].double().numpy()
        p = stats.kstest(values, "norm").pvalue
        shape = f"variance {values.var():.4f} of what is promised, KS p {p:.2f}"
        yield f"D3 noise, {mode}: {draws} draws, {len(found)} empty batches: {shape}, correlation of steps at most {same:.4f}"


def sampling(batches: int) -> Iterator[str]:
    """Inclusion rate of every photo, size of a batch, and independence of two photos, in standard errors."""
    n, rate = 60, 0.1
    joined = np.zeros((batches, n), dtype=bool)
    for i, index in enumerate(poisson_units(n, rate, batches, generator("guarantee", "sampling"))):
        joined[i, index.numpy()] = True
    error = math.sqrt(rate * (1 - rate) / batches)
    single = np.abs(joined.mean(0) - rate).max() / error
    sizes = joined.sum(1)
    counts = np.bincount(sizes, minlength=n + 1)[: n + 1]
    kept = stats.binom.pmf(range(n + 1), n, rate) * batches > 5
    expected = stats.binom.pmf(range(n + 1), n, rate)[kept]
    chi = stats.chisquare(counts[kept], expected / expected.sum() * counts[kept].sum()).pvalue
    pairs = np.abs(np.corrcoef(joined.T) - np.eye(n)).max() * math.sqrt(batches)
    worst = f"worst inclusion rate {single:.2f} (of {n}), worst correlation of two photos {pairs:.2f} (of {n * (n - 1) // 2})"
    yield f"D4 sampling: {batches} batches of {n} photos at rate {rate}, in standard errors: {worst}; batch sizes: p {chi:.2f}"


def accountants() -> Iterator[str]:
    """PLD, PRV and RDP on a grid."""
    above, apart, worst, count = 0, 0, 0.0, 0
    for rate in (0.01, 0.05, 0.1, 0.3):
        for sigma in (0.7, 1.0, 1.5, 2.5, 5.0):
            for steps in (1, 10, 100, 500, 2000):
                history = [(sigma, rate, steps)]
                rdp, prv, pld = (
                    epsilon_of(history, 1e-4, quick=True),
                    epsilon_of(history, 1e-4),
                    pld_epsilon(history, 1e-4),
                )
                assert pld is not None
                above += pld > rdp + 1e-9
                worst = max(worst, abs(pld - prv) / (0.01 * pld + 0.02))
                apart += abs(pld - prv) > 0.01 * pld + 0.02
                count += 1
    agreed = f"|PLD - PRV| beyond 1 % + 0.02 in {apart} (worst {worst:.2f} of that)"
    yield f"D5 accountants: {count} settings: PLD above RDP in {above}; {agreed}"
    anchor = [(1.0, 0.1, 200)]
    prv, rdp = epsilon_of(anchor, 2.5e-4), epsilon_of(anchor, 2.5e-4, quick=True)
    yield f"D5 anchor: PLD {pld_epsilon(anchor, 2.5e-4):.2f}, PRV {prv:.2f}, RDP (Opacus) {rdp:.2f}"


def ledger(scenarios: int) -> Iterator[str]:
    """Rounds that are charged, cut off after the charge, and played again with the same or other noise."""
    rng, wrong = np.random.default_rng(0), 0
    for _ in range(scenarios):
        with tempfile.TemporaryDirectory() as folder:
            run = RunDirectory(Path(folder) / "run")
            run.create("")
            state: list[Charge] = []
            released: set[Charge] = set()
            for t in range(1, 9):
                sigma = 1.0
                for _ in range(int(rng.integers(0, 3))):  # cut off: charged, released perhaps, and no state kept
                    sigma = float(rng.choice([1.0, 1.0, 1.1, 1.2]))
                    tries = [Charge(k, t, sigma, 0.1, 5, 3) for k in range(3) if rng.random() < 0.8]
                    run.charge((*state, *tries))
                    released |= set(tries)
                done = [Charge(k, t, sigma, 0.1, 5, 3) for k in range(3) if rng.random() < 0.8]
                kept = run.charge((*state, *done))
                state, released = [*state, *done], released | set(done)
                if rng.random() < 0.2:
                    run = RunDirectory(run.path)
                wrong += set(kept) != released or len(kept) != len(released)
    yield f"D7 ledger: {scenarios} runs of 8 rounds, cut off and played again: charges other than what was released: {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=1000, help="of sensitivity")
    parser.add_argument("--draws", type=int, default=10**6)
    parser.add_argument("--batches", type=int, default=10_000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    for lines in (
        gradients(),
        noise(options.draws),
        sampling(options.batches),
        accountants(),
        ledger(30),
        sensitivity(options.trials),
    ):
        for line in lines:
            print(line, flush=True)


if __name__ == "__main__":
    main()
