"""Faces from unit features by a network that an attacker trains on photos of strangers (NbNet's idea: Mai et al. 2018).

A few hundred photos of few people teach a deep network those people. So the best linear map from features to pixels leads, and a
small network of transposed convolutions adds to it, as far as people who were kept back are rendered better.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks.priors import Faces
from fedgc.local import augment
from fedgc.rng import generator, stream_seed

WIDTHS = (64, 48, 32, 24)  # channels; each step doubles the side
BATCH = 32
STEP_SIZE, DECAY = 2e-3, 1e-3
PIXELS = 10.0  # weight of the mean squared error beside 1 - cosine
SMOOTHING = 1.0  # of the linear map, in mean variances of a feature's entries
KEPT_BACK = 10  # one photo in so many
CHECKS = 10  # places in training among which those who were kept back choose
Tick = Callable[[int], None]


@dataclass(frozen=True)
class Network:
    """A backbone that does not change, equal to another with the same weights. mirrored: its feature of a photo is the mean with
    that of the mirror image, as recognition takes it."""

    backbone: nn.Module = field(compare=False)
    mirrored: bool
    content: tuple[float, ...]

    @classmethod
    def of(cls, backbone: nn.Module, mirrored: bool) -> Network:
        tensors = (t for t in backbone.state_dict().values() if t.is_floating_point())
        content = tuple(x for t in tensors for x in (float(t.double().sum()), float(t.double().square().sum())))
        return cls(backbone.eval().requires_grad_(False), mirrored, content)

    def once(self, images: Tensor) -> Tensor:
        """(B, d) unit features of images (B, 3, S, S) as they are, differentiable."""
        return F.normalize(self.backbone(images), dim=1)

    def features(self, images: Tensor) -> Tensor:
        """(B, d) unit features, with the mirror image where ``mirrored``; differentiable."""
        return F.normalize(self.once(images) + self.once(images.flip(3)), dim=1) if self.mirrored else self.once(images)

    @torch.no_grad()
    def all_features(self, images: Tensor, batch: int = 64) -> Tensor:
        return torch.cat([self.features(part) for part in images.split(batch)])


class Correction(nn.Module):
    """(B, d) unit features -> (B, 3, S, S), zero before it has learned anything."""

    def __init__(self, features: int, side: int) -> None:
        super().__init__()
        self.side, self.first = side, -(-side // 2 ** (len(WIDTHS) - 1))
        self.spread = nn.Linear(features, WIDTHS[0] * self.first**2)
        self.norms = nn.ModuleList(nn.GroupNorm(8, width) for width in WIDTHS[:-1])
        self.doublings = nn.ModuleList(nn.ConvTranspose2d(a, b, 4, stride=2, padding=1) for a, b in pairwise(WIDTHS))
        self.pixels = nn.Conv2d(WIDTHS[-1], 3, 3, padding=1)
        nn.init.zeros_(self.pixels.weight)
        nn.init.zeros_(self.pixels.bias)  # type: ignore[arg-type]

    def forward(self, units: Tensor) -> Tensor:
        x = self.spread(units * units.shape[1] ** 0.5).unflatten(1, (WIDTHS[0], self.first, self.first))
        for norm, double in zip(self.norms, self.doublings, strict=True):
            x = double(F.relu(norm(x)))
        return self.pixels(F.relu(x))[..., : self.side, : self.side]


class Decoder(nn.Module):
    """(B, d) unit features -> (B, 3, S, S) images, which may leave [0, 1]: linear map plus correction."""

    weight: Tensor
    offset: Tensor

    def __init__(self, weight: Tensor, offset: Tensor, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("weight", weight)
        self.register_buffer("offset", offset)
        self.correction = Correction(len(weight), shape[-1])

    def forward(self, units: Tensor) -> Tensor:
        linear: Tensor = self.offset + units @ self.weight
        return linear.unflatten(1, self.shape) + self.correction(units)


def linear_map(network: Network, faces: Tensor, copies: int, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """(d, 3·S·S) and (3·S·S,): pixels by ridge regression on unit features, of faces (N, 3, S, S) and ``copies`` altered ones of
    each, one copy at a time."""
    count = len(faces) * (copies + 1)
    sums: list[Tensor] = []
    for copy in range(copies + 1):
        x = augment(faces, draw) if copy else faces
        z, flat = network.all_features(x), x.flatten(1)
        parts = z.sum(0), flat.sum(0), z.T @ z, z.T @ flat
        sums = [a + b for a, b in zip(sums, parts, strict=True)] if sums else list(parts)
    middle, mean, gram, cross = (total / count for total in sums)
    variance = gram - torch.outer(middle, middle)
    ridge = SMOOTHING * variance.diagonal().mean().clamp_min(1e-12) * torch.eye(len(variance))
    weight = torch.linalg.solve(variance + ridge, cross - torch.outer(middle, mean))
    return weight, mean - middle @ weight


def trained_decoder(network: Network, faces: Tensor, steps: int, copies: int, tick: Tick) -> Decoder:
    """The decoder of a network, trained on faces (N, 3, S, S) in [0, 1] that lie person by person. It draws from a stream of
    its own, and the latest is kept: all targets of a round share one. tick is called with the steps done."""
    key = (network, Faces(faces), steps, copies)
    if key not in _kept:
        _kept.clear()
        _kept[key] = _trained(network, faces, steps, copies, tick)
    tick(steps)
    return _kept[key]


_kept: dict[tuple[Network, Faces, int, int], Decoder] = {}


def _trained(network: Network, faces: Tensor, steps: int, copies: int, tick: Tick) -> Decoder:
    back = max(1, len(faces) // KEPT_BACK)  # the last photos: but for one person, of others than those learned from
    learned, kept = faces[:-back], faces[-back:]
    draw, target = generator("decoder"), network.all_features(kept)
    weight, offset = linear_map(network, learned, copies, draw)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed("decoder"))
        decoder = Decoder(weight, offset, tuple(faces.shape[1:]))
    correction = decoder.correction
    optimizer = torch.optim.AdamW(correction.parameters(), lr=STEP_SIZE, weight_decay=DECAY)
    best, chosen = _held_out_loss(network, decoder, kept, target), _copied(correction)
    every = max(1, steps // CHECKS)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = STEP_SIZE * (1 - step / steps)
        optimizer.zero_grad()
        _loss(network, decoder, learned, draw).backward()
        optimizer.step()
        if (step + 1) % every == 0 or step + 1 == steps:
            tick(step + 1)
            loss = _held_out_loss(network, decoder, kept, target)
            if loss < best:
                best, chosen = loss, _copied(correction)
    correction.load_state_dict(chosen)
    return decoder.eval().requires_grad_(False)


def _copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def _loss(network: Network, decoder: Decoder, faces: Tensor, draw: torch.Generator) -> Tensor:
    """Pixels of altered photos; and features of mixtures of two people, of whom there are more than of people, read once from
    the image or its mirror image."""
    x = augment(faces[torch.randint(len(faces), (BATCH,), generator=draw)], draw)
    units = network.all_features(x)
    share = torch.rand((BATCH, 1), generator=draw)
    mixed = F.normalize(units + share * units.roll(1, 0), dim=1)
    rendered, of_mixtures = decoder(torch.cat([units, mixed])).chunk(2)
    if network.mirrored and bool(torch.rand((), generator=draw) < 0.5):
        of_mixtures = of_mixtures.flip(3)
    apart = 1 - (network.once(of_mixtures) * mixed).sum(1).mean()
    return PIXELS * (rendered - x).square().mean() + apart


@torch.no_grad()
def _held_out_loss(network: Network, decoder: Decoder, kept: Tensor, target: Tensor) -> float:
    images = decoder(target).clamp(0, 1)
    apart = 1 - (network.all_features(images) * target).sum(1).mean()
    return float(PIXELS * (images - kept).square().mean() + apart)
