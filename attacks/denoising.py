"""A denoiser of faces, learned from the attacker's own: what a linear basis cannot say of how faces look.

The best linear denoiser in the eigenfaces (Wiener) comes first; a small convolutional network learns what is to be added to its
answer. As a penalty, an image is far from faces by how much denoising changes it (Romano et al. 2017, arXiv 1611.02862).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.priors import Faces, Shape, auxiliary_basis
from fedgc.local import augment
from fedgc.rng import generator, stream_seed

NOISE = 0.01, 0.25  # standard deviations that it is trained on, evenly in their logarithm
LEVEL = 0.05  # at which images are denoised for the penalty
BATCH, STEP_SIZE = 16, 2e-3
REACH = 0.1  # a correction of one of the network's units
MULTIPLE = 8  # of the side that the network works on


class _Correction(nn.Module):
    """(B, 6, S, S) noise and linear answer, (B,) noise level -> (B, 3, S, S). Works at a half, a quarter and an eighth of the
    side, so that a core trains it in half a minute; where a pixel is in the picture is an input, since faces are centred."""

    def __init__(self, widths: tuple[int, int, int] = (40, 64, 64)) -> None:
        super().__init__()
        fine, middle, coarse = widths
        self.inward = nn.Sequential(*_layer(27, fine), *_layer(fine, fine))
        self.down = nn.Sequential(*_layer(fine, middle, 2), *_layer(middle, middle))
        self.bottom = nn.Sequential(*_layer(middle, coarse, 2), *_layer(coarse, coarse), *_layer(coarse, coarse))
        self.raised = nn.Conv2d(coarse, 4 * middle, 1)
        self.up = nn.Sequential(nn.ReLU(), *_layer(middle, middle), nn.Conv2d(middle, 4 * fine, 1))
        self.outward = nn.Sequential(nn.ReLU(), *_layer(fine, fine), nn.Conv2d(fine, 12, 3, padding=1))

    def forward(self, x: Tensor, level: Tensor) -> Tensor:
        side = x.shape[-1]
        more = -side % MULTIPLE
        maps = F.pixel_unshuffle(F.pad(x, (0, more, 0, more), mode="replicate"), 2)
        along = torch.linspace(-1, 1, maps.shape[-1], device=x.device)
        place = torch.stack(torch.meshgrid(along, along, indexing="ij")).expand(len(x), -1, -1, -1)
        noise = (10 * level).view(-1, 1, 1, 1).expand(len(x), 1, *maps.shape[-2:])
        fine = self.inward(torch.cat([maps / (2 * REACH), noise, place], dim=1))
        middle = self.down(fine)
        middle = middle + F.pixel_shuffle(self.raised(self.bottom(middle)), 2)
        out = self.outward(fine + F.pixel_shuffle(self.up(middle), 2))
        return REACH * F.pixel_shuffle(out, 2)[..., :side, :side]


def _layer(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    kernel = 3 if stride == 1 else stride
    return nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=kernel // 3), nn.ReLU()


@dataclass(frozen=True)
class Denoiser:
    """mean: (3, H, W); directions: (k, 3·H·W), of length one; variance: (k,) of faces along them."""

    mean: Tensor
    directions: Tensor
    variance: Tensor
    correction: nn.Module

    @classmethod
    def untrained(cls, mean: Tensor, basis: Tensor) -> Denoiser:
        """From eigenfaces scaled by their standard deviations (`attacks.priors.eigenfaces`)."""
        variance = basis.square().sum(1)
        with torch.random.fork_rng(devices=[]):
            torch.random.default_generator.manual_seed(stream_seed("denoiser", "layers"))
            correction = _Correction()
        return cls(mean, basis / variance.sqrt().clamp_min(1e-12)[:, None], variance, correction)

    def linear(self, images: Tensor, level: Tensor) -> Tensor:
        """The mean of a face given a noisy one (B, 3, H, W), were faces Gaussian: a direction by variance/(variance + level²)."""
        along = (images - self.mean).flatten(1) @ self.directions.T
        kept = along * self.variance / (self.variance + level[:, None].square())
        return self.mean + (kept @ self.directions).view_as(images)

    def __call__(self, images: Tensor, level: Tensor) -> Tensor:
        """images (B, 3, H, W) with Gaussian noise of standard deviation ``level`` (B,) -> without."""
        smooth = self.linear(images, level)
        return smooth + self.correction(torch.cat([images - smooth, smooth - self.mean], dim=1), level)


def train(
    denoiser: Denoiser, faces: Tensor, steps: int, draw: torch.Generator, tick: Callable[[int], None]
) -> Denoiser:
    """Teach the correction in place, on altered copies of (N, 3, H, W) faces under noise of all levels."""
    optimizer = torch.optim.Adam(denoiser.correction.parameters(), lr=STEP_SIZE)
    low, high = (math.log(x) for x in NOISE)
    for i in range(steps):
        optimizer.param_groups[0]["lr"] = STEP_SIZE * (0.5 + 0.5 * math.cos(math.pi * i / steps))
        clean = augment(faces[torch.randint(len(faces), (BATCH,), generator=draw)], draw)
        level = (low + (high - low) * torch.rand(BATCH, generator=draw)).exp()
        noisy = clean + level.view(-1, 1, 1, 1) * torch.randn(clean.shape, generator=draw)
        error = (denoiser(noisy, level) - clean).square().mean(dim=(1, 2, 3))
        optimizer.zero_grad()
        linear = 0.02**2 + 0.1 * level.square()  # about the error of the linear one: all levels count alike
        (error / linear).mean().backward()
        optimizer.step()
        tick(i + 1)
    denoiser.correction.requires_grad_(False).eval()
    return denoiser


def auxiliary_denoiser(
    faces: Tensor, components: int, copies: int, steps: int, tick: Callable[[int], None] = lambda done: None
) -> Denoiser:
    """Learned from (N, 3, H, W) faces, and from streams of its own: one for all victims of a run. tick is called with the number
    of steps finished, where it is not learned already."""
    learned = _place(Faces(faces), components, copies, steps)
    if not learned:
        photos = faces.detach().cpu().float()
        start = Denoiser.untrained(photos.mean(0), auxiliary_basis(photos, components, copies))
        with torch.enable_grad():
            learned.append(train(start, photos, steps, generator("denoiser"), tick))
    return learned[0]


@lru_cache(maxsize=2)
def _place(faces: Faces, components: int, copies: int, steps: int) -> list[Denoiser]:
    """Where the denoiser of these faces is kept once it is learned."""
    return []


@dataclass(frozen=True)
class Polish:
    """Every pixel is free in [0, 1], from images that a search has found; ``weight`` times ``unlikely`` is held against them."""

    found: Tensor
    unlikely: Callable[[Tensor], Tensor]
    weight: float
    box: tuple[float, float] | None = (0.0, 1.0)

    def start(self, shape: Shape, restart: int, generator: torch.Generator) -> Tensor:
        return self.found.clone()

    def images(self, parameters: Tensor) -> Tensor:
        return parameters

    final = images

    def penalty(self, parameters: Tensor, images: Tensor) -> Tensor:
        return self.weight * self.unlikely(images)

    def project_(self, parameters: Tensor) -> None:
        parameters.clamp_(0, 1)


def changed(denoiser: Denoiser, images: Tensor) -> Tensor:
    """Mean of (x - D(x))², D(x) held fixed: its gradient goes along x - D(x), and needs no derivative of the denoiser."""
    with torch.no_grad():
        clean = denoiser(images, torch.full((len(images),), LEVEL))
    return (images - clean).square().mean()
