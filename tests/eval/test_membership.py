"""Membership of people: rates by hand and against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from eval.membership import auc, score_membership, tpr


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_auc_is_that_of_scikit_learn_with_ties(rng) -> None:
    inside, outside = rng.integers(0, 9, 40) + 1.0, rng.integers(0, 9, 60) + 0.0
    truth = np.r_[np.ones(40), np.zeros(60)]
    assert auc(inside, outside) == pytest.approx(roc_auc_score(truth, np.r_[inside, outside]))


def test_the_true_positive_rate_never_spends_more_than_allowed() -> None:
    outside = np.arange(10.0)
    assert (
        tpr(np.array([8.5, 9.5, 0.5, 9.0]), outside, 0.1) == 0.75
    )  # one of ten others may lie above: the threshold is 8
    assert tpr(np.array([8.5, 9.5, 0.5, 9.0]), outside, 0.0) == 0.25
    assert tpr(np.zeros(5), np.zeros(10), 0.1) == 0.0  # all tied: nobody is told apart


def test_scores_that_say_nothing_are_at_chance(rng) -> None:
    members = np.arange(1000) < 500
    scores = score_membership(rng.random(1000), rng.random(1000), members, np.where(members, 1, -1), rng)
    for metrics in (scores.metrics, scores.baselines["model-that-knows-nobody"]):
        assert metrics["auc"]["low"] < 0.5 < metrics["auc"]["high"]
        assert metrics["tpr@fpr=0.1"]["value"] == pytest.approx(0.1, abs=0.05)


def test_members_who_score_higher_are_told(rng) -> None:
    members = np.arange(300) < 150
    scores = score_membership(members + rng.random(300) * 0.5, rng.random(300), members, np.arange(300), rng)
    assert scores.metrics["auc"]["value"] == 1.0
    assert scores.metrics["tpr@fpr=0.01"]["value"] == 1.0
    assert "indicative" in scores.metrics["tpr@fpr=0.01"]["note"]
    assert len(scores.samples) == 150
    assert max(s["rank"] for s in scores.samples) == 150


def test_too_few_others_are_no_rate(rng) -> None:
    members = np.arange(40) < 20
    scores = score_membership(rng.random(40), rng.random(40), members, np.arange(40), rng)
    assert scores.metrics["tpr@fpr=0.01"]["value"] is None
    assert "too few" in scores.metrics["tpr@fpr=0.01"]["why"]
