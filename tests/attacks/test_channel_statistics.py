"""The prior from BatchNorm's running statistics: what it measures, that it pulls, and that it needs its grant."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.channel_statistics import distance_from
from attacks.gradient_inversion import GradientInversion
from fedgc.errors import RefusedError
from fedgc.models import build_backbone, state_tensors
from fedgc.rng import generator
from fedgc.types import BACKBONE, ModelSpec

SPEC = ModelSpec("small", "batch", 16, 32, "cosface", 0.25, 30.0)
RUNNING = ("running_mean", "running_var")


def trained(photos: torch.Tensor) -> tuple[torch.nn.Module, dict[str, torch.Tensor]]:
    """A backbone whose layers have seen these photos, and its message."""
    backbone = build_backbone(SPEC, seed=1).to(photos.dtype)
    for _ in range(60):
        backbone(photos)
    return backbone.eval(), {f"{BACKBONE}{n}": t for n, t in state_tensors(backbone).items()}


def test_the_distance_is_that_of_every_layer_by_hand(world) -> None:
    """In float64, the layers' inputs computed block by block."""
    x = world().knowledge.auxiliary_faces[:4].double()
    net, message = trained(world().knowledge.auxiliary_faces.double())
    relu, expected = torch.relu, 0.0

    def far(norm: torch.nn.Module, given: torch.Tensor) -> torch.Tensor:
        nonlocal expected
        flat = given.transpose(0, 1).flatten(1)
        expected += float(
            (flat.mean(1) - norm.running_mean).norm() + (flat.var(1, correction=0) - norm.running_var).norm()
        )
        return norm(given)

    with torch.no_grad():
        h = net.stem((x - 0.5) / 0.25)
        for block in net.stages:
            y = block.conv1(relu(far(block.norm1, h)))
            y = block.conv2(relu(far(block.norm2, y)))
            h = y + block.shortcut(torch.nn.functional.avg_pool2d(h, 2, ceil_mode=True))
        far(net.norm, h)
    statistics = {n: t for n, t in message.items() if n.endswith(RUNNING)}
    assert distance_from(statistics, message, SPEC)(x).item() == pytest.approx(expected, rel=1e-6)


def test_faces_are_nearer_than_noise_and_one_photo_has_a_gradient(world) -> None:
    faces = world().knowledge.auxiliary_faces
    _, message = trained(faces[:40])
    distance = distance_from({n: t for n, t in message.items() if n.endswith(RUNNING)}, message, SPEC)
    noise = torch.rand(20, 3, 32, 32, generator=generator("noise"))
    assert distance(faces[40:60]).item() < 0.5 * distance(noise).item()
    one = faces[40:41].clone().requires_grad_()
    (slope,) = torch.autograd.grad(distance(one), one)
    assert slope.isfinite().all()
    assert slope.any()


def test_a_search_with_statistics_ends_nearer_to_them(world) -> None:
    seen = world(norm="batch").seen_by("server")
    seen = replace(seen, client_updates=seen.client_updates[:1])
    update, spec = seen.client_updates[0], seen.public_constants.spec
    distance = distance_from(seen.normalisation_statistics, update.before, spec)
    apart = [
        distance(GradientInversion(statistics=w, iterations=30, components=20, copies=1)(seen, generator(0)).images)
        for w in (0.0, 0.1)
    ]
    assert float(apart[1]) < 0.95 * float(apart[0])


@pytest.mark.parametrize("norm", ["group", "frozen"])
def test_statistics_that_are_not_there_are_refused(world, norm: str) -> None:
    with pytest.raises(RefusedError, match=f"needs normalisation-statistics.*by '{norm}'"):
        GradientInversion(statistics=0.1)(world(norm=norm).seen_by("server"), generator(0))
