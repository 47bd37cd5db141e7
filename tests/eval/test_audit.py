"""The two-world audit against mechanisms whose epsilon is known exactly, and against the ceilings of perfect attacks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.stats import binom, norm

from eval.audit import FLAGGED, ceiling, choose_test, discriminant, gaussian_epsilon, lower_bound
from eval.privacy import gaussian_delta
from fedgc.errors import UsageError


@pytest.mark.parametrize(
    ("runs", "known"), [(50, 2.57), (100, 3.28), (200, 3.98), (500, 4.91), (1000, 5.60), (5000, 7.21)]
)
def test_the_ceilings_of_perfect_attacks(runs: int, known: float) -> None:
    assert ceiling(runs, 1e-9, "clopper-pearson") == pytest.approx(known, abs=0.006)
    perfect = lower_bound(runs, 0, runs, 1e-9, "clopper-pearson")
    assert perfect.value == perfect.ceiling
    assert perfect.true_positive == pytest.approx(0.025 ** (1 / runs))  # of n successes in n
    assert perfect.false_positive == pytest.approx(1 - 0.025 ** (1 / runs))


def test_no_attack_exceeds_the_ceiling_and_the_gaussian_one_lies_higher() -> None:
    for method in ("clopper-pearson", "gaussian"):
        top = ceiling(40, 1e-3, method)  # type: ignore[arg-type]
        shown = [lower_bound(h, a, 40, 1e-3, method).value for h in range(41) for a in range(41)]  # type: ignore[arg-type]
        assert max(shown) == top
        assert min(shown) == 0
    assert ceiling(40, 1e-3, "gaussian") > 2 * ceiling(40, 1e-3, "clopper-pearson")


def test_both_of_the_two_rates_can_give_the_bound() -> None:
    """A test that says yes nearly always is an attack as well, by what its no means."""
    yes, no = (lower_bound(*counts, 1000, 1e-6, "clopper-pearson") for counts in ((300, 0), (1000, 700)))
    assert yes.value == pytest.approx(no.value)
    tpr, fpr = binom_at_least(300, 1000), 1 - 0.025 ** (1 / 1000)
    assert yes.value == pytest.approx(math.log((tpr - 1e-6) / fpr), abs=1e-4)


def binom_at_least(hits: int, runs: int) -> float:
    """The rate at which so many or more hits have a chance of 2.5 %, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if binom.sf(hits - 1, runs, middle) < 0.025 else (low, middle)
    return low


def test_delta_is_given_away_first() -> None:
    """A mechanism that publishes everything once in twenty times is (0, 0.05)-DP, and no attack makes more of it."""
    assert lower_bound(50, 0, 1000, 0.05, "clopper-pearson").value == 0
    assert lower_bound(50, 0, 1000, 1e-6, "clopper-pearson").value > 2


@pytest.mark.parametrize(("mu", "delta"), [(0.3, 1e-3), (1.0, 1e-5), (4.3, 1e-3), (12.0, 1e-2)])
def test_epsilon_of_mu_is_the_inverse_of_the_profile(mu: float, delta: float) -> None:
    assert gaussian_delta(gaussian_epsilon(mu, delta), mu) == pytest.approx(delta, rel=1e-6)


def test_epsilon_of_little_mu_is_nought() -> None:
    assert gaussian_epsilon(-1.0, 1e-3) == gaussian_epsilon(0.0, 1e-3) == gaussian_epsilon(1e-3, 1e-3) == 0


@pytest.mark.parametrize("arguments", [(5, 0, 4, 1e-3), (1, -1, 4, 1e-3), (0, 0, 0, 1e-3), (1, 1, 4, 0.0)])
def test_nonsense_is_refused(arguments: tuple[int, int, int, float]) -> None:
    with pytest.raises(UsageError):
        lower_bound(*arguments, "gaussian")


# -- coverage and power, on a Gaussian mechanism


