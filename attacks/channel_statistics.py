"""What BatchNorm layers remember of the photos that a model was trained on, as a prior on images (DeepInversion).

The running statistics are means and variances of each channel over all photos of all clients. Images that are like those photos
have channels of such means and variances; a batch of one or a few has them roughly.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from attacks.priors import Prior, Shape
from fedgc.models import load_backbone
from fedgc.types import ModelSpec, Tensors

TINY = 1e-12


def distance_from(statistics: Tensors, before: Tensors, spec: ModelSpec) -> Callable[[Tensor], Tensor]:
    """images (B, 3, H, W) -> Σ_l |μ_l - running mean_l| + |σ²_l - running variance_l|, over the layers l of the backbone at
    ``before``; μ_l, σ²_l (biased) over photos and places of what layer l is given (Yin et al. 2020, arXiv 1912.08795, eq. 4).

    The layers normalise by the running statistics, as in a recorded step.
    """
    backbone = load_backbone(spec, {**before, **statistics}).requires_grad_(False)
    layers = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]

    def distance(images: Tensor) -> Tensor:
        apart: list[Tensor] = []
        hooks = [
            m.register_forward_pre_hook(lambda layer, given: apart.append(_apart(layer, given[0]))) for m in layers
        ]
        try:
            backbone(images)
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack(apart).sum()

    return distance


def _apart(layer: nn.Module, x: Tensor) -> Tensor:
    over = [d for d in range(x.dim()) if d != 1]
    mean, variance = x.mean(over), x.var(over, correction=0)
    gaps = mean - cast(Tensor, layer.running_mean), variance - cast(Tensor, layer.running_var)
    return torch.stack([(gap.square().sum() + TINY).sqrt() for gap in gaps]).sum()


@dataclass(frozen=True)
class WithStatistics:
    """A prior with the distance from running statistics as a further penalty, ``weight`` times."""

    prior: Prior
    distance: Callable[[Tensor], Tensor]
    weight: float

    @property
    def box(self) -> tuple[float, float] | None:
        return self.prior.box

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor:
        return self.prior.start(shape, restart, generator)

    def images(self, parameters: Tensor) -> Tensor:
        return self.prior.images(parameters)

    def final(self, parameters: Tensor) -> Tensor:
        return self.prior.final(parameters)

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor:
        return self.prior.penalty(parameters, images) + self.weight * self.distance(self.final(parameters))

    def project_(self, parameters: Tensor) -> None:
        self.prior.project_(parameters)
