"""Columns of the score of an image attack that need the truth, and say so."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.scoring import batches, score_images
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
