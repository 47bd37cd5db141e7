from __future__ import annotations

import pytest
import torch

from attacks import decoder as module
from attacks.decoder import Correction, Network, linear_map, trained_decoder
from fedgc.models import build_backbone
from fedgc.rng import generator
from fedgc.types import ModelSpec

SPEC = ModelSpec("small", "group", 32, 32, "cosface", 0.25, 16.0)


@pytest.fixture
def network() -> Network:
    return Network.of(build_backbone(SPEC, 0), mirrored=True)


@pytest.fixture
def faces(world) -> torch.Tensor:
    return world().knowledge.auxiliary_faces


def quiet(_: int) -> None:
    """Hears of progress."""


def test_the_linear_map_is_ridge_regression(network: Network, faces: torch.Tensor) -> None:
    weight, offset = (t.double() for t in linear_map(network, faces, 0, generator(0)))
    z, x = network.all_features(faces).double(), faces.flatten(1).double()
    centred = z - z.mean(0)
    gram = centred.T @ centred
    expected = torch.linalg.solve(gram + gram.trace() / 32 * torch.eye(32), centred.T @ (x - x.mean(0)))
    torch.testing.assert_close(weight, expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(offset + z.mean(0) @ weight, x.mean(0), atol=1e-4, rtol=0)


def test_a_correction_starts_at_zero_and_fits_any_side() -> None:
    for side in (32, 50):
        made = Correction(16, side)(torch.randn((2, 16), generator=generator("units")))
        assert made.shape == (2, 3, side, side)
        assert not made.any()


def test_training_renders_kept_back_people_better(network: Network, faces: torch.Tensor) -> None:
    kept = faces[-6:]
    target = network.all_features(kept)
    losses = [
        module._held_out_loss(network, trained_decoder(network, faces, steps, 1, quiet), kept, target)
        for steps in (1, 15)
    ]
    assert losses[1] < losses[0]


def test_what_does_not_help_the_kept_back_is_not_kept(network: Network, faces, monkeypatch) -> None:
    rising = iter(range(100))
    monkeypatch.setattr(module, "_held_out_loss", lambda *_: next(rising))
    decoder = module._trained(network, faces, 5, 0, quiet)
    assert not decoder.correction(torch.ones(1, 32)).any()


def test_one_decoder_for_all_targets_of_a_network(network: Network, faces, monkeypatch) -> None:
    first = trained_decoder(network, faces, 2, 0, quiet)
    again = Network.of(build_backbone(SPEC, 0), mirrored=True)
    assert trained_decoder(again, faces.clone(), 2, 0, quiet) is first
    other = Network.of(build_backbone(SPEC, 1), mirrored=True)
    assert trained_decoder(other, faces, 2, 0, quiet) is not first
    assert Network.of(again.backbone, mirrored=False) != again


def test_training_is_the_same_each_time_and_moves_no_global_generator(network: Network, faces: torch.Tensor) -> None:
    before = torch.random.get_rng_state()
    one, two = (module._trained(network, faces, 3, 1, quiet).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_mirrored_feature_is_the_same_of_the_mirror_image(network: Network, faces: torch.Tensor) -> None:
    torch.testing.assert_close(network.features(faces[:3]), network.features(faces[:3].flip(3)))
    once = Network.of(network.backbone, mirrored=False)
    assert not torch.allclose(once.features(faces[:3]), once.features(faces[:3].flip(3)), atol=1e-3)
