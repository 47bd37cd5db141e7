"""Opacus's private optimiser, told which gradients belong together and which are unfit to be added up."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from opacus.optimizers import DPOptimizer
from torch import Tensor

from defenses.evidence import require_bounded
from defenses.layer_gradients import Units
from fedgc.doors import ClientPlan


class UnitOptimizer(DPOptimizer):
    """Before clipping, a gradient that is not finite is zeroed in every tensor (one such photo would undo clipping and noise for
    all) and counted in ``dropped``, and gradients of one person are averaged where ``people`` names the person of each."""

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.people: Tensor | None = None
        self.dropped = 0

    def clip_and_accumulate(self) -> None:
        gradients = [p.grad_sample for p in self.params]
        if len(gradients[0]):
            fit = torch.stack([g.flatten(1).isfinite().all(dim=1) for g in gradients]).all(dim=0)
            self.dropped += int((~fit).sum())
            units = Units(len(fit), None if self.people is None else self.people.to(fit.device))
            for p in self.params:
                p.grad_sample = units.mean(fit_only(p.grad_sample, fit))
        super().clip_and_accumulate()

    def add_noise(self) -> None:
        units = self.counted()
        require_bounded([p.summed_grad for p in self.params], units * self.max_grad_norm, f"the sum over {units} units")
        super().add_noise()

    def counted(self) -> int:
        """Units whose gradients are in the sum."""
        return len(self.params[0].grad_sample)


def fit_only(gradient: Tensor, fit: Tensor) -> Tensor:
    """(B, ...) with zeros for all photos but those of ``fit`` (B,)."""
    return gradient if bool(fit.all()) else torch.where(fit.view(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)


def with_people(batches: Iterator[Tensor], plan: ClientPlan, optimizer: UnitOptimizer) -> Iterator[Tensor]:
    """The batches (photo indices), each announced to the optimiser by the people on its photos."""
    assert plan.people is not None
    for index in batches:
        optimizer.people = plan.people[index]
        yield index
