"""Six mistakes that implementations of DP-SGD make, each charged for as if it were correct. An audit has to find them.

They are built on the optimiser with gradients of single photos, and refuse to be planted in another.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from pydantic import PrivateAttr
from torch import Tensor

from defenses.dp_sgd import DPSGD
from defenses.per_unit import UnitOptimizer
from fedgc.doors import LocalSession


class PlantedBug(DPSGD):
    """dp-sgd whose optimiser is swapped for ``optimizer``, which knows the class embeddings as ``rows``."""

    mode: Literal["hooks"] = "hooks"
    optimizer: ClassVar[type[UnitOptimizer]]

    @contextmanager
    def local_training(self, module: Any, *arguments: Any, **streams: Any) -> Iterator[LocalSession]:
        with super().local_training(module, *arguments, **streams) as session:
            assert type(session.optimizer) is UnitOptimizer
            session.optimizer.__class__ = self.optimizer
            session.optimizer.rows = module.head.weight
            yield session


class NoNoise(PlantedBug):
    """The noise was forgotten: the clipped sum leaves as it is."""

    class optimizer(UnitOptimizer):  # noqa: N801
        def add_noise(self) -> None:
            for p in self.params:
                p.grad = p.summed_grad.view_as(p)


class NoiseOfTheMean(PlantedBug):
    """Noise divided by √B, as if B independent draws were averaged: the factor of 2202.12219's kind."""

    class optimizer(UnitOptimizer):  # noqa: N801
        def add_noise(self) -> None:
            right = self.noise_multiplier
            self.noise_multiplier = right / self.expected_batch_size**0.5
            super().add_noise()
            self.noise_multiplier = right


class ClipsTheMean(PlantedBug):
    """The gradient of the batch is clipped, as against exploding gradients, and not that of each photo."""

    class optimizer(UnitOptimizer):  # noqa: N801
        def clip_and_accumulate(self) -> None:
            super().clip_and_accumulate()  # leaves out what is not finite, so that this mistake stands alone
            mean = [p.grad_sample.sum(dim=0) / self.expected_batch_size for p in self.params]
            length = torch.stack([g.norm() for g in mean]).norm()
            factor = (self.max_grad_norm / length).clamp(max=1.0)
            for p, g in zip(self.params, mean, strict=True):
                p.summed_grad = g * factor * self.expected_batch_size


class BareRows(PlantedBug):
    """Only the backbone is noised: the class embeddings are taken for no part of the model."""

    class optimizer(UnitOptimizer):  # noqa: N801
        rows: Tensor

        def add_noise(self) -> None:
            super().add_noise()
            self.rows.grad = self.rows.summed_grad.view_as(self.rows)


class SameNoise(DPSGD):
    """Fresh noise in every run, and the same in every round of it: the round is missing from the name of the stream."""

    _rounds: int = PrivateAttr(default=0)
    _first: Tensor | None = PrivateAttr(default=None)

    @contextmanager
    def local_training(
        self, module: Any, optimizer: Any, batches: Any, plan: Any, sampling: Any, noise: torch.Generator
    ) -> Iterator[LocalSession]:
        if self._rounds % plan.rounds == 0:
            self._first = noise.get_state()
        noise.set_state(self._first)
        self._rounds += 1
        with super().local_training(module, optimizer, batches, plan, sampling, noise) as session:
            yield session


class NotANumber(PlantedBug):
    """``if norm > C`` is false where the norm is not a number: that photo is added unclipped, and the noise vanishes in it."""

    class optimizer(UnitOptimizer):  # noqa: N801
        def clip_and_accumulate(self) -> None:
            gradients = [p.grad_sample for p in self.params]
            lengths = torch.stack([g.flatten(1).norm(dim=1) for g in gradients]).norm(dim=0)
            factors = torch.where(lengths > self.max_grad_norm, self.max_grad_norm / lengths, 1.0)
            for p, g in zip(self.params, gradients, strict=True):
                p.summed_grad = torch.einsum("i,i...->...", factors, g)


PLANTED: tuple[type[DPSGD], ...] = (NoNoise, NoiseOfTheMean, ClipsTheMean, BareRows, SameNoise, NotANumber)


def runs_needed(bug: type[DPSGD]) -> int:
    """In each world, for an audit to flag it."""
    return 200 if bug is NoiseOfTheMean else 100
