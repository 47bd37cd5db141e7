"""Sets of photos whose gradients add up to an observed one: what a set explains, and the search for the best set.

With A the gradients of candidates (a row each) and t the observed gradient, all that is needed is along = A·t and gram = A·Aᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Value = Callable[[Sequence[int]], float]  # of a set of gradients; 0 for the empty set

RIDGE = 1e-9  # of the mean squared length: keeps the gradients of near-identical photos apart
SWEEPS = 20


def summed(along: Floats, gram: Floats) -> Value:
    """|t|² - |t - Σ a_i|²: every photo counts in full. along: (K,), gram: (K, K)."""
    return lambda chosen: float(2 * along[list(chosen)].sum() - gram[np.ix_(chosen, chosen)].sum())


def nonnegative(along: Floats, gram: Floats) -> Value:
    """|t|² - min |t - Σ c_i a_i|² over c ≥ 0: every photo was shortened by an unknown factor. Shapes as in `summed`."""

    def value(chosen: Sequence[int]) -> float:
        root = _root(gram, chosen)
        whitened = np.linalg.solve(root, along[list(chosen)])
        return float(whitened @ whitened - nnls(root.T, whitened)[1] ** 2)

    return _or_nothing(value)


def projected(along: Floats, gram: Floats) -> Value:
    """|T|² - min |T - Σ δ_i h_iᵀ|² over all δ_i (d,), for an observed T (d, n). along: T·h_i (K, d), gram: h_i·h_j (K, K)."""

    def value(chosen: Sequence[int]) -> float:
        return float(np.square(np.linalg.solve(_root(gram, chosen), along[list(chosen)])).sum())

    return _or_nothing(value)


def _root(gram: Floats, chosen: Sequence[int]) -> Floats:
    part = gram[np.ix_(chosen, chosen)]
    return np.linalg.cholesky(part + RIDGE * max(np.trace(part) / len(part), 1e-30) * np.eye(len(part)))


def _or_nothing(value: Value) -> Value:
    return lambda chosen: value(chosen) if len(chosen) else 0.0


def evidence(value: Value, owners: Sequence[int], places: int) -> tuple[Floats, float]:
    """What each candidate adds to the others of the best set of ``places`` candidates, and the value of that set.

    ``owners[a]`` is the candidate 0..K-1 of gradient a: a candidate may have several, one a label, of which a set holds one.
    The set is found greedily, then by exchanging one member at a time as long as that helps. A member is judged beside the
    others; a candidate that is not in the set is judged in the place of the member that adds least. Returns float64 (K,).
    """
    chosen: list[int] = []
    for _ in range(places):
        chosen.append(_best(value, chosen, owners)[0])
    whole = value(chosen)
    for _ in range(SWEEPS):
        before = whole
        for i in range(places):
            new, worth = _best(value, _without(chosen, i), owners)
            if worth > whole:
                chosen[i], whole = new, worth
        if whole == before:
            break
    adds = [whole - value(_without(chosen, i)) for i in range(places)]
    rest = _without(chosen, int(np.argmin(adds)))
    scores = np.full(max(owners) + 1, -np.inf)
    taken = {owners[a]: gain for a, gain in zip(chosen, adds, strict=True)}
    base = value(rest)
    for a, owner in enumerate(owners):
        scores[owner] = taken[owner] if owner in taken else max(scores[owner], value([*rest, a]) - base)
    return scores, whole


def _without(chosen: list[int], i: int) -> list[int]:
    return chosen[:i] + chosen[i + 1 :]


def _best(value: Value, rest: list[int], owners: Sequence[int]) -> tuple[int, float]:
    """What makes the most of a set, of candidates that are not in it, and the value then."""
    there = {owners[a] for a in rest}
    worth = {a: value([*rest, a]) for a in range(len(owners)) if owners[a] not in there}
    best = max(worth, key=worth.__getitem__)
    return best, worth[best]
