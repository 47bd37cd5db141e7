"""What an attacker knows about photos before it looks: they are smooth, lie in [0, 1], and show faces.

A prior turns free parameters into a batch of images and says where to start, what is unlikely, and how to
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

Shape = tuple[int, int, int, int]


class Prior(Protocol):
    """signed: whether steps follow the sign of the gradient."""

    @property
    def signed(self) -> bool: ...

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor: ...

    def images(self, parameters: Tensor) -> Tensor: ...

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor: ...

    def project_(self, parameters: Tensor) -> None: ...


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down plus across (anisotropic; Rudin et al. 1992)."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    across = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    return down + across


def mean_face(faces: Tensor | None, shape: Shape) -> Tensor:
    """Mean of the auxiliary faces, (3, H, W); mid-grey without any."""
    return torch.full(shape[1:], 0.5) if faces is None else faces.detach().cpu().float().mean(0)


def _draw(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator)


@dataclass(frozen=True)
class Pixels:
    """Every pixel is free in [0, 1]; likely images vary little between neighbours.

    Start 0 is the mean face, or grey and noise without auxiliary faces; later starts are random around it.
    Photos of one batch start apart by a little noise, since two equal images with one label would have equal
    gradients for ever.
    """

    centre: Tensor
    known: bool
    weight: float
    signed: bool = True

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor:
        spread = 0.2 if restart or not self.known else 0.02 * (shape[0] > 1)
        return (self.centre + spread * _draw(shape, generator)).clamp(0, 1)

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor:
        return self.weight * total_variation(images)

    def project_(self, parameters: Tensor) -> None:
        parameters.clamp_(0, 1)


@dataclass(frozen=True)
class Eigenfaces:
    """images = mean + basis·z with z ~ N(0, I) (Turk & Pentland 1991): strangers' photos say how faces vary.

    basis: (k, 3·H·W), rows scaled by the standard deviation along them.
    """

    centre: Tensor
    basis: Tensor
    weight: float
    signed: bool = False

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor:
        spread = 0.5 if restart else 0.05 * (shape[0] > 1)
        return spread * _draw((shape[0], len(self.basis)), generator)

    def images(self, parameters: Tensor) -> Tensor:
        return self.centre + (parameters @ self.basis).unflatten(1, self.centre.shape)

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor:
        return self.weight * parameters.square().mean()

    def project_(self, parameters: Tensor) -> None:
        """The Gaussian prior alone holds z; images that leave [0, 1] are clamped when returned."""


def eigenfaces(faces: Tensor, components: int) -> Tensor:
    """The leading principal directions of (N, 3, H, W) faces, each times its standard deviation: (k, 3·H·W),
    with k = min(components, N - 1). From the N x N Gram matrix, since photos are fewer than pixels."""
    x = faces.detach().cpu().float().flatten(1)
    x = x - x.mean(0)
    k = min(components, len(x) - 1)
    _, vectors = torch.linalg.eigh(x @ x.T)
    leading = vectors[:, -k:].flip(1)
    # xᵀv has length sqrt(N·value) and the standard deviation is sqrt(value)
    return (leading.T @ x) / len(x) ** 0.5
