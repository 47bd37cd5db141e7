"""Runs whose sampling, clipping or composition is not what is accounted for (reliability D4): no epsilon is told of them.

A lie is planted where an implementation would make the mistake: in the batches, in the optimiser, in the ledger. Sampling and
composition are looked at when the run ends, and epsilon is withheld; clipping in every step, and nothing leaves the client.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from defenses import dp_sgd, per_unit
from defenses.client_dp import ClientDP
from defenses.dp_sgd import DPSGD
from fedgc.config import load_config
from fedgc.errors import WorkFailedError
from fedgc.pipeline.training import train
from fedgc.rounds import Rounds
from tests.tiny import TINY
from tests.trust.cases import Case

PHOTOS = (
    *TINY, "record.victims=0", "federation.rounds=12", "federation.local_epochs=2", "federation.batch_size=8",
    "defense.name=dp-sgd", "defense.noise_multiplier=1.0", "defense.noise_seed=3",
)  # fmt: skip
LONG = (*PHOTOS, "federation.rounds=20")  # what is too even shows in many counts
PEOPLE = (*PHOTOS, "defense.unit=identity", "defense.photos_per_person=2")
CLIENTS = (
    *TINY, "record.victims=0", "federation.rounds=4", "defense.name=client-dp", "defense.noise_multiplier=1.0",
    "defense.delta=0.1", "defense.noise_seed=3",
)  # fmt: skip
HOOKS = ("defense.mode=hooks",)
Plant = Callable[[], Any]


def _batches(make: Callable[[int, float, int, torch.Generator], Iterator[Tensor]]) -> Plant:
    """Other batches in the place of Poisson's."""
    return lambda: patch.object(dp_sgd, "poisson_units", make)


