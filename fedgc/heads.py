"""Heads of a face recogniser: bias-free cosine logits and the margins on top of them.

c_ij = cos(w_j, z_i); logits are s·c, with the target's cosine made harder by a margin: c - m (CosFace, Wang et al. 2018)
or cos(φ + m) (ArcFace, Deng et al. 2019).
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgc.types import ModelSpec

PULLED = 0.9  # cosine to the own class embedding from which the pull ends


class CosineHead(nn.Module):
    """One class embedding a row, no bias: (B, d) features -> (B, C) cosines."""

    def __init__(self, classes: int, embedding_size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(classes, embedding_size))

    def forward(self, z: Tensor) -> Tensor:
        return F.normalize(z, dim=1) @ F.normalize(self.weight, dim=1).T


def initial_rows(classes: int, embedding_size: int, generator: torch.Generator) -> Tensor:
    """(C, d) random rows of unit expected length; a cosine head ignores the length, the learning rate does not."""
    return torch.randn(classes, embedding_size, generator=generator) / math.sqrt(embedding_size)


def margin_logits(cosines: Tensor, labels: Tensor, spec: ModelSpec) -> Tensor:
    """(B, C) cosines and (B,) labels -> (B, C) logits s·c with the margin on the target."""
    if spec.margin == "none":
        return spec.scale * cosines
    # compared and not F.one_hot, which reads the labels' values and so cannot be traced into a graph
    target = (labels[:, None] == torch.arange(cosines.shape[1], device=labels.device)).to(cosines.dtype)
    if spec.margin == "cosface":
        return spec.scale * (cosines - spec.margin_size * target)
    return spec.scale * torch.where(target > 0, _arcface(cosines, spec.margin_size), cosines)


def _arcface(cosines: Tensor, margin: float) -> Tensor:
    # cos(φ + m) without arccos; sqrt is kept off zero so that two derivatives exist at c = ±1, and beyond φ = π - m,
    # where cos(φ + m) would rise again, the usual linear continuation keeps the target's logit monotone.
    sine = (1 - cosines * cosines).clamp_min(1e-7).sqrt()
    shifted = cosines * math.cos(margin) - sine * math.sin(margin)
    return torch.where(cosines > math.cos(math.pi - margin), shifted, cosines - margin * math.sin(margin))


def loss(cosines: Tensor, labels: Tensor, spec: ModelSpec) -> Tensor:
    """Mean cross entropy of the margin logits; zero (with a gradient of zero) for an empty batch.

    Classes of ``spec.softmax_classes`` that have no column are strangers whose rows nobody here may see: in a space of
    many dimensions their cosine is near zero, so that together they weigh as one logit of log(their number). Where one
    class is counted in all, the softmax would be constant: what is left is the pull of FedAwS (Yu et al. 2020).
    """
    if labels.numel() == 0:
        return cosines.sum()
    logits = margin_logits(cosines, labels, spec)
    absent = spec.softmax_classes - cosines.shape[1]
    if absent > 0:
        strangers = logits.new_full((len(logits), 1), math.log(absent))
        logits = torch.cat([logits, strangers], dim=1)
    if logits.shape[1] == 1:
        return spec.scale * F.relu(PULLED - cosines).square().mean()
    return F.cross_entropy(logits, labels)
