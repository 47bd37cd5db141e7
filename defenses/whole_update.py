"""What defenses that act on the whole update of a client share: the backbone and the class embeddings as one vector."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedgc.errors import UsageError
from fedgc.types import Tensors


def clipped(tensors: Tensors, bound: float) -> Tensors:
    """The tensors, shortened by one common factor to a Euclidean norm of at most ``bound`` over all of them."""
    length = torch.stack([t.double().norm() for t in tensors.values()]).norm()
    if float(length) <= bound:
        return tensors
    return {name: t * (bound / length).to(t.dtype) for name, t in tensors.items()}


def noised(tensors: Tensors, deviation: float, noise: torch.Generator) -> dict[str, Tensor]:
    """With independent Gaussian noise of that standard deviation on every coordinate."""
    return {name: t + deviation * like(t, noise) for name, t in tensors.items()}


def like(tensor: Tensor, noise: torch.Generator) -> Tensor:
    """Standard normal numbers of the shape, type and device of a tensor, drawn on the CPU: alike on every device."""
    return torch.randn(tensor.shape, generator=noise, dtype=tensor.dtype).to(tensor.device)


def refuse_running_statistics(module: nn.Module, defense: str) -> None:
    """Raises UsageError where a layer keeps statistics of photos, whose variances noise or rounding could make negative."""
    if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
        raise UsageError(
            f"{defense} cannot train this network: BatchNorm sends variances, which noise could make negative. "
            "Use --set model.norm=group"
        )