def audited(rng: np.random.Generator, mu: float, runs: int, method: str, confidence: float = 0.95) -> float:
    """Of a Gaussian release that the canary moves by mu deviations, beside nine statistics that know nothing."""

    def world(shift: float) -> np.ndarray:
        return rng.standard_normal((runs // 2, 10)) + shift * np.eye(10)[0]

    candidates = [(str(j), sign * np.eye(10)[j]) for j in range(10) for sign in (1, -1)]
    test = choose_test(world(mu), world(0), candidates, 1e-3, method)  # type: ignore[arg-type]
    hits, alarms = (test.positives(world(shift)) for shift in (mu, 0))
    return lower_bound(hits, alarms, runs // 2, 1e-3, method, confidence).value  # type: ignore[arg-type]


@pytest.mark.parametrize("mu", [0.0, 1.0])
@pytest.mark.parametrize("method", ["clopper-pearson", "gaussian"])
def test_the_bound_exceeds_the_truth_no_more_often_than_stated(mu: float, method: str) -> None:
    rng, trials = np.random.default_rng(7), 400
    truth = gaussian_epsilon(mu, 1e-3)
    wrong = sum(audited(rng, mu, 200, method) > truth for _ in range(trials))
    assert wrong <= binom.ppf(1 - 1e-4, trials, 0.05)


def test_counting_on_the_runs_that_chose_would_not_hold() -> None:
    """Why there are two halves: among many statistics that know nothing the best of the moment looks like knowledge."""
    rng, wrong = np.random.default_rng(8), 0
    for _ in range(100):
        present, absent = rng.standard_normal((2, 50, 40))
        test = choose_test(present, absent, [(str(j), np.eye(40)[j]) for j in range(40)], 1e-3, "gaussian")
        wrong += lower_bound(test.positives(present), test.positives(absent), 50, 1e-3, "gaussian").value > 0
    assert wrong > 20


@pytest.mark.parametrize(("mu", "share"), [(1.0, 0.75), (2.0, 0.8), (3.0, 0.75)])
def test_a_strong_attack_gets_near_the_truth(mu: float, share: float) -> None:
    rng = np.random.default_rng(9)
    found = np.mean([audited(rng, mu, 2000, "gaussian") for _ in range(10)])
    assert share * gaussian_epsilon(mu, 1e-3) < found < gaussian_epsilon(mu, 1e-3)
    assert np.mean([audited(rng, mu, 2000, "clopper-pearson") for _ in range(10)]) < found
    assert np.mean([audited(rng, mu, 2000, "gaussian", FLAGGED) for _ in range(10)]) < found


# -- the choice of a test


def test_a_perfect_statistic_is_cut_in_the_middle() -> None:
    rng = np.random.default_rng(0)
    absent = np.stack([rng.standard_normal(60), rng.random(60)], axis=1)
    present = np.stack([rng.standard_normal(60), 3 + rng.random(60)], axis=1)
    test = choose_test(present, absent, [("noise", np.eye(2)[0]), ("signal", np.eye(2)[1])], 1e-3, "clopper-pearson")
    assert test.name == "signal"
    assert 1.5 < test.threshold < 3
    assert (test.positives(present), test.positives(absent)) == (60, 0)


def test_the_discriminant_cancels_noise_that_two_rounds_share() -> None:
    rng = np.random.default_rng(1)

    def world(present: bool) -> np.ndarray:
        shared = 5 * rng.standard_normal(200)
        first, second = shared + present, shared - 0.5 * present
        return np.stack([first, rng.standard_normal(200), second + 1e-6 * rng.standard_normal(200)], axis=1)

    weights = discriminant(world(True), world(False), [0, 2])
    assert weights[1] == 0
    assert weights[0] == pytest.approx(-weights[2], rel=1e-3)
    assert (world(True) @ weights).min() > (world(False) @ weights).max()


def test_the_discriminant_of_independent_columns_is_the_best_there_is() -> None:
    rng = np.random.default_rng(2)
    shift, spread = np.array([1.0, -1.0, 0.5]), np.array([1.0, 2.0, 0.1])
    worlds = [spread * rng.standard_normal((20000, 3)) + s * shift for s in (1, 0)]
    weights = discriminant(*worlds, [0, 1, 2])
    np.testing.assert_allclose(weights / weights[2], shift / spread**2 / 50, rtol=0.1, atol=5e-4)
    separation = (shift @ weights) / np.sqrt((spread**2) @ weights**2)
    assert separation == pytest.approx(np.sqrt(((shift / spread) ** 2).sum()), rel=1e-3)
    assert norm.cdf(separation / 2) > 0.99


def test_columns_that_never_vary_are_no_obstacle() -> None:
    same = np.ones((30, 2))
    assert np.isfinite(discriminant(same, same, [0, 1])).all()
    weights = discriminant(same + np.array([1.0, 0.0]), same, [0, 1])
    assert weights[0] > 0
    assert weights[1] == pytest.approx(0, abs=1e-9)
