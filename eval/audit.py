"""Lower bounds on epsilon, from attacks on a mechanism that was run many times in two worlds: with and without a canary.

Runs are independent. The test (a statistic and a threshold) is chosen on some of them and counted on others, so that however
many were tried the bound holds. A bound that is higher than what was accounted for shows a bug; one that is lower shows nothing.

From counts: Jagielski, Ullman, Oprea 2020 (arXiv 2006.07709), with the delta of Kairouz, Oh, Viswanath 2015. By Gaussian
differential privacy (GDP): Nasr et al. 2023 (arXiv 2302.07956).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtri
from scipy.stats import beta

from eval.privacy import gaussian_delta
from fedgc.errors import UsageError

Method = Literal["clopper-pearson", "gaussian"]
Floats = NDArray[np.float64]
REPORTED = 0.95  # confidence of a bound that is shown
FLAGGED = 0.999  # and of one that is held against what was promised
FLOOR = 1e-10  # of the largest variance: float32 updates say nothing below it


@dataclass(frozen=True)
class LowerBound:
    """Epsilon is at least ``value`` at ``delta``, with that confidence. ceiling: what a perfect attack on as many runs could have
    shown; runs: counted, in each world. true_positive: at least, and false_positive: at most, at half the risk each."""

    value: float
    ceiling: float
    runs: int
    delta: float
    method: Method
    confidence: float
    true_positive: float
    false_positive: float


@dataclass(frozen=True)
class PresenceTest:
    """The canary is said to be present where ``features @ weights`` (n,) is at least ``threshold``."""

    name: str
    weights: Floats
    threshold: float

    def positives(self, features: Floats) -> int:
        """How many of the runs, (n, F), it says yes to."""
        return int((features @ self.weights >= self.threshold).sum())


def lower_bound(
    hits: int, alarms: int, runs: int, delta: float, method: Method, confidence: float = REPORTED
) -> LowerBound:
    """The bound from ``hits`` of ``runs`` with the canary and ``alarms`` of ``runs`` without it that a test said yes to.

    "clopper-pearson": max of ln((TPR - delta)/FPR) and ln((TNR - delta)/FNR), which holds for every mechanism. "gaussian": the
    epsilon at delta of mu-GDP with mu = Phi^-1(TPR) - Phi^-1(FPR). It sees far more with few runs, and holds against the
    claim that the mechanism is Gaussian releases without sampling. Rates are one-sided bounds (Clopper & Pearson 1934), the
    risk shared by the two; TNR and FNR are one less the others.
    """
    if not 0 < delta < 1 or not 0 < confidence < 1:
        raise UsageError(f"need delta and a confidence between 0 and 1, got {delta} and {confidence}")
    if runs < 1 or not (0 <= hits <= runs and 0 <= alarms <= runs):
        raise UsageError(f"need counts of at least one run in each world, got {hits} and {alarms} of {runs}")
    at_least, at_most = _rates(runs, confidence)
    tpr, fpr = float(at_least[hits]), float(at_most[alarms])
    value = _epsilon(tpr, fpr, delta, method)
    best = _epsilon(float(at_least[runs]), float(at_most[0]), delta, method)
    return LowerBound(value, best, runs, delta, method, confidence, tpr, fpr)


def ceiling(runs: int, delta: float, method: Method, confidence: float = REPORTED) -> float:
    """The epsilon that an attack without a mistake on ``runs`` runs in each world shows, and no attack exceeds."""
    return lower_bound(runs, 0, runs, delta, method, confidence).value


def gaussian_epsilon(mu: float, delta: float) -> float:
    """The smallest epsilon >= 0 at which mu-GDP keeps delta: the inverse of `eval.privacy.gaussian_delta`."""
    if mu <= 0 or gaussian_delta(0.0, mu) <= delta:
        return 0.0
    upper = 1.0
    while gaussian_delta(upper, mu) > delta:
        upper *= 2
    return float(brentq(lambda epsilon: gaussian_delta(epsilon, mu) - delta, 0.0, upper, xtol=1e-9))


@lru_cache(maxsize=16)
def _rates(runs: int, confidence: float) -> tuple[Floats, Floats]:
    """For every count 0..runs: the rate is at least, and at most. Not to be written to."""
    counts, risk = np.arange(runs + 1, dtype=np.float64), (1 - confidence) / 2
    at_least, at_most = np.zeros(runs + 1), np.ones(runs + 1)
    at_least[1:] = beta.ppf(risk, counts[1:], runs - counts[1:] + 1)
    at_most[:-1] = beta.ppf(1 - risk, counts[:-1] + 1, runs - counts[:-1])
    return at_least, at_most


def _epsilon(tpr: float, fpr: float, delta: float, method: Method) -> float:
    if method == "gaussian":
        return gaussian_epsilon(float(_strength(np.asarray(tpr), np.asarray(fpr), delta, method)), delta)
    return max(0.0, float(_strength(np.asarray(tpr), np.asarray(fpr), delta, method)))


def _strength(tpr: Floats, fpr: Floats, delta: float, method: Method) -> Floats:
    """What a bound grows with: mu, or epsilon before it is cut off at zero."""
    with np.errstate(divide="ignore"):
        if method == "gaussian":
            return np.asarray(ndtri(tpr) - ndtri(fpr))
        kept = [np.log(np.maximum(rate - delta, 0) / wrong) for rate, wrong in ((tpr, fpr), (1 - fpr, 1 - tpr))]
    return np.maximum(*kept)


# -- the choice of a test


def choose_test(
    present: Floats, absent: Floats, candidates: Sequence[tuple[str, Floats]], delta: float, method: Method
) -> PresenceTest:
    """The candidate, named weights (F,), and the threshold with the highest bound on these runs: features (n, F) in each world.

    Whoever looked for the best found some of it by luck: count on other runs.
    """
    return max(
        (_thresholded(present, absent, name, weights, delta, method) for name, weights in candidates),
        key=lambda found: found[0],
    )[1]


def _thresholded(
    present: Floats, absent: Floats, name: str, weights: Floats, delta: float, method: Method
) -> tuple[float, PresenceTest]:
    """How strong a statistic is at its best threshold, half-way between two values that were seen, or beyond them all."""
    inside, outside = np.sort(present @ weights), np.sort(absent @ weights)
    seen = np.unique(np.concatenate([inside, outside]))
    thresholds = np.concatenate([(seen[1:] + seen[:-1]) / 2, [np.inf]])
    hits, alarms = (len(s) - np.searchsorted(s, thresholds, side="left") for s in (inside, outside))
    # at a high confidence, which thresholds at which hardly anything was seen do not win by luck
    true, false = _rates(len(inside), FLAGGED)[0][hits], _rates(len(outside), FLAGGED)[1][alarms]
    strength = _strength(true, false, delta, method)
    best = int(strength.argmax())
    return float(strength[best]), PresenceTest(name, weights, float(thresholds[best]))


def discriminant(present: Floats, absent: Floats, columns: Sequence[int]) -> Floats:
    """Fisher's linear discriminant of some columns, as weights (F,) for all: it finds by itself what to add up, and what to
    subtract so that noise which is shared cancels. Directions in which nothing varies count as if they varied by ``FLOOR``."""
    chosen = list(columns)
    x, y = present[:, chosen], absent[:, chosen]
    spread = np.concatenate([x - x.mean(axis=0), y - y.mean(axis=0)])
    scale = np.sqrt((spread**2).mean(axis=0))
    scale = np.maximum(scale, math.sqrt(FLOOR) * max(float(np.abs(np.concatenate([x, y])).max()), 1e-300))
    variances, directions = np.linalg.eigh((spread / scale).T @ (spread / scale) / len(spread))
    step = directions.T @ ((x.mean(axis=0) - y.mean(axis=0)) / scale)
    weights = np.zeros(present.shape[1])
    weights[chosen] = directions @ (step / np.maximum(variances, FLOOR * max(float(variances.max()), 1.0))) / scale
    length = float(np.abs(weights).max())
    return weights / length if length else weights