def shuffled(count: int, rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Epochs of equal batches, as a loader with shuffle=True gives."""
    size = max(1, round(count * rate))
    for _ in range(steps):
        yield torch.randperm(count, generator=generator)[:size]


def balanced(count: int, rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """P people with K photos each: of the size that was asked for, every time."""
    size = max(2, 2 * round(count * rate / 2))
    for _ in range(steps):
        yield torch.randint(count, (size,), generator=generator)


def weighted(count: int, rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """The first half of the photos three times as likely as it is accounted for."""
    chance = torch.where(torch.arange(count) < count // 2, min(1.0, 3 * rate), rate)
    for _ in range(steps):
        yield (torch.rand(count, generator=generator) < chance).nonzero()[:, 0]


def whole(count: int, rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    for _ in range(steps):
        yield torch.arange(count)


def rarer(count: int, rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """A sampler that takes its rate from the wrong length: too few photos are as false as too many."""
    for _ in range(steps):
        yield (torch.rand(count, generator=generator) < rate / 3).nonzero()[:, 0]


def _charged(kind: type[DPSGD] | type[ClientDP], **changes: Any) -> Plant:
    """Charges that are written down as something else."""
    real = Rounds.charge

    def charge(run: Rounds, ledger: tuple[Any, ...]) -> tuple[Any, ...]:
        return real(run, tuple(type(c)(**{**c.__dict__, **changes}) for c in ledger))

    return lambda: patch.object(Rounds, "charge", charge)


def _forgotten(kept: Callable[[Any], bool]) -> Plant:
    real = Rounds.charge
    return lambda: patch.object(Rounds, "charge", lambda run, ledger: real(run, tuple(c for c in ledger if kept(c))))


def _unclipped() -> Any:
    """The sum of gradients as they are."""

    def add_up(self: per_unit.UnitOptimizer) -> None:
        for p in self.params:
            p.summed_grad = p.grad_sample.sum(dim=0) * 1000

    return patch.object(per_unit.UnitOptimizer, "clip_and_accumulate", add_up)


def _unmeasured() -> Any:
    """Clipped to ten times the norm that noise is measured by."""
    real = per_unit.UnitOptimizer.clip_and_accumulate

    def wide(self: per_unit.UnitOptimizer) -> None:
        norm, self.max_grad_norm = self.max_grad_norm, 1e4 * self.max_grad_norm
        for p in self.params:
            p.grad_sample = p.grad_sample * 1000
        real(self)
        self.max_grad_norm = norm

    return patch.object(per_unit.UnitOptimizer, "clip_and_accumulate", wide)


def _long_updates() -> Any:
    return patch("defenses.client_dp.clipped", lambda tensors, bound: {n: 1e3 * t for n, t in tensors.items()})


def _unrecorded() -> Any:
    """What was drawn is not on record, as in a run that an earlier version began."""
    real = Rounds.metrics
    return patch.object(
        Rounds, "metrics", lambda run: [{k: v for k, v in m.items() if k != "drawn"} for m in real(run)]
    )


def promised(settings: tuple[str, ...], folder: Path, *plants: Plant) -> dict[str, Any]:
    """The privacy of a run into which these were planted."""
    with ExitStack() as stack:
        for plant in plants:
            stack.enter_context(plant())
        return dict(train(load_config(settings=settings), folder / "run")["privacy"])


def _withheld(settings: tuple[str, ...], plant: Plant, says: str, folder: Path) -> str | None:
    told = promised(settings, folder, plant)
    if any(told.get(key) is not None for key in ("epsilon", "epsilon_pld", "epsilon_identity", "profile")):
        return f"an epsilon of {told['epsilon']} was told"
    return None if str(told.get("why", "")).startswith(says) else f"the reason is {told.get('why')!r}"


def _ended(settings: tuple[str, ...], plant: Plant, folder: Path) -> str | None:
    try:
        promised(settings, folder, plant)
    except WorkFailedError as error:
        sent = [path.name for path in folder.glob("run/checkpoints/*")]
        return f"released {sent}" if sent else None if "clipping" in str(error) else f"said {error}"
    return "gradients that nobody clipped were released"


def _stands(settings: tuple[str, ...], folder: Path) -> str | None:
    told = promised(settings, folder)
    return None if told["epsilon"] and told.get("why") is None else f"an honest run was doubted: {told.get('why')}"


PROMISES = (
    *(Case(f"batches that are {make.__name__}", partial(_withheld, LONG, _batches(make), "sampling"))
      for make in (shuffled, balanced)),
    *(Case(f"batches that are {make.__name__}", partial(_withheld, PHOTOS, _batches(make), "sampling"))
      for make in (weighted, whole, rarer)),
    *(Case(f"people that are {make.__name__}", partial(_withheld, PEOPLE, _batches(make), "sampling"))
      for make in (whole, rarer)),
    Case("draws without a record", partial(_withheld, PHOTOS, _unrecorded, "sampling")),
    Case("half of the steps charged", partial(_withheld, PHOTOS, _charged(DPSGD, steps=1), "composition")),
    Case("a higher noise charged", partial(_withheld, PHOTOS, _charged(DPSGD, noise_multiplier=2.0), "composition")),
    Case("a lower rate charged", partial(_withheld, PHOTOS, _charged(DPSGD, sample_rate=0.01), "composition")),
    Case("a round not charged", partial(_withheld, PHOTOS, _forgotten(lambda c: c.round != 7), "composition")),
    Case("a client not charged", partial(_withheld, PHOTOS, _forgotten(lambda c: c.client != 1), "composition")),
    Case("client-dp: a client not charged", partial(_withheld, CLIENTS, _forgotten(lambda c: c.client != 1), "composition")),
    Case("client-dp: a round not charged", partial(_withheld, CLIENTS, _forgotten(lambda c: c.round != 2), "composition")),
    Case("gradients not clipped", partial(_ended, (*PHOTOS, *HOOKS), _unclipped)),
    Case("gradients clipped elsewhere", partial(_ended, (*PHOTOS, *HOOKS), _unmeasured)),
    Case("client-dp: updates not clipped", partial(_ended, CLIENTS, _long_updates)),
    Case("an honest run of photos", partial(_stands, PHOTOS)),
    Case("an honest run of photos, with hooks", partial(_stands, (*PHOTOS, *HOOKS))),
    Case("an honest run of people", partial(_stands, PEOPLE)),
    Case("an honest run of clients", partial(_stands, CLIENTS)),
)  # fmt: skip
