"""What an attacker knows about photos before it looks: they are smooth, lie in [0, 1], and show faces.

A prior turns free parameters into a batch of images and says where to start, what is unlikely, and how to
step.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

from fedgc.local import augment
from fedgc.rng import generator

EXACT = 1000  # faces
REFERENCE = 600  # eigenfaces, to which the weight of their prior refers
Shape = tuple[int, int, int, int]


class Prior(Protocol):
    """images: what an objective is given; final: the images in it; box: range of a parameter, for methods that keep to one."""

    @property
    def box(self) -> tuple[float, float] | None: ...

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor: ...

    def images(self, parameters: Tensor) -> Tensor: ...

    def final(self, parameters: Tensor) -> Tensor: ...

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor: ...

    def project_(self, parameters: Tensor) -> None: ...


def total_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring pixels, down plus across (anisotropic; Rudin et al. 1992)."""
    down = (images[..., 1:, :] - images[..., :-1, :]).abs().mean()
    across = (images[..., :, 1:] - images[..., :, :-1]).abs().mean()
    return down + across


def colour_variation(images: Tensor) -> Tensor:
    """Mean absolute difference of neighbouring differences of colour channels: edges of faces are edges in all three."""
    return total_variation(torch.stack([images[:, 0] - images[:, 1], images[:, 1] - images[:, 2]], dim=1))


def asymmetry(images: Tensor) -> Tensor:
    """Mean squared difference from the mirror image; a face seen from the front has little."""
    return (images - images.flip(-1)).square().mean()


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
    colour: float = 0.0
    symmetry: float = 0.0
    box: tuple[float, float] | None = (0.0, 1.0)

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor:
        spread = 0.2 if restart or not self.known else 0.02 * (shape[0] > 1)
        return (self.centre + spread * _draw(shape, generator)).clamp(0, 1)

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    final = images

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor:
        unlikely = self.weight * total_variation(images)
        if self.colour:
            unlikely = unlikely + self.colour * colour_variation(images)
        return unlikely + self.symmetry * asymmetry(images) if self.symmetry else unlikely

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
    symmetry: float = 0.0
    box: tuple[float, float] | None = None

    @staticmethod
    def unit(photos: int) -> float:
        """The weight with which the penalty of so many photos is |z|², summed over them."""
        return float(REFERENCE * photos)

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor:
        spread = 0.5 if restart else 0.05 * (shape[0] > 1)
        return spread * _draw((shape[0], len(self.basis)), generator)

    def images(self, parameters: Tensor) -> Tensor:
        return self.centre + (parameters @ self.basis).unflatten(1, self.centre.shape)

    final = images

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor:
        """weight/600 times |z|² of a photo, so that a weight means the same for any number of eigenfaces."""
        unlikely = self.weight * parameters.square().sum(1).mean() / REFERENCE
        return unlikely + self.symmetry * asymmetry(images) if self.symmetry else unlikely

    def project_(self, parameters: Tensor) -> None:
        """The Gaussian prior alone holds z; images that leave [0, 1] are clamped when returned."""


@dataclass(frozen=True)
class Joint:
    """Pixels and label logits searched together (Zhu et al. 2019): parameters (B, 3·H·W + C), of which nothing is assumed."""

    side: int
    classes: int
    box: tuple[float, float] | None = None

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor:
        return _draw((shape[0], 3 * self.side**2 + self.classes), generator)

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    def final(self, parameters: Tensor) -> Tensor:
        return parameters[:, : 3 * self.side**2].unflatten(1, (3, self.side, self.side))

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor:
        return parameters.new_zeros(())

    def project_(self, parameters: Tensor) -> None:
        """Free."""


def varied(faces: Tensor, copies: int, draw: torch.Generator) -> Tensor:
    """(N, 3, H, W) faces, their mirror images, and ``copies`` of each moved, turned, scaled and lit at random: what a few hundred
    photos do not show of how photos vary."""
    faces = faces.detach().cpu().float()
    return torch.cat([faces, faces.flip(-1), *(augment(faces, draw) for _ in range(copies))])


def eigenfaces(faces: Tensor, components: int) -> Tensor:
    """The leading principal directions of (N, 3, H, W) faces, each times its standard deviation: (k, 3·H·W), with
    k = min(components, N - 1, 3·H·W).

    Exact from the Gram matrix of up to EXACT faces; of more, by subspace iteration (Halko et al. 2011, algorithm 4.4), which
    takes a tenth of the time and gives the directions that carry variance as well.
    """
    x = faces.detach().cpu().float().flatten(1)
    x = x - x.mean(0)
    k = min(components, len(x) - 1, x.shape[1])
    if len(x) > max(EXACT, 2 * k):
        return _by_iteration(x, k)
    _, vectors = torch.linalg.eigh(x @ x.T)
    leading = vectors[:, -k:].flip(1)
    # xᵀv has length sqrt(N·value) and the standard deviation is sqrt(value)
    return (leading.T @ x) / len(x) ** 0.5


def _by_iteration(x: Tensor, k: int) -> Tensor:
    """The same of many faces: a basis of what random combinations of them span, powered twice, and then exactly in it."""
    draw = torch.randn((len(x), min(k + k // 10 + 20, *x.shape)), generator=generator("subspace"))
    basis = torch.linalg.qr(x.T @ draw).Q
    for _ in range(2):
        basis = torch.linalg.qr(x.T @ (x @ basis)).Q
    inner = x @ basis
    values, vectors = torch.linalg.eigh(inner.T @ inner / len(x))
    scaled = vectors[:, -k:].flip(1) * values[-k:].flip(0).clamp_min(0).sqrt()
    return (basis @ scaled).T.contiguous()


class Faces:
    """Auxiliary faces by what they are, so that the eigenfaces of many victims are made once."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor
        self.content = (tuple(tensor.shape), float(tensor.double().sum()), float(tensor.double().square().sum()))

    def __hash__(self) -> int:
        return hash(self.content)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Faces) and torch.equal(self.tensor, other.tensor)


def auxiliary_basis(faces: Tensor, components: int, copies: int) -> Tensor:
    """Eigenfaces of (N, 3, H, W) faces and of ``copies`` altered ones of each, drawn from a stream of their own: one basis for
    all victims of a run."""
    return _basis(Faces(faces), components, copies)


@lru_cache(maxsize=2)
def _basis(faces: Faces, components: int, copies: int) -> Tensor:
    return eigenfaces(varied(faces.tensor, copies, generator("eigenfaces")), components)
