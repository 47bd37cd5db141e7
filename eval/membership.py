"""Guesses of who was trained on, scored at the level of people."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

from eval.scoring import Metrics, Scores
from eval.statistics import DRAWS, Measured, percentile_interval

RATES = (0.01, 0.1)


def score_membership(
    scores: NDArray[Any],
    control: NDArray[Any],
    members: NDArray[np.bool_],
    names: NDArray[Any],
    rng: np.random.Generator,
) -> Scores:
    """auc, and tpr@fpr: share of members above the score that no more than that share of others passes, ties against the attack.

    scores: (P,) of each suspect by the attacked model; control: (P,) by a model that knows none of them: what it finds is how
    members differ from others as faces. Intervals resample members and others apart.
    """
    metrics, baseline = (membership_metrics(s, members, rng) for s in (scores, control))
    ranks = len(scores) + 1 - rankdata(scores, method="min")
    samples = [
        {"target": n, "class": int(names[i]), "score": round(float(scores[i]), 6), "rank": int(ranks[i])}
        for n, i in enumerate(np.flatnonzero(members))
    ]
    return Scores(metrics, {"model-that-knows-nobody": baseline}, samples)


def membership_metrics(
    scores: NDArray[Any], members: NDArray[np.bool_], rng: np.random.Generator, what: str = "people"
) -> Metrics:
    """auc and tpr@fpr of scores (P,), for members above others. what: who is told apart."""
    inside, outside = scores[members], scores[~members]
    n = len(inside)
    draws = [(rng.choice(inside, n), rng.choice(outside, len(outside))) for _ in range(DRAWS)]
    value = auc(inside, outside)
    low, high = percentile_interval(value, [auc(*d) for d in draws])
    found = {"auc": Measured(value, low, high, len(scores), chance=0.5).to_json()}
    for rate in RATES:
        name = f"tpr@fpr={rate:g}"
        if len(outside) * rate < 1:
            why = f"{len(outside)} {what} that were not trained on are too few for a false positive rate of {rate:g}"
            found[name] = Measured.unsupported(why, len(scores), rate).to_json()
            continue
        value = tpr(inside, outside, rate)
        low, high = percentile_interval(value, [tpr(*d, rate) for d in draws])
        few = len(outside) * rate < 3
        note = f"indicative: the rate is {int(len(outside) * rate)} of {len(outside)} {what}" if few else None
        found[name] = Measured(value, low, high, len(scores), chance=rate, note=note).to_json()
    return found


def auc(inside: NDArray[Any], outside: NDArray[Any]) -> float:
    """Probability that a member scores above another person; ties count half."""
    ranks = rankdata(np.concatenate([inside, outside]))[: len(inside)]
    return float((ranks.sum() - len(inside) * (len(inside) + 1) / 2) / (len(inside) * len(outside)))


def tpr(inside: NDArray[Any], outside: NDArray[Any], fpr: float) -> float:
    """Share of members strictly above the smallest threshold that at most a share ``fpr`` of others exceeds."""
    allowed = int(np.floor(fpr * len(outside) + 1e-9))
    threshold = np.sort(outside)[::-1][allowed]  # ``allowed`` others at most lie strictly above it
    return float((inside > threshold).mean())
