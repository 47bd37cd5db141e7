from __future__ import annotations

import numpy as np
import pytest
import torch

from eval.lineups import NO_NOISE, Lineup, ranked, score_lineups
from eval.privacy import candidate_ceiling


def lineup(
    scores: list[float], behind: list[int], people: list[int] | None = None, noise: float | None = None
) -> Lineup:
    return Lineup(torch.tensor(scores), torch.tensor(behind), torch.tensor(people or behind), noise)


def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_others_of_a_batch_neither_help_nor_hide_a_photo() -> None:
    one = lineup([0.9, 0.1, 0.8, 0.5, 0.3], [0, 2, 4])
    assert [(r.place, r.size) for r in ranked(one, one.scores)] == [(1, 3), (1, 3), (2, 3)]


def test_ties_are_broken_against_the_attacker() -> None:
    flat = lineup([0.0] * 10, [3])
    assert next(iter(ranked(flat, flat.scores))).place == 10


def test_rates_chance_and_ceiling_by_hand() -> None:
    first = lineup([3.0, 2.0, *[0.0] * 8], [0], [7], noise=1.0)
    second = lineup([3.0, 2.0, *[0.0] * 8], [1], [8], noise=1.0)
    scores = score_lineups([[first], [second]], 4, rng())
    assert scores.metrics["rank1"]["value"] == 0.5
    assert scores.metrics["rank1"]["n"] == 2
    assert scores.metrics["rank1"]["chance"] == pytest.approx(0.1)
    assert scores.metrics["rank1"]["ceiling"] == pytest.approx(candidate_ceiling(10, 4, 1.0), abs=1e-6)
    assert scores.metrics["rank5"]["value"] == 1.0
    assert scores.metrics["rank5"]["chance"] == pytest.approx(0.5)
    assert scores.metrics["rank5"]["ceiling"] == pytest.approx(candidate_ceiling(10, 4, 1.0, best=5), abs=1e-6)
    assert [s["rank"] for s in scores.samples] == [1, 2]
    assert [s["class"] for s in scores.samples] == [7, 8]
    assert not scores.baselines


def test_without_noise_there_is_no_ceiling() -> None:
    found = score_lineups([[lineup([1.0, 0.0, 0.0], [0])]], 1, rng()).metrics["rank1"]
    assert found["ceiling"] is None
    assert found["note"] == NO_NOISE


def test_the_control_ranks_a_photo_by_another_update() -> None:
    """Two perfect updates say nothing about each other's photos, whose places are then left to chance."""
    draw = np.random.default_rng(1)
    steps = []
    for _ in range(200):
        a, b = (torch.from_numpy(draw.random(20, dtype=np.float32)) for _ in range(2))
        a[0] = b[1] = 2.0
        steps.append([Lineup(a, torch.tensor([0]), torch.tensor([0])), Lineup(b, torch.tensor([1]), torch.tensor([1]))])
    scores = score_lineups(steps, 1, rng())
    assert scores.metrics["rank1"]["value"] == 1.0
    control = scores.baselines["another-update"]["rank1"]
    assert control["chance"] == pytest.approx(1 / 19, abs=1e-6)
    assert control["value"] == pytest.approx(1 / 19, abs=0.03)


def test_too_few_candidates_have_no_rank_five() -> None:
    found = score_lineups([[lineup([1.0, 0.0, 0.0], [0])]], 1, rng()).metrics["rank5"]
    assert found["value"] is None
    assert "everybody" in found["why"]
