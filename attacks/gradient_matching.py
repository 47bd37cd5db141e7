"""The one optimisation loop: parameters of images that bring an objective and a prior's penalty down, from several starts."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from attacks.priors import Prior, Shape, mean_face
from fedgc.types import Progress

Optimizer = Literal["adam", "signed-adam", "lbfgs"]


@dataclass(frozen=True)
class Schedule:
    """Adam with its step divided by ten at 3/8, 5/8 and 7/8 (Geiping et al. 2020), on the gradient or on its sign; or L-BFGS-B
    within the prior's box. With ``tolerance`` > 0 a start ends early where a tenth of the iterations lowers its best loss by
    less than that fraction. group: weight of the squared distance of a start from the mean of all, which then go in step
    (Yin et al. 2021)."""

    iterations: int
    restarts: int = 1
    step_size: float = 0.1
    optimizer: Optimizer = "adam"
    tolerance: float = 0.0
    group: float = 0.0

    def step_at(self, i: int) -> float:
        return self.step_size * 0.1 ** sum(i >= self.iterations * eighths // 8 for eighths in (3, 5, 7))


@dataclass(frozen=True)
class Solution:
    """images (B, 3, H, W) in [0, 1]; loss: the objective there, without the penalty; every: (restarts, B, 3, H, W) where each
    start ended. Where every start failed the loss is inf and the images are a start."""

    images: Tensor
    loss: float
    every: Tensor
    iterations: int
    failed: int


@dataclass
class Descent:
    """One start: its parameters now, and the best by objective + penalty so far, with the objective there; last: the latest."""

    z: Tensor
    best: float = math.inf
    chosen: Tensor | None = None
    distance: float = math.inf
    failed: bool = False
    used: int = 0
    last: float = math.inf

    def note(self, total: float, distance: float) -> bool:
        """Whether the start goes on."""
        self.used, self.last = self.used + 1, total
        if not math.isfinite(total):
            return self.fail()
        if total < self.best:
            self.best, self.distance, self.chosen = total, distance, self.z.detach().clone()
        return True

    def fail(self) -> bool:
        """What it found so far does not count, and it does not go on."""
        self.failed, self.best, self.distance = True, math.inf, math.inf
        return False


def match(
    distance: Callable[[Tensor], Tensor],
    prior: Prior,
    shape: Shape,
    schedule: Schedule,
    generator: torch.Generator,
    tick: Callable[[int], None],
) -> Solution:
    """The best images by distance + penalty, over all iterates of all starts. The truth plays no part in the choice.

    tick is called with the number of iterations finished so far, out of restarts x iterations. A start whose loss or gradient
    stops being finite is counted as failed; the images of the others stand.
    """
    starts = [Descent(prior.start(shape, restart, generator)) for restart in range(schedule.restarts)]
    groups = [starts] if schedule.group else [[start] for start in starts]
    descend = _quasi_newton if schedule.optimizer == "lbfgs" else _adam
    for number, group in enumerate(groups):
        before = number * schedule.iterations * len(group)
        descend(distance, prior, group, schedule, offset(tick, before))
        tick(before + schedule.iterations * len(group))
    best = min(starts, key=lambda start: start.best)
    final = lambda start: prior.final(start.z if start.chosen is None else start.chosen).detach()  # noqa: E731
    every = torch.stack([final(start) for start in starts]).clamp(0, 1)
    return Solution(
        final(best).clamp(0, 1).contiguous(), best.distance, every,
        sum(s.used for s in starts), sum(s.failed for s in starts),
    )  # fmt: skip


def offset(tick: Callable[[int], None], before: int) -> Callable[[int], None]:
    """Counts on from ``before``."""
    return lambda done: tick(before + done)


def nothing_found(faces: Tensor | None, shape: Shape) -> Solution:
    """The answer of an attack that found nothing: the mean face."""
    images = mean_face(faces, shape).expand(shape).contiguous()
    return Solution(images, math.inf, images[None], 0, 1)


def counted(progress: Progress, total: int) -> Callable[[int], None]:
    """Reports a count as so many of ``total``."""
    return lambda done: progress(done, total)


def _adam(
    distance: Callable[[Tensor], Tensor],
    prior: Prior,
    group: list[Descent],
    schedule: Schedule,
    tick: Callable[[int], None],
) -> None:
    for start in group:
        start.z = start.z.clone().requires_grad_()
    optimizer = torch.optim.Adam([start.z for start in group], lr=schedule.step_size)
    window, reference = max(1, schedule.iterations // 10), math.inf
    for i in range(schedule.iterations):
        middle = _middle(group) if schedule.group else None
        going = [_slope(distance, prior, start, schedule, middle) for start in group if not start.failed]
        if not any(going):
            return
        optimizer.param_groups[0]["lr"] = schedule.step_at(i)
        optimizer.step()
        with torch.no_grad():
            for start in group:
                prior.project_(start.z)
        if (i + 1) % window == 0:
            tick((i + 1) * len(group))
            best = min(start.best for start in group)
            if reference - best < schedule.tolerance * abs(reference):
                return
            reference = best


def _middle(group: list[Descent]) -> Tensor:
    """The mean of the starts that have not failed, or are about to: one number that is not finite would end them all."""
    every = [start.z.detach() for start in group if not start.failed]
    return torch.stack([z for z in every if bool(z.isfinite().all())] or every).mean(0)


def _slope(
    distance: Callable[[Tensor], Tensor], prior: Prior, start: Descent, schedule: Schedule, middle: Tensor | None
) -> bool:
    """Put the gradient at a start where the optimiser looks for it; False where that or the loss is not finite."""
    images = prior.images(start.z)
    apart = distance(images)
    objective = apart + prior.penalty(start.z, images)
    if not start.note(float(objective.detach()), float(apart.detach())):
        start.z.grad = None
        return False
    if middle is not None:
        objective = objective + schedule.group * (start.z - middle).square().sum()
    (start.z.grad,) = torch.autograd.grad(objective, start.z)
    if not bool(start.z.grad.isfinite().all()):  # its sign would be, and L-BFGS would end there without a word
        start.z.grad = None
        return start.fail()
    if schedule.optimizer == "signed-adam":
        start.z.grad.sign_()
    return True


def _quasi_newton(
    distance: Callable[[Tensor], Tensor],
    prior: Prior,
    group: list[Descent],
    schedule: Schedule,
    tick: Callable[[int], None],
) -> None:
    """SciPy's L-BFGS-B, one start after another."""
    for number, start in enumerate(group):
        try:
            _minimize(distance, prior, start, schedule, offset(tick, number * schedule.iterations))
        except _NotFiniteError:
            continue


class _NotFiniteError(Exception):
    """Leaves SciPy's loop where a loss is not a number."""


def _minimize(
    distance: Callable[[Tensor], Tensor], prior: Prior, start: Descent, schedule: Schedule, tick: Callable[[int], None]
) -> None:
    shape, done = start.z.shape, 0

    def fall(flat: np.ndarray) -> tuple[float, np.ndarray]:
        start.z = torch.from_numpy(flat).to(start.z.device, torch.float32).view(shape).requires_grad_()
        if not _slope(distance, prior, start, schedule, None):
            raise _NotFiniteError
        assert start.z.grad is not None
        return start.last, start.z.grad.double().cpu().numpy().ravel()

    def count(_: np.ndarray) -> None:
        nonlocal done
        done += 1
        tick(done)

    bounds = None if prior.box is None else [prior.box] * start.z.numel()
    options = {"maxiter": schedule.iterations, "maxfun": schedule.iterations * 2, "maxcor": 20, "ftol": 0, "gtol": 0}
    minimize(fall, start.z.detach().double().cpu().numpy().ravel(), jac=True, method="L-BFGS-B", bounds=bounds,
             callback=count, options=options)  # fmt: skip
