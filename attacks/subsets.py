"""Sets of candidates whose gradients add up to an observed one: what a set explains, and the search for the best set.

With A the candidates' gradients (a row each) and t the observed gradient, all that is needed is along = A·t and gram = A·Aᵀ.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

Floats = NDArray[np.float64]
Value = Callable[[Sequence[int]], float]  # of a set of candidates; 0 for the empty set

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
    return np.linalg.cholesky(part + RIDGE * max(np.trace(part) / len(part), 1e-300) * np.eye(len(part)))


def _or_nothing(value: Value) -> Value:
    return lambda chosen: value(chosen) if len(chosen) else 0.0


def evidence(value: Value, count: int, places: int) -> tuple[Floats, float]:
    """What each of ``count`` candidates adds to the others of the best set of ``places`` (float64 (count,)), and its value.

    The set is found greedily, then by exchanging one member at a time as long as that helps. A member is judged beside the
    others; a candidate that is not in the set is judged in the place of the member that adds least.
    """
    chosen: list[int] = []
    for _ in range(places):
        chosen.append(_best(value, chosen, count)[0])
    for _ in range(SWEEPS):
        before = value(chosen)
        for i in range(places):
            rest = chosen[:i] + chosen[i + 1 :]
            new, worth = _best(value, rest, count)
            if worth > value(chosen):
                chosen[i] = new
        if not value(chosen) > before:
            break
    whole = value(chosen)
    left = [chosen[:i] + chosen[i + 1 :] for i in range(places)]
    adds = [whole - value(rest) for rest in left]
    rest = left[int(np.argmin(adds))]
    scores = np.array([0.0 if j in chosen else value([*rest, j]) - value(rest) for j in range(count)])
    scores[chosen] = adds
    return scores, whole


def _best(value: Value, rest: list[int], count: int) -> tuple[int, float]:
    """The candidate that makes the most of a set, and what it makes of it."""
    worth = {j: value([*rest, j]) for j in range(count) if j not in rest}
    best = max(worth, key=worth.__getitem__)
    return best, worth[best]
