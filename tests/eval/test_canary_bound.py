"""The audit in one run: its p-value and bounds against published values, and its coverage by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom

from eval.canaries import ALPHA, SHARES, Claim, audit, ceiling, epsilon_bound, p_value, score_canaries
from fedgc.errors import UsageError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_the_p_value_of_published_examples() -> None:
    assert p_value(100, 100, 75, math.log(3)) == pytest.approx(0.5535, abs=5e-5)
    assert epsilon_bound(1000, 100, 75, 1e-4) == pytest.approx(0.673, abs=5e-4)


@pytest.mark.parametrize(("m", "bound"), [(20, 1.82), (50, 2.78), (100, 3.49), (200, 4.19), (500, 5.10), (1000, 5.78)])
def test_bounds_where_every_guess_is_right(m: int, bound: float) -> None:
    assert epsilon_bound(m, m, m, 1e-5) == pytest.approx(bound, abs=6e-3)


def test_the_p_value_is_the_formula_term_by_term() -> None:
    m, r, v, epsilon, delta = 40, 20, 15, 0.8, 1e-3
    right = math.exp(epsilon) / (1 + math.exp(epsilon))
    pmf = binom.pmf(range(r + 1), r, right)
    between = [pmf[max(0, v - i) : v].sum() / i for i in range(1, m + 1)]
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(pmf[v:].sum() + 2 * m * delta * max(between), rel=1e-12)


@pytest.mark.parametrize("delta", [0.0, 1e-5, 1e-3])
@pytest.mark.parametrize(("r", "v"), [(20, 20), (100, 75), (200, 199), (200, 120)])
def test_the_bound_is_the_last_epsilon_that_is_ruled_out(r: int, v: int, delta: float) -> None:
    found = epsilon_bound(200, r, v, delta)
    assert found > 0
    assert p_value(200, r, v, found - 1e-6, delta) < ALPHA
    assert all(p_value(200, r, v, e, delta) >= ALPHA for e in np.linspace(found + 1e-6, found + 5, 50))


def test_guesses_no_better_than_chance_rule_nothing_out() -> None:
    assert epsilon_bound(100, 100, 50) == 0.0
    assert epsilon_bound(100, 100, 58) == 0.0  # p = .067
    assert epsilon_bound(100, 0, 0) == 0.0
    assert p_value(10, 0, 0, 0.0) == 1.0


IMPOSSIBLE = [(9, 10, 5, 1, 0), (9, 5, 6, 1, 0), (9, 5, 5, -1, 0), (9, 5, 5, 1, 2)]


@pytest.mark.parametrize(("m", "r", "v", "epsilon", "delta"), IMPOSSIBLE)
def test_impossible_counts_are_refused(m: int, r: int, v: int, epsilon: float, delta: float) -> None:
    with pytest.raises(UsageError, match="need 0 <= v <= r <= m"):
        p_value(m, r, v, epsilon, delta)


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0])
def test_coverage_on_randomised_response(epsilon: float, rng) -> None:
    """Each coin is told with probability e^ε/(1 + e^ε), and is otherwise told wrongly: tight for ε. Scores of differing strength
    do not help, and choosing among shares is paid for."""
    truthful, wrong, trials = 1 / (1 + math.exp(-epsilon)), 0, 400
    for _ in range(trials):
        inside = rng.random(100) < 0.5
        told = np.where(rng.random(100) < truthful, inside, ~inside)
        scores = np.where(told, 1.0, -1.0) * rng.random(100)
        wrong += audit(scores, inside, 0.0, rng).epsilon > epsilon
    assert wrong / trials <= ALPHA


def test_a_perfect_attack_reaches_the_ceiling_and_no_more(rng) -> None:
    inside = rng.random(200) < 0.5
    inside[:100], inside[100:] = True, False  # as many in as out: every guess can be right
    found = audit(inside + 0.0, inside, 1e-5, rng)
    assert (found.guesses, found.right) == (200, 200)
    assert found.epsilon == found.ceiling == ceiling(200, 1e-5)
    assert found.epsilon == epsilon_bound(200, 200, 200, 1e-5, ALPHA / len(SHARES))


def test_ties_are_broken_by_chance_and_not_by_order(rng) -> None:
    inside = np.arange(1000) >= 500  # in the order of candidates all guesses would be right
    assert audit(np.zeros(1000), inside, 0.0, rng).epsilon == 0.0


def test_the_scores_of_an_attack_stand_beside_those_of_absent_images(rng) -> None:
    inside = rng.random(300) < 0.5
    names = [(i % 7, i % 3) for i in range(300)]
    scores = score_canaries(3.0 * inside + rng.random(300), rng.random(300), inside, Claim(1.0, 1e-5), names, rng)
    metrics, control = scores.metrics, scores.baselines["absent-image"]
    assert metrics["auc"]["value"] == 1.0
    assert control["auc"]["low"] < 0.5 < control["auc"]["high"]
    bound = metrics["epsilon_lower_bound"]
    assert bound["value"] == bound["low"] > 3
    assert bound["high"] is None
    assert bound["chance"] == 0.0
    assert bound["value"] <= bound["ceiling"]
    assert bound["claim"] == {"value": 1.0, "delta": 1e-5}
    assert bound["delta"] == 1e-5
    assert control["epsilon_lower_bound"]["value"] < 0.5
    assert [s["trained_on"] for s in scores.samples] == inside.tolist()


def test_coins_that_all_fell_alike_tell_nothing_apart(rng) -> None:
    scores = score_canaries(
        rng.random(4), rng.random(4), np.ones(4, bool), Claim(None, None, "no promise"), [(0, 0)] * 4, rng
    )
    assert scores.metrics["auc"]["value"] is None
    assert "fell alike" in scores.metrics["auc"]["why"]
    assert scores.metrics["epsilon_lower_bound"]["claim"] == {"value": None, "why": "no promise"}
