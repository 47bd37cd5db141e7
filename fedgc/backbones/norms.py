"""What normalises between the layers: BatchNorm, BatchNorm held constant, or GroupNorm in its place."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgc.types import Norm

GROUPS = 8


class FrozenBatchNorm(nn.Module):
    """BatchNorm whose statistics and affine map are constants: (B, C, ...) -> the same, each photo by itself.

    All four are buffers under the names that BatchNorm uses, so that its tensors can be carried over and nothing trains
    them. As built (mean 0, variance 1) it does next to nothing.
    """

    weight: Tensor
    bias: Tensor
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "running_var"):
            self.register_buffer(name, torch.ones(channels))
        for name in ("bias", "running_mean"):
            self.register_buffer(name, torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def group_norm(layer: nn.BatchNorm1d | nn.BatchNorm2d) -> nn.GroupNorm:
    """The GroupNorm (Wu & He 2018) that stands in for a BatchNorm of maps or of flat features.

    Maps get up to eight groups. Flat features get one: a group of few numbers without a map to average over would be
    pinned (a single number to zero), whereas one group over all takes no more than their mean and common length.
    """
    groups = 1 if isinstance(layer, nn.BatchNorm1d) else math.gcd(layer.num_features, GROUPS)
    return nn.GroupNorm(groups, layer.num_features)


def set_norm(module: nn.Module, norm: Norm) -> None:
    """Replace every BatchNorm inside a module, in place; ``batch`` leaves them. Names of the layers stay.

    Batch statistics mix photos, so that no per-photo gradient exists, and they leave the client with the model.
    """
    if norm == "batch":
        return
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            frozen = norm == "frozen"
            setattr(module, name, FrozenBatchNorm(child.num_features, child.eps) if frozen else group_norm(child))
        else:
            set_norm(child, norm)
