"""Columns of the score of an image attack that need the truth, and say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.scoring import Batch, Features, batches, score_embeddings, score_images, score_labels
from fedgc.types import Reconstruction, Truth


def test_the_best_restart_is_a_column_of_its_own_and_never_the_answer() -> None:
    draw = torch.Generator().manual_seed(0)
    truth = Truth((3, 4), torch.rand((2, 2, 3, 16, 16), generator=draw), torch.tensor([[0, 1], [2, 3]]))
    photos = truth.images.flatten(0, 1)
    far, near = (photos + scale * torch.randn(photos.shape, generator=draw) for scale in (0.3, 0.1))
    swapped = near[[1, 0, 3, 2]]  # which entry is which photo is not known to an attacker
    answer = Reconstruction((3, 3, 4, 4), images=far, every=torch.stack([far, swapped]))
    groups = batches(answer, truth, None)
    scores = score_images(groups, torch.rand((5, 3, 16, 16), generator=draw), np.random.default_rng(0))
    assert scores.metrics["psnr"]["value"] == pytest.approx(-20 * np.log10(0.3), abs=0.5)
    assert scores.metrics["psnr_oracle_restart"]["value"] == pytest.approx(20, abs=0.5)
    alone = score_images(
        batches(Reconstruction((3, 3, 4, 4), images=far), truth, None), photos, np.random.default_rng(0)
    )
    assert "psnr_oracle_restart" not in alone.metrics


def test_labels_are_guessed_among_those_that_the_sender_may_have() -> None:
    """A thousand photos of ten clients with five classes each: who names some class of the right client is at chance."""
    draw = np.random.default_rng(0)
    groups = []
    for client in range(10):
        own, guessed = (torch.from_numpy(5 * client + draw.integers(0, 5, 100)) for _ in range(2))
        groups += [Batch(client, torch.zeros(1, 3, 2, 2), own[i : i + 1], None, guessed[i : i + 1]) for i in range(100)]
    among = [range(5 * g.source, 5 * g.source + 5) for g in groups]
    metrics, baselines = score_labels(groups, among, draw)
    found = metrics["label_accuracy"]
    assert found["chance"] == pytest.approx(0.2, abs=0.005)
    assert found["low"] <= found["chance"] <= found["high"]
    assert baselines["random-labels"]["label_accuracy"]["value"] == found["chance"]


def test_a_feature_of_somebody_else_is_no_better_than_the_mean_stranger() -> None:
    """Features of all faces lie in a narrow cone, as those of networks do: what was found is another face's."""
    draw = torch.Generator().manual_seed(0)
    cone = lambda n: F.normalize(torch.eye(16)[0] + 0.3 * torch.randn(n, 16, generator=draw) / 2, dim=1)  # noqa: E731
    true, other, stranger = cone(200), cone(200), cone(400).mean(dim=0)
    groups = [
        Batch(i, torch.zeros(1, 3, 2, 2), torch.tensor([i]), None, None, other[i : i + 1]) for i in range(len(true))
    ]
    features = [Features(x[None], stranger, None) for x in true]
    found = score_embeddings(groups, features, np.random.default_rng(0)).metrics["embedding_cosine"]
    assert found["value"] > 0.5
    assert found["low"] <= found["chance"]
