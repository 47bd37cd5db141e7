"""Do the intervals of the report hold the truth as often as they say? By simulation, at 20, 50 and 100 people.

Faces of one person are alike, so each person has a level of their own. At least 90 % of intervals are to hold the truth (nominal:
95 %; a bootstrap of few clusters falls a little short). What takes long is slow.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from scipy.stats import binom, norm

from eval.paired import paired_rate
from eval.recognition import verified
from eval.statistics import (
    Measured,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_paired,
    clopper_pearson,
    mean_of_seeds,
    over_seeds,
    rate,
)

PEOPLE = (20, 50, 100)
LEAST = 0.9
EACH = 4  # targets of a person
DRAWS = 400
SKEWED = 0.87  # at 20 people, of a mean of skewed values: a known weakness of percentiles of few clusters

Simulated = Callable[[int, np.random.Generator], tuple[Measured, float]]  # an interval of n people, and the truth


def enough(repeats: int, share: float = LEAST) -> float:
    """What so many repeats show with 99 % probability if the interval holds the truth that often."""
    return float(binom.ppf(0.01, repeats, share)) / repeats


def covered(simulated: Simulated, people: int, repeats: int, seed: int = 1) -> float:
    """Share of repeats whose interval holds the truth."""
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(repeats):
        found, truth = simulated(people, rng)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= truth <= found.high
    return hits / repeats


_WEIGHTS = np.polynomial.hermite_e.hermegauss(60)  # mean over a normal: exact to rounding
MEAN_COSINE = float((_WEIGHTS[1] * np.tanh(0.4 + np.hypot(0.3, 0.2) * _WEIGHTS[0])).sum() / np.sqrt(2 * np.pi))


def persons(n: int) -> np.ndarray:
    return np.repeat(np.arange(n), EACH)


def a_mean(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    cosines = np.tanh(0.4 + 0.3 * rng.normal(size=n)[persons(n)] + 0.2 * rng.normal(size=n * EACH))
    return bootstrap_mean(cosines, persons(n), draws=DRAWS, rng=rng), MEAN_COSINE


def a_skewed_mean(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    values = rng.gamma(2.0, 1.0, n)[persons(n)] + rng.normal(size=n * EACH)
    return bootstrap_mean(values, persons(n), draws=DRAWS, rng=rng), 2.0


def a_median(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    values = 12 + rng.normal(0, 2, n)[persons(n)] + rng.normal(size=n * EACH)
    return bootstrap_median(values, persons(n), draws=DRAWS, rng=rng), 12.0


def a_rate(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    level = rng.beta(1.0, 3.0, n)[persons(n)]
    return rate(rng.random(n * EACH) < level, persons(n), draws=DRAWS, rng=rng), 0.25


def a_rate_of_single_targets(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    return rate(rng.random(n) < 0.1), 0.1


def a_paired_mean(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    shared = rng.normal(0, 3, n)[persons(n)]
    a = shared + 1.5 + rng.normal(0, 0.7, n)[persons(n)] + rng.normal(size=n * EACH)
    return bootstrap_paired(a, shared + rng.normal(size=n * EACH), persons(n), draws=DRAWS, rng=rng), 1.5


def a_paired_median(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    shared = rng.normal(0, 3, n)
    a, b = shared + 1.5 + rng.normal(size=n), shared + rng.normal(size=n)
    return bootstrap_paired(a, b, statistic="median", draws=DRAWS, rng=rng), 1.5


def five_seeds(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    return _seeds(n, 1.0, rng)


def five_unlike_seeds(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
    return _seeds(n, 3.0, rng)


def _seeds(n: int, unlike: float, rng: np.random.Generator) -> tuple[Measured, float]:
    """unlike: spread of seeds over the error of a mean of n people."""
    values, draws = [], []
    for lucky in rng.normal(0, unlike / np.sqrt(n), 5):
        of_people = lucky + rng.normal(size=n)
        values.append(float(of_people.mean()))
        draws.append(rng.multinomial(n, np.full(n, 1 / n), size=DRAWS) @ of_people / n)
    return over_seeds(values, draws, n, rng), 0.0


SIMULATED = {
    f.__name__: f
    for f in (
        a_mean, a_skewed_mean, a_median, a_rate, a_rate_of_single_targets, a_paired_mean, a_paired_median, five_seeds,
        five_unlike_seeds,
    )
}  # fmt: skip


def least(name: str, people: int) -> float:
    return SKEWED if name == "a_skewed_mean" and people == 20 else LEAST


@pytest.mark.parametrize("name", SIMULATED)
def test_intervals_hold_the_truth_of_twenty_people(name: str) -> None:
    assert covered(SIMULATED[name], 20, repeats=300) >= enough(300, least(name, 20))


@pytest.mark.slow
@pytest.mark.parametrize("people", PEOPLE)
@pytest.mark.parametrize("name", SIMULATED)
def test_intervals_hold_the_truth(name: str, people: int) -> None:
    assert covered(SIMULATED[name], people, repeats=1000) >= enough(1000, least(name, people))


@pytest.mark.parametrize("people", PEOPLE)
@pytest.mark.parametrize(("p", "q"), [(0.5, 0.4), (0.9, 0.1), (0.1, 0.02), (0.02, 0.02)])
@pytest.mark.parametrize("alike", [0.0, 0.8])
def test_paired_rates_hold_the_truth(people: int, p: float, q: float, alike: float) -> None:
    def hits(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
        noise = rng.multivariate_normal([0, 0], [[1, alike], [alike, 1]], size=n)
        return paired_rate(noise[:, 0] < norm.ppf(p), noise[:, 1] < norm.ppf(q)), p - q

    assert covered(hits, people, repeats=600) >= enough(600)


def embedded(n: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Two models of the same photos, the second worse: embeddings (4n, 12) of each, and whose photo each is."""
    level = rng.uniform(0.5, 1.5, n)[persons(n), None]
    better = rng.normal(size=(n, 12))[persons(n)] + 1.2 * level * rng.normal(size=(n * EACH, 12))
    return better, better + 0.6 * rng.normal(size=better.shape), persons(n)


