from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attacks.backbone_algebra import Recovered
from attacks.feature_inversion import FeatureInversion, layer_inputs
from eval.fidelity import align, psnr
from fedgc.errors import RefusedError
from fedgc.models import build_backbone
from fedgc.rng import generator


@pytest.mark.parametrize("algorithm", ["fedgc", "fedpe"])
@pytest.mark.parametrize("batch", [1, 2])
def test_photos_are_found_by_their_features(world, algorithm: str, batch: int) -> None:
    this = world(algorithm, batch=batch)
    observation = this.seen_by("server")
    first = replace(observation, client_updates=observation.client_updates[:1])
    found = FeatureInversion(iterations=120, components=40, copies=2)(first, generator(0))
    truth, mean = this.truth.images[0], this.knowledge.auxiliary_faces.mean(0)
    gain = psnr(align(found.images, truth)[0], truth) - psnr(mean.expand_as(truth), truth)
    assert float(gain.mean()) > 1.0
    assert found.failed == 0


@pytest.mark.parametrize("inputs", [True, False])
def test_the_objective_is_zero_at_the_truth_alone(world, inputs: bool) -> None:
    this = world()
    update = this.seen_by("server").client_updates[0]
    (distance,) = FeatureInversion(inputs=inputs).objectives(update, this.transcript.constants)
    assert distance(this.truth.images[0]).item() < 1e-4
    assert distance(this.truth.images[0].flip(3)).item() > 1e-3


def test_the_inputs_are_those_of_the_last_linear_layer(world) -> None:
    backbone = build_backbone(world().transcript.constants.spec, 0).eval()
    x = world().knowledge.auxiliary_faces[:2]
    h = layer_inputs(backbone, x)
    torch.testing.assert_close(backbone.embedding(h), backbone(x))
    assert not backbone.embedding._forward_pre_hooks


def test_a_feature_that_is_not_known_gets_the_mean_face(world, monkeypatch) -> None:
    nothing = Recovered(None, None, None, None, None, "")
    monkeypatch.setattr("attacks.feature_inversion.recover", lambda *_: nothing)
    answer = FeatureInversion(iterations=1, components=5, copies=1)(world().seen_by("server"), generator(0))
    assert answer.failed == 2
    torch.testing.assert_close(answer.images[0], world().knowledge.auxiliary_faces.mean(0))


def test_faces_without_auxiliary_faces_are_refused(world) -> None:
    with pytest.raises(RefusedError, match=r"auxiliary-faces.*prior = 'pixels'"):
        FeatureInversion()(world().seen_by("server", knows=False), generator(0))
    answer = FeatureInversion(prior="pixels", iterations=2)(world().seen_by("server", knows=False), generator(0))
    assert answer.images.shape == (2, 3, 32, 32)


def test_a_round_of_many_steps_is_refused(world) -> None:
    with pytest.raises(RefusedError, match="single step"):
        FeatureInversion()(world(kind="round").seen_by("server"), generator(0))
