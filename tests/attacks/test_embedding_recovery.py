"""The attack end to end on a tiny federation, and its score."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attacks.embedding_recovery import EmbeddingRecovery
from eval.scoring import Batch, Features, batches, score_embeddings
from fedgc.errors import RefusedError
from fedgc.pipeline.judging import features_at
from fedgc.rng import generator
from fedgc.types import HEAD


def cosines(world, algorithm: str, threat: str, batch: int) -> list[float]:
    this = world(algorithm, batch=batch)
    answer = EmbeddingRecovery()(this.seen_by(threat), generator(0))
    assert answer.failed == 0
    groups = batches(answer, this.truth, 0 if threat == "client" else None)
    features = [Features(features_at(this.transcript, g.photos), torch.ones(32), None) for g in groups]
    return [s["cosine"] for s in score_embeddings(groups, features, np.random.default_rng(0)).samples]


@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc", "fedpe"])
@pytest.mark.parametrize("threat", ["server", "client"])
@pytest.mark.parametrize("batch", [1, 4])
def test_every_photos_feature_is_recovered(world, algorithm: str, threat: str, batch: int) -> None:
    assert min(cosines(world, algorithm, threat, batch)) > 0.999


def test_it_is_the_feature_and_not_that_of_the_mirror_image_or_of_another(world) -> None:
    this = world("fedpe")
    found = EmbeddingRecovery()(this.seen_by("server"), generator(0)).embeddings
    mirrored = features_at(this.transcript, this.truth.images.flatten(0, 1).flip(3))
    assert float((found * mirrored).sum(1).max()) < 0.9999
    assert float((found * mirrored.flip(0)).sum(1).max()) < 0.9999


def test_several_steps_are_refused(world) -> None:
    observation = world("fedgc").seen_by("server")
    many = replace(observation, public_constants=replace(observation.public_constants, steps=5))
    with pytest.raises(RefusedError, match="sum of 5"):
        EmbeddingRecovery()(many, generator(0))


def test_photos_that_nothing_tells_apart_are_refused(world) -> None:
    observation = world("fedpe", batch=4).seen_by("server")
    crowd = tuple(replace(u, images=64) for u in observation.client_updates)  # more photos than features
    with pytest.raises(RefusedError, match=r"64 photos are mixed.*head\.weight.*batch_sizes = \[1\]"):
        EmbeddingRecovery()(replace(observation, client_updates=crowd), generator(0))
    assert all(HEAD not in u.delta for u in crowd)


def test_the_score_assigns_one_to_one_and_counts_what_is_missing() -> None:
    *true, other = torch.eye(4)
    true = torch.stack(true)
    found = torch.stack([true[2], true[0], torch.zeros(4)])  # a cycle, and one that was not found
    group = Batch(0, torch.zeros(3, 3, 2, 2), torch.tensor([5, 6, 7]), None, None, found)
    rows = torch.stack([true[0], F.normalize(true[1] + other, dim=0)])
    stranger = torch.ones(4) / 2
    scores = score_embeddings([group], [Features(true, stranger, rows)], np.random.default_rng(0))
    assert [s["cosine"] for s in scores.samples] == [1.0, 0.0, 1.0]
    assert scores.metrics["embedding_cosine"]["value"] == pytest.approx(2 / 3)
    assert scores.baselines["mean-stranger"]["embedding_cosine"]["value"] == pytest.approx(0.5)
    assert scores.baselines["nearest-class-embedding"]["embedding_cosine"]["value"] == pytest.approx((1 + 0.5**0.5) / 3)
    without = score_embeddings([group], [Features(true, stranger, None)], np.random.default_rng(0))
    assert "nearest-class-embedding" not in without.baselines
