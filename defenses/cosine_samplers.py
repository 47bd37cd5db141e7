"""What Opacus must know of the cosine head: gradients of single photos, and their lengths without forming them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from defenses.layer_gradients import Units, of_cosine_head
from fedgc.heads import CosineHead


def register_cosine_head() -> None:
    """Of row j, photo b: (g_bj / |w_j|) (e_b - c_bj w_j/|w_j|), with g = dL/dc. Without it Opacus falls back to functorch."""
    from opacus.grad_sample import register_grad_sampler, register_norm_sampler

    register_grad_sampler(CosineHead)(gradients)
    register_norm_sampler(CosineHead)(lengths)


def gradients(layer: CosineHead, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    e, rows = F.normalize(activations[0], dim=1), F.normalize(layer.weight, dim=1)
    g = backprops / layer.weight.norm(dim=1)
    pull = torch.einsum("bc,bd->bcd", g, e)
    return {layer.weight: pull - (g * (e @ rows.T))[:, :, None] * rows}


def lengths(layer: CosineHead, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
    (part,) = of_cosine_head(layer, activations[0], backprops, Units(len(backprops)))
    return {layer.weight: part.squares.sqrt()}
