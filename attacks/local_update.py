"""Updates of several optimiser steps on the same photos: what is matched in place of the gradient of one step.

With heavy-ball momentum m, v_k = m v_{k-1} + g_k + λθ_k and θ_{k+1} = θ_k - η v_k, the change over K steps is

    Δ = -η Σ_k c_k (g_k + λθ_k),    c_k = (1 - m^(K-k)) / (1 - m),    k = 0..K-1.

"naive" takes the weighted mean of the g_k for the gradient at θ_0; "surrogate" for the gradient at a place between θ_0 and θ_K
(SME, Zhu et al. 2023, arXiv 2306.00127); "unrolled" takes the client's steps again on the photos that it tries.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from attacks.objectives import TINY, HeadMatching, Inputs, distance
from attacks.updates import gradient, targets, unreadable, weights_of_steps
from fedgc.types import LocalConstants, Observation, ObservedUpdate, Tensors

LocalUpdate = Literal["naive", "surrogate", "unrolled"]
PLACES = (0.0, 0.5, 1.0)  # of surrogates, on the way from θ_0 to θ_K
MOST = 8  # steps that are unrolled


def single_steps(
    update: ObservedUpdate, constants: LocalConstants, how: LocalUpdate
) -> list[tuple[ObservedUpdate, LocalConstants]]:
    """The single steps whose gradient may stand for that of an update; which of them does best, a matching loss has to say.

    An update of one step is itself. Noise that a defense card tells of is that of a mean of K steps.
    """
    steps = constants.steps or 1
    if steps == 1:
        return [(update, constants)]
    mean = gradient(update, constants)
    once = replace(constants, steps=1, momentum=0.0, defense=_quieter(constants, weights_of_steps(constants)))
    return [(_step_at(place, update, mean, once), once) for place in (PLACES if how == "surrogate" else PLACES[:1])]


def _step_at(place: float, update: ObservedUpdate, mean: Tensors, constants: LocalConstants) -> ObservedUpdate:
    """The step with gradient ``mean`` from a place on the straight line between an update's start and end."""
    before = {n: t + place * update.delta[n] if n in update.delta else t for n, t in update.before.items()}
    delta = {n: -constants.lr_of(n) * (g + constants.weight_decay * before[n]) for n, g in mean.items()}
    return replace(update, before=before, delta=delta)


def _quieter(constants: LocalConstants, weights: list[float]) -> dict[str, object]:
    card = dict(constants.defense)
    if card.get("name") == "dp-sgd":
        card["noise_multiplier"] *= sum(w * w for w in weights) ** 0.5 / sum(weights)
    return card


def not_unrolled(observation: Observation) -> str | None:
    """Why the steps behind the updates of this observation cannot be taken again, or None."""
    constants, instead = observation.public_constants, "set local_update = 'surrogate'"
    if (constants.steps or 0) > MOST:
        return f"local_update = 'unrolled' takes up to {MOST} steps again, and this update is of {constants.steps}: {instead}"
    if constants.defense.get("name") == "dp-sgd":
        return f"local_update = 'unrolled' does not take the steps of dp-sgd: {instead}"
    if any(len(update.clients) > 1 for update in targets(observation)):
        return f"local_update = 'unrolled' takes one client's steps, and this update is a mean over several: {instead}"
    return unreadable(observation, forward=True)


@dataclass(frozen=True)
class UnrolledMatching:
    """The change that K steps on the candidate images make, in units of a gradient, against the observed one by its cosine.

    Each step is as in `fedgc.local`: the loss by the head's rows, its gradient shortened to ``clip_norm``, weight decay, momentum
    and a learning rate of the head's own. Differentiable through all steps. One step is `HeadMatching`.
    """

    matching: HeadMatching
    constants: LocalConstants

    @classmethod
    def of(cls, update: ObservedUpdate, constants: LocalConstants, labels: Tensor | None) -> UnrolledMatching:
        """labels: int64 (B,) rows of the head, the same at every step, or None as in `HeadMatching`."""
        seen = gradient(update, constants)
        return cls(HeadMatching.of(update.before, seen, labels, constants.spec), constants)

    @property
    def inputs(self) -> Inputs:
        return self.matching.inputs

    @property
    def key(self) -> tuple[object, ...]:
        c = self.constants
        return (
            "unrolled",
            *self.matching.key,
            c.steps,
            c.lr,
            c.head_lr_factor,
            c.momentum,
            c.weight_decay,
            c.clip_norm,
        )

    def value(self, inputs: Inputs, images: Tensor) -> Tensor:
        c, problem = self.constants, self.matching.problem
        tensors, start = problem.parameters(inputs)
        names, now = list(problem.observed), start
        velocity = [torch.zeros_like(t) for t in start]
        for _ in range(c.steps or 1):
            loss = self.matching.loss({**tensors, **dict(zip(names, now, strict=True))}, inputs, images)
            slopes = shortened(torch.autograd.grad(loss, now, create_graph=True), c.clip_norm)
            velocity = [c.momentum * v + g + c.weight_decay * t for v, g, t in zip(velocity, slopes, now, strict=True)]
            now = [t - c.lr_of(n) * v for n, t, v in zip(names, now, velocity, strict=True)]
        first = dict(zip(names, start, strict=True))
        change = {n: after - first[n] for n, after in zip(names, now, strict=True)}
        trial = gradient(ObservedUpdate((), first, change, len(images), ()), c)
        return distance(list(trial.values()), inputs["observed"], "cosine")


def shortened(slopes: tuple[Tensor, ...], clip: float | None) -> list[Tensor]:
    """To the length ``clip`` at most, all as one vector, as `torch.nn.utils.clip_grad_norm_` does it."""
    if clip is None:
        return list(slopes)
    length = (torch.stack([g.square().sum() for g in slopes]).sum() + TINY).sqrt()
    factor = torch.clamp(clip / (length + 1e-6), max=1.0)
    return [factor * g for g in slopes]
