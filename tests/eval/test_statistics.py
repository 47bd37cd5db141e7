"""Intervals against closed forms, brute force and simulated coverage."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import binomtest

from eval.statistics import (
    Measured,
    bootstrap_mean,
    bootstrap_median,
    bootstrap_paired,
    clopper_pearson,
    identity_weights,
    percentile_interval,
    rate,
    rate_interval,
    weight_blocks,
)
from fedgc.errors import UsageError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(5)


@pytest.mark.parametrize(
    "measured",
    [
        Measured(0.5, 0.25, 0.75, 12),
        Measured(0.5, 0.25, 0.75, 12, chance=0.1, note="indicative", far=0.02),
        Measured(31.0, 28.0, None, 9, note="the interval is open upwards", exact=4),
        Measured.unsupported("too few people", 3, chance=0.1),
    ],
)
def test_measured_survives_json(measured: Measured) -> None:
    assert Measured.from_json(json.loads(json.dumps(measured.to_json(), allow_nan=False))) == measured


def test_json_has_the_four_keys_and_only_what_is_set() -> None:
    assert Measured(0.5, 0.2, 0.7, 4).to_json() == {"value": 0.5, "low": 0.2, "high": 0.7, "n": 4}
    assert Measured.unsupported("why not", 2).to_json() == {
        "value": None,
        "low": None,
        "high": None,
        "n": 2,
        "why": "why not",
    }


def test_measured_refuses_contradictions() -> None:
    with pytest.raises(ValueError, match="reason"):
        Measured(None, None, None, 3)
    with pytest.raises(ValueError, match="reason"):
        Measured(0.5, 0.1, 0.9, 3, why="too few")
    with pytest.raises(ValueError, match="finite"):
        Measured(float("inf"), 0.0, 1.0, 3)
    with pytest.raises(UsageError, match="not a measured value"):
        Measured.from_json({"value": 1.0, "lower": 0.0})


@pytest.mark.parametrize(("successes", "n"), [(0, 20), (3, 20), (20, 20), (61, 100), (1, 1)])
@pytest.mark.parametrize("confidence", [0.9, 0.95])
def test_clopper_pearson_agrees_with_scipy(successes: int, n: int, confidence: float) -> None:
    ours = clopper_pearson(successes, n, confidence)
    theirs = binomtest(successes, n).proportion_ci(confidence, method="exact")
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
    assert ours.value == successes / n
    assert ours.n == n


@pytest.mark.parametrize(("n", "percent"), [(20, 13.9), (50, 5.8), (100, 3.0), (300, 1.0)])
def test_zero_successes_leave_room(n: int, percent: float) -> None:
    high = clopper_pearson(0, n, confidence=0.9).high  # one-sided 95 %
    assert high is not None
    assert 100 * high == pytest.approx(percent, abs=0.05)


def test_clopper_pearson_edges() -> None:
    assert clopper_pearson(0, 0).why == "no trials"
    with pytest.raises(UsageError, match="impossible"):
        clopper_pearson(5, 4)


def test_identity_weights_are_resamples(rng: np.random.Generator) -> None:
    weights = identity_weights(7, 4000, rng)
    assert weights.shape == (4000, 7)
    assert (weights.sum(axis=1) == 7).all()
    assert weights.mean(axis=0) == pytest.approx(np.ones(7), abs=0.08)
    assert weights.var() == pytest.approx(6 / 7, abs=0.05)


def test_blocks_are_the_same_draws() -> None:
    blocks = list(weight_blocks(6, 100, np.random.default_rng(1), width=200_000))
    assert len(blocks) == 5
    assert np.array_equal(np.concatenate(blocks), identity_weights(6, 100, np.random.default_rng(1)))


def test_percentile_interval_contains_the_value_and_skips_nan() -> None:
    draws = [np.nan, *range(1, 1001)]
    assert percentile_interval(500.0, draws) == (25.0, 976.0)
    assert percentile_interval(2.0, draws)[0] == 2.0
    assert percentile_interval(2000.0, draws)[1] == 2000.0
    with pytest.raises(UsageError, match="identities"):
        percentile_interval(0.0, [np.nan])


def test_a_perfect_rate_keeps_an_open_side() -> None:
    low, high = rate_interval(1.0, np.ones(100), 30)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 30)), 1.0)
    assert rate_interval(0.0, np.zeros(100), 30) == (0.0, pytest.approx(1 - 0.025 ** (1 / 30)))
    assert rate_interval(0.5, np.full(100, 0.5), 30) == (0.5, 0.5)


def test_mean_matches_the_normal_interval(rng: np.random.Generator) -> None:
    values = rng.normal(3, 2, 400)
    measured = bootstrap_mean(values, draws=4000, rng=rng)
    half = 1.96 * values.std() / 20
    assert measured.value == pytest.approx(values.mean())
    assert measured.low == pytest.approx(values.mean() - half, abs=0.15 * half)
    assert measured.high == pytest.approx(values.mean() + half, abs=0.15 * half)
    assert measured.n == 400


def test_clusters_are_resampled_whole(rng: np.random.Generator) -> None:
    """Ten copies of each value carry no more information than one."""
    values = rng.normal(size=40)
    alone = bootstrap_mean(values, draws=500, rng=np.random.default_rng(0))
    copied = bootstrap_mean(
        np.repeat(values, 10), np.repeat(np.arange(40), 10), draws=500, rng=np.random.default_rng(0)
    )
    assert copied.n == 40
    assert (copied.low, copied.high) == pytest.approx((alone.low, alone.high))


@pytest.mark.parametrize("statistic", ["mean", "median"])
def test_draws_agree_with_explicit_resampling(statistic: str) -> None:
    values = np.array([1.0, 5.0, 2.0, 2.0, 9.0, 4.0, 7.0])
    clusters = np.array(["b", "a", "b", "c", "d", "d", "a"])
    names = np.unique(clusters)
    draws = []
    for counts in identity_weights(4, 300, np.random.default_rng(3)):
        sample = [v for name, count in zip(names, counts, strict=True) for v in values[clusters == name].repeat(count)]
        draws.append(getattr(np, statistic)(sample))
    bootstrap = bootstrap_mean if statistic == "mean" else bootstrap_median
    measured = bootstrap(values, clusters, draws=300, rng=np.random.default_rng(3))
    assert measured.value == pytest.approx(getattr(np, statistic)(values))
    assert (measured.low, measured.high) == pytest.approx(percentile_interval(measured.value, draws))


def test_median_with_infinite_values(rng: np.random.Generator) -> None:
    measured = bootstrap_median([1.0, 2.0, 3.0, 4.0, np.inf, np.inf, np.inf], draws=500, rng=rng)
    assert measured.value == 4.0
    assert measured.high is None
    assert measured.note == "the interval is open upwards"
    assert bootstrap_median([1.0, np.inf], rng=rng).why == "the median is not finite"


def test_paired_difference_is_tighter_than_unpaired(rng: np.random.Generator) -> None:
    difficulty = rng.normal(0, 5, 100)
    a, b = difficulty + rng.normal(1, 0.1, 100), difficulty + rng.normal(0, 0.1, 100)
    for statistic in ("mean", "median"):
        measured = bootstrap_paired(a, b, statistic=statistic, draws=500, rng=rng)
        assert measured.value == pytest.approx(getattr(np, statistic)(a) - getattr(np, statistic)(b))
        assert measured.low is not None
        assert measured.low > 0
    assert bootstrap_paired(a, a, draws=200, rng=rng) == Measured(0.0, 0.0, 0.0, 100)


def test_one_cluster_or_none_has_no_interval(rng: np.random.Generator) -> None:
    assert "one cluster only (observed 1.5)" in str(bootstrap_mean([1.0, 2.0], ["x", "x"], rng=rng).why)
    assert bootstrap_mean([], rng=rng).why == "no values"


@pytest.mark.parametrize("bad", [[np.nan, 1.0], [np.inf, 1.0], [[1.0, 2.0]]])
def test_bad_values_are_refused(bad: list, rng: np.random.Generator) -> None:
    with pytest.raises(UsageError):
        bootstrap_mean(bad, rng=rng)


def test_bad_clusters_and_lengths_are_refused(rng: np.random.Generator) -> None:
    with pytest.raises(UsageError, match="one cluster for each of the 2"):
        bootstrap_mean([1.0, 2.0], [1], rng=rng)
    with pytest.raises(UsageError, match="equal lengths"):
        bootstrap_paired([1.0, 2.0], [1.0], rng=rng)


def test_rate_is_exact_for_single_targets_and_clustered_otherwise(rng: np.random.Generator) -> None:
    hits = np.arange(40) < 10
    assert rate(hits, chance=0.1) == clopper_pearson(10, 40, chance=0.1)
    assert rate(hits, np.arange(40)) == rate(hits)
    clustered = rate(hits, np.arange(40) // 10, chance=0.1, rng=rng)
    assert (clustered.value, clustered.n, clustered.low, clustered.chance) == (0.25, 4, 0.0, 0.1)
    perfect = rate(np.ones(40, bool), np.arange(40) // 10, rng=rng)
    assert perfect.low == pytest.approx(0.025**0.25)
    assert "one cluster" in str(rate(hits, np.zeros(40)).why)
    with pytest.raises(UsageError, match="rng"):
        rate(hits, np.arange(40) // 10)


def test_cluster_bootstrap_covers_where_the_naive_one_does_not() -> None:
    rng = np.random.default_rng(11)
    clusters = np.repeat(np.arange(40), 8)
    clustered = naive = 0
    for _ in range(150):
        values = rng.normal(size=40)[clusters] + 0.3 * rng.normal(size=320)
        with_clusters = bootstrap_mean(values, clusters, draws=300, rng=rng)
        without = bootstrap_mean(values, draws=300, rng=rng)
        clustered += with_clusters.low <= 0 <= with_clusters.high
        naive += without.low <= 0 <= without.high
    assert clustered >= 0.88 * 150
    assert naive <= 0.65 * 150
