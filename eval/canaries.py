"""Auditing privacy in one training run with canaries (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846, appendix D).

Of m images each was put into training by a fair coin of its own. An attack guesses some of the coins. Under (ε, δ)-differential
privacy, add/remove, no number of right guesses is much likelier than if each were right with probability 1/(1 + e^-ε). What such
a run shows is a lower bound on ε that holds with 95 % confidence.

How many coins are guessed must not be chosen by whether guesses turn out right. The rule is fixed: each of `SHARES` of the
candidates, half of them those of the highest scores (guessed in) and half those of the lowest (guessed out), at its part of the
error probability (Bonferroni); the best of these bounds counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import expit, logit
from scipy.stats import beta, binom

from eval.membership import membership_metrics
from eval.scoring import Metrics, Scores
from eval.statistics import Floats, Measured
from fedgc.errors import UsageError

ALPHA = 0.05
SHARES = (1.0, 0.5, 0.25, 0.125)
WITHOUT_CLAIM = 1e-5  # delta of the bound where a run claims none
STEPS = 400  # of a search from above for the largest epsilon that is ruled out


def p_value(m: int, r: int, v: int, epsilon: float, delta: float = 0.0) -> float:
    """The largest probability with which, under (epsilon, delta)-DP, v or more of r guesses about m candidates are right:
    P[B ≥ v] + 2mδ max_i P[v > B ≥ v - i]/i with B ~ Bin(r, 1/(1 + e^-ε))."""
    if not 0 <= v <= r <= m or epsilon < 0 or not 0 <= delta <= 1:
        raise UsageError(f"need 0 <= v <= r <= m, epsilon >= 0, delta in [0, 1]; got {v}, {r}, {m}, {epsilon}, {delta}")
    right = float(expit(epsilon))
    tail = float(binom.sf(v - 1, r, right))
    if delta == 0 or v == 0:
        return min(1.0, tail)
    below = binom.pmf(np.arange(v - 1, -1, -1), r, right).cumsum()  # P[v > B >= v - i], i = 1..v
    return min(1.0, tail + 2 * m * delta * float((below / np.arange(1, v + 1)).max()))


def epsilon_bound(m: int, r: int, v: int, delta: float = 0.0, alpha: float = ALPHA) -> float:
    """ε_L: the largest epsilon whose `p_value` lies below alpha; 0 where none does.

    What rules out (ε, δ) rules out every smaller ε too, so that the largest counts even where p is not monotone.
    """
    if r == 0 or v == 0:
        return 0.0
    right = float(beta.ppf(alpha, v, r - v + 1))  # Clopper-Pearson: above it the first term alone exceeds alpha
    top = float(logit(right))
    if top <= 0:
        return 0.0
    excess = lambda epsilon: p_value(m, r, v, epsilon, delta) - alpha  # noqa: E731
    if delta == 0:
        return top
    above = top
    for epsilon in np.linspace(top, 0.0, STEPS)[1:].tolist():
        if excess(epsilon) < 0:
            return float(brentq(excess, epsilon, above, xtol=1e-9))
        above = epsilon
    return 0.0


@dataclass(frozen=True)
class Claim:
    """What a run promises to one photo: epsilon at delta; or why there is nothing to compare a bound for one photo with."""

    epsilon: float | None
    delta: float | None
    why: str | None = None

    @property
    def tested_at(self) -> float:
        """The delta that a bound is stated for."""
        return WITHOUT_CLAIM if self.epsilon is None or self.delta is None else self.delta

    def to_json(self) -> dict[str, Any]:
        return (
            {"value": None, "why": self.why} if self.epsilon is None else {"value": self.epsilon, "delta": self.delta}
        )


@dataclass(frozen=True)
class Bound:
    """epsilon, from ``right`` of ``guesses``; ceiling: the same if all guesses had been right, at the best share."""

    epsilon: float
    guesses: int
    right: int
    ceiling: float


def audit(scores: Floats, inside: NDArray[np.bool_], delta: float, draw: np.random.Generator) -> Bound:
    """Lower bound on epsilon at delta, with 95 % confidence, of scores (m,) of candidates that are higher where a candidate looks
    trained on. Ties are broken by chance, never by the order of candidates."""
    m = len(scores)
    order = np.lexsort((draw.random(m), scores))  # lowest first
    alpha = ALPHA / len(SHARES)
    found = []
    for guesses in _guesses(m):
        half = guesses // 2
        out, within = order[:half], order[m - half :]
        right = int((~inside[out]).sum() + inside[within].sum())
        found.append(Bound(epsilon_bound(m, guesses, right, delta, alpha), guesses, right, 0.0))
    best = max(found, key=lambda b: (b.epsilon, b.right / max(1, b.guesses)))
    return Bound(best.epsilon, best.guesses, best.right, ceiling(m, delta))


def ceiling(m: int, delta: float) -> float:
    """What `audit` would say if every guess were right."""
    return max(epsilon_bound(m, r, r, delta, ALPHA / len(SHARES)) for r in _guesses(m))


def _guesses(m: int) -> list[int]:
    """Even numbers, so that as many are guessed in as out."""
    return [2 * int(m * share / 2) for share in SHARES]


def score_canaries(
    scores: Floats, control: Floats, inside: NDArray[np.bool_], claim: Claim, names: Sequence[tuple[int, int]],
    rng: np.random.Generator,
) -> Scores:  # fmt: skip
    """auc, tpr@fpr and epsilon_lower_bound of scores (m,) of candidates; beside them the same of images in their place that
    nobody trained on (``control``), which are at chance unless the attack is mistaken. names: (class, client) of each candidate.
    """
    metrics, baseline = _measured(scores, inside, claim, rng), _measured(control, inside, claim, rng)
    metrics["epsilon_lower_bound"]["claim"] = claim.to_json()
    samples = [
        {"target": i, "class": c, "client": k, "score": round(float(s), 6), "trained_on": bool(there)}
        for i, ((c, k), s, there) in enumerate(zip(names, scores, inside, strict=True))
    ]
    return Scores(metrics, {"absent-image": baseline}, samples)


def _measured(scores: Floats, inside: NDArray[np.bool_], claim: Claim, rng: np.random.Generator) -> Metrics:
    bound = audit(scores, inside, claim.tested_at, rng)
    value = Measured(
        bound.epsilon, bound.epsilon, None, len(scores), chance=0.0, ceiling=bound.ceiling,
        note=f"{bound.right} of {bound.guesses} guesses right: one-sided, with 95 % confidence",
    )  # fmt: skip
    said = {**value.to_json(), "delta": claim.tested_at, "guesses": bound.guesses, "right": bound.right}
    if inside.all() or not inside.any():
        why = f"all coins of {len(inside)} canaries fell alike, so that none are told apart"
        return {"auc": Measured.unsupported(why, len(scores), 0.5).to_json(), "epsilon_lower_bound": said}
    return {**membership_metrics(scores, inside, rng, "canaries"), "epsilon_lower_bound": said}
