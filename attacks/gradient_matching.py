"""The one optimisation loop: find images whose gradient points where the observed gradient points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import functional_call

from attacks.priors import Prior, Shape
from fedgc import heads
from fedgc.models import FaceModel
from fedgc.types import ModelSpec, Tensors


@dataclass(frozen=True)
class Matching:
    """1 - cosine between the gradient of candidate images and the observed one, over all parameters as one
    vector.

    Blind to the gradient's length and so to clipping of the whole. Parameters whose observed gradient is zero
    are left out.
    """

    model: FaceModel
    tensors: Tensors
    observed: Mapping[str, Tensor]
    labels: Tensor
    spec: ModelSpec

    @classmethod
    def of(cls, model: FaceModel, before: Tensors, gradient: Tensors, labels: Tensor, spec: ModelSpec) -> Matching:
        trained = dict(model.named_parameters())
        seen = {n: g.detach() for n, g in gradient.items() if n in trained and bool(g.any())}
        length = sum(float(g.double().square().sum()) for g in seen.values()) ** 0.5
        observed = {name: g / length for name, g in seen.items()}
        tensors = {name: t.detach().clone().requires_grad_(name in observed) for name, t in before.items()}
        return cls(model.eval(), tensors, observed, labels, spec)

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> a number in [0, 2], twice differentiable in the images."""
        cosines = functional_call(self.model, dict(self.tensors), (images,))
        loss = heads.loss(cosines, self.labels, self.spec)
        trial = torch.autograd.grad(loss, [self.tensors[n] for n in self.observed], create_graph=True)
        along = torch.stack([(t * o).sum() for t, o in zip(trial, self.observed.values(), strict=True)]).sum()
        length = torch.stack([t.square().sum() for t in trial]).sum()
        return 1 - along / (length + 1e-24).sqrt()


@dataclass(frozen=True)
class Schedule:
    """Adam with its step divided by ten at 3/8, 5/8 and 7/8 (Geiping et al. 2020). With ``tolerance`` > 0 a
    start ends early where a tenth of the iterations lowers its best loss by less than that fraction."""

    iterations: int
    restarts: int
    step_size: float
    tolerance: float = 0.0

    def step_at(self, i: int) -> float:
        return self.step_size * 0.1 ** sum(i >= self.iterations * eighths // 8 for eighths in (3, 5, 7))


@dataclass(frozen=True)
class Solution:
    """images (B, 3, H, W) in [0, 1]; loss: the objective there, inf where every start failed."""

    images: Tensor
    loss: float
    iterations: int
    failed: int


def match(
    distance: Callable[[Tensor], Tensor],
    prior: Prior,
    shape: Shape,
    schedule: Schedule,
    generator: torch.Generator,
    tick: Callable[[int], None],
) -> Solution:
    """The best images by distance + penalty, over all iterates of all starts. The truth plays no part in the
    choice.

    tick is called with the number of iterations finished so far, out of restarts x iterations. A start whose
    loss stops being finite is counted as failed; the images of the others stand.
    """
    best, images = math.inf, None
    spent = failed = 0
    for restart in range(schedule.restarts):
        start = prior.start(shape, restart, generator)
        before = restart * schedule.iterations
        loss, parameters, used, ok = _descend(distance, prior, start, schedule, offset(tick, before))
        spent, failed = spent + used, failed + (not ok)
        if images is None or loss < best:
            best, images = loss, prior.images(parameters)
        tick((restart + 1) * schedule.iterations)
    assert images is not None
    return Solution(images.detach().clamp(0, 1).contiguous(), best, spent, failed)


def offset(tick: Callable[[int], None], before: int) -> Callable[[int], None]:
    """Counts on from ``before``."""
    return lambda done: tick(before + done)


def _descend(
    distance: Callable[[Tensor], Tensor],
    prior: Prior,
    start: Tensor,
    schedule: Schedule,
    tick: Callable[[int], None],
) -> tuple[float, Tensor, int, bool]:
    """One start: (best loss, its parameters, iterations, whether the loss stayed finite)."""
    z = start.clone().requires_grad_()
    optimizer = torch.optim.Adam([z], lr=schedule.step_size)
    best, chosen, window = math.inf, start, max(1, schedule.iterations // 10)
    reference = math.inf
    for i in range(schedule.iterations):
        images = prior.images(z)
        objective = distance(images) + prior.penalty(z, images)
        loss = float(objective.detach())
        if not math.isfinite(loss):
            return math.inf, start, i + 1, False
        if loss < best:
            best, chosen = loss, z.detach().clone()
        (z.grad,) = torch.autograd.grad(objective, z)
        if prior.signed:
            z.grad.sign_()
        optimizer.param_groups[0]["lr"] = schedule.step_at(i)
        optimizer.step()
        with torch.no_grad():
            prior.project_(z)
        if (i + 1) % window == 0:
            tick(i + 1)
            if reference - best < schedule.tolerance * abs(reference):
                return best, chosen, i + 1, True
            reference = best
    return best, chosen, schedule.iterations, True
