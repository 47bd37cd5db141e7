"""Can a template be linked to its person? Open-set identification, and D_sys for templates that a defense transforms.

D_sys is the unlinkability measure of Gomez-Barrero et al. (2018, IEEE TIFS 13(6)), asked for by ISO/IEC 30136.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from eval.statistics import DRAWS, Measured, percentile_interval, rate_interval

BINS = 10  # more would see differences where there are none: 0.20 with 100 bins and 100 mated scores, 0.05 with 10
PERMUTATIONS = 200

Floats = NDArray[Any]


def tpir(scores: Floats, truth: NDArray[np.int64], fpir: float, rng: np.random.Generator) -> Measured:
    """True positive identification rate: share of queries whose person is first and passes the threshold that no more than a
    share ``fpir`` of queries without a mate passes.

    scores: (n, G) similarity of queries with the people of a gallery; truth: (n,) the person of each. A query without a mate is a
    query whose mate is taken out of the gallery. Ties count against the attacker. Intervals resample queries, threshold and all.
    """
    n, size = scores.shape
    chance = fpir / size
    if n * fpir < 1:
        return Measured.unsupported(f"{n} queries are too few for a false positive rate of {fpir:g}", n, chance)
    own = scores[np.arange(n), truth]
    others = scores.copy()
    others[np.arange(n), truth] = -np.inf
    best = others.max(axis=1)
    value = _tpir(own, best, fpir)
    draws = rng.integers(0, n, (DRAWS, n))
    low, high = rate_interval(value, [_tpir(own[d], best[d], fpir) for d in draws], n)
    note = f"indicative: the rate is {int(n * fpir)} of {n} queries" if n * fpir < 3 else None
    return Measured(value, low, high, n, chance=chance, note=note)


def _tpir(own: Floats, best: Floats, fpir: float) -> float:
    allowed = int(np.floor(fpir * len(best) + 1e-9))
    threshold = np.sort(best)[::-1][allowed] if allowed < len(best) else -np.inf
    return float(((own > threshold) & (own > best)).mean())


def d_sys(mated: Floats, others: Floats, rng: np.random.Generator) -> Measured:
    """∫ p(s | mated) D(s) ds with D(s) = (LR - 1) / (LR + 1) where the likelihood ratio LR of mated over non-mated scores exceeds
    one, else 0: 0 where templates cannot be linked, 1 where they always can.

    mated: (n,) score of each template with its own person; others: (n, m) with other people. The estimate lies above the truth
    on few data, so chance is its mean over permutations that deal every template's own score among its row; the note gives their
    95 % point.
    """
    n = len(mated)
    if n < 2 or others.size < 2:
        return Measured.unsupported("linkability needs two templates or more", n)
    table = np.column_stack([mated, others])
    value = _d_sys(table[:, 0], table[:, 1:])
    draws = [_d_sys(t[:, 0], t[:, 1:]) for t in (table[rng.integers(0, n, n)] for _ in range(DRAWS // 10))]
    null = [_permuted(table, rng) for _ in range(PERMUTATIONS)]
    low, high = percentile_interval(value, draws)
    note = f"of templates that cannot be linked, 95 in 100 such estimates lie below {np.quantile(null, 0.95):.3f}"
    return Measured(value, low, high, n, chance=round(float(np.mean(null)), 6), note=note)


def _permuted(table: Floats, rng: np.random.Generator) -> float:
    place = rng.integers(0, table.shape[1], len(table))
    rows = np.arange(len(table))
    swapped = table.copy()
    swapped[rows, 0], swapped[rows, place] = table[rows, place], table[rows, 0]
    return _d_sys(swapped[:, 0], swapped[:, 1:])


def _d_sys(mated: Floats, others: Floats) -> float:
    ends = float(min(mated.min(), others.min())), float(max(mated.max(), others.max()))
    if ends[0] == ends[1]:
        return 0.0
    m, _ = np.histogram(mated, BINS, ends)
    o, _ = np.histogram(others, BINS, ends)
    p, q = m / m.sum(), o / o.sum()
    with np.errstate(invalid="ignore"):
        linked = np.where(p > q, (p - q) / (p + q), 0.0)
    return float((p * linked).sum())
