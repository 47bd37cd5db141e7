"""Open-set identification and D_sys, by hand and on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest

from eval.linkability import d_sys, tpir


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def test_identification_by_hand(rng) -> None:
    scores = np.array([[0.9, 0.1, 0.2], [0.3, 0.8, 0.7], [0.6, 0.1, 0.5], [0.95, 0.1, 0.2]])
    truth = np.array([0, 1, 2, 0])
    # without their mates the queries reach 0.2, 0.7, 0.6, 0.2; one of four may pass: the threshold is 0.6
    assert tpir(scores, truth, 0.25, rng).value == 0.75
    assert tpir(scores, truth, 0.25, rng).chance == pytest.approx(0.25 / 3)
    assert tpir(scores, truth, 0.1, rng).value is None


def test_random_scores_name_nobody(rng) -> None:
    scores, truth = rng.random((400, 50)), rng.integers(0, 50, 400)
    measured = tpir(scores, truth, 0.05, rng)
    assert measured.value < 0.01
    assert measured.low <= measured.chance <= measured.high


def test_ties_count_against_the_attacker(rng) -> None:
    assert tpir(np.ones((20, 5)), np.zeros(20, dtype=int), 0.1, rng).value == 0


def test_separate_scores_are_fully_linkable_and_equal_ones_are_not(rng) -> None:
    apart = d_sys(1 + 0.1 * rng.random(200), 0.1 * rng.random((200, 20)), rng)
    assert apart.value == pytest.approx(1.0)
    alike = d_sys(rng.random(200), rng.random((200, 20)), rng)
    assert alike.value < 0.1
    assert alike.chance == pytest.approx(alike.value, abs=0.06)
    assert d_sys(np.ones(9), np.ones((9, 4)), rng).value == 0


def test_the_integral_of_two_known_densities(rng) -> None:
    """Mated scores uniform on [0, 2], others on [0, 1]: LR is 1/2 below 1 and infinite above, so D_sys is 1/2."""
    measured = d_sys(2 * rng.random(4000), rng.random((4000, 3)), rng)
    assert measured.value == pytest.approx(0.5, abs=0.03)
    assert measured.low <= 0.5 <= measured.high or abs(measured.value - 0.5) < 0.03


def test_one_template_is_no_measure(rng) -> None:
    assert d_sys(np.ones(1), np.ones((1, 1)), rng).value is None