def _values(test: tuple[np.ndarray, ...], held: tuple[np.ndarray, ...], names: tuple[str, ...]) -> list[list[float]]:
    rng = np.random.default_rng(0)
    both = [verified(test[m], test[2], held[m], held[2], draws=2, rng=rng)[0] for m in (0, 1)]
    return [[one[name].value for name in names] for one in both]  # type: ignore[union-attr]


def utility_coverage(people: int, repeats: int) -> dict[str, float]:
    """Of each figure and of its paired difference: the share of intervals that hold the value in a large population."""
    rng = np.random.default_rng(3)
    names = ("auc", "eer", "tar@far=0.1")
    truth = np.mean([_values(embedded(500, rng), embedded(500, rng), names) for _ in range(5)], axis=0)
    hits = dict.fromkeys([*names, *(f"{n}, difference" for n in names)], 0)
    for repeat in range(repeats):
        test, held = embedded(people, rng), embedded(people, rng)
        found = [
            verified(test[m], test[2], held[m], held[2], draws=200, rng=np.random.default_rng(repeat)) for m in (0, 1)
        ]
        for name, values in zip(names, truth.T, strict=True):
            measured = found[0][0][name]
            assert isinstance(measured, Measured)
            hits[name] += bool(measured.low <= values[0] <= measured.high)  # type: ignore[operator]
            low, high = np.quantile(found[0][1][name] - found[1][1][name], [0.025, 0.975])
            hits[f"{name}, difference"] += bool(low <= values[0] - values[1] <= high)  # type: ignore[operator]
    return {name: count / repeats for name, count in hits.items()}


@pytest.mark.slow
@pytest.mark.parametrize("people", PEOPLE)
def test_utility_and_its_differences_hold_the_truth(people: int) -> None:
    found = utility_coverage(people, repeats=200)
    assert min(found.values()) >= enough(200), found


@pytest.mark.parametrize("people", PEOPLE)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("between", [0.0, 0.05])
def test_a_rate_over_three_seeds(people: int, shared: bool, between: float) -> None:
    """Victims have a difficulty each, the same people in every seed or others; models of other seeds leak more or less."""

    def simulated(n: int, rng: np.random.Generator) -> tuple[Measured, float]:
        hard = rng.normal(size=n)
        found = []
        for _ in range(3):
            hard = hard if shared else rng.normal(size=n)
            odds = -0.6 + 1.2 * hard + between * 5 * rng.normal()
            hits = int((rng.uniform(size=n) < 1 / (1 + np.exp(-odds))).sum())
            found.append(clopper_pearson(hits, n))
        values, lows, highs = ([float(getattr(m, key)) for m in found] for key in ("value", "low", "high"))
        return Measured(float(np.mean(values)), *mean_of_seeds(values, lows, highs), n), truth

    draws = np.random.default_rng(0)
    odds = -0.6 + 1.2 * draws.normal(size=400_000) + between * 5 * draws.normal(size=400_000)
    truth = float((1 / (1 + np.exp(-odds))).mean())
    assert covered(simulated, people, 400) >= enough(400)


def test_a_mean_of_seeds_stays_where_its_intervals_are() -> None:
    assert mean_of_seeds([1.0, 1.0], [0.6, 0.6], [1.0, 1.0]) == (0.6, 1.0)
    low, high = mean_of_seeds([0.0, 0.5], [0.0, 0.2], [0.3, 0.8])
    assert low == 0.0
    assert 0.25 < high < 1.0
    assert mean_of_seeds([2.0], [1.0], [4.0]) == (1.0, 4.0)
