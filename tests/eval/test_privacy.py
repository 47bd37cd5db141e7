"""Ceilings against published figures and against simulated attacks."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import norm

from eval.privacy import (
    candidate_ceiling,
    gamma_from_epsilon,
    gaussian_delta,
    gaussian_mu,
    pixel_ceiling_psnr,
    rero_from_profile,
    rero_gamma,
)
from fedgc.errors import UsageError

EPSILONS = [0.5, 1, 2, 4, 8, 16, 32]


@pytest.mark.parametrize(("epsilon", "mu"), zip(EPSILONS, [0.14, 0.27, 0.50, 0.93, 1.67, 2.91, 4.88], strict=True))
def test_mu_of_one_release_at_delta_1e_5(epsilon: float, mu: float) -> None:
    assert gaussian_mu(epsilon, 1e-5) == pytest.approx(mu, abs=0.0051)


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 5.0, 40.0])
@pytest.mark.parametrize("delta", [1e-8, 1e-3, 0.2])
def test_mu_is_exactly_on_the_curve(epsilon: float, delta: float) -> None:
    mu = gaussian_mu(epsilon, delta)
    assert gaussian_delta(epsilon, mu) == pytest.approx(delta, rel=1e-6)
    assert gaussian_delta(epsilon, 0.999 * mu) < delta < gaussian_delta(epsilon, 1.001 * mu)


@pytest.mark.parametrize(("epsilon", "mu"), [(0.5, 1.0), (2.0, 1.5), (1.0, 0.4)])
def test_delta_is_the_hockey_stick_divergence(epsilon: float, mu: float) -> None:
    excess = quad(lambda z: max(0.0, norm.pdf(z, mu) - math.exp(epsilon) * norm.pdf(z)), -12, 12, limit=500)[0]
    assert gaussian_delta(epsilon, mu) == pytest.approx(excess, abs=1e-7)
    assert gaussian_delta(epsilon, 0.0) == 0.0


@pytest.mark.parametrize(
    ("kappa", "gammas", "digits"),
    [
        (1e-1, [0.127, 0.155, 0.218, 0.361, 0.650, 0.948, 1.0], 0.001),
        (1e-2, [0.015, 0.020, 0.034, 0.081, 0.255, 0.719, 0.995], 0.0006),
        (1e-3, [0.0016, 0.0024, 0.0048, 0.015, 0.077, 0.427, 0.963], 0.00051),
    ],
)
def test_gamma_of_one_release(kappa: float, gammas: list[float], digits: float) -> None:
    for epsilon, gamma in zip(EPSILONS, gammas, strict=True):
        assert gamma_from_epsilon(epsilon, 1e-5, kappa) == pytest.approx(gamma, abs=digits)


def test_gamma_is_the_power_of_the_likelihood_ratio_test() -> None:
    rng = np.random.default_rng(0)
    null, alternative = rng.normal(size=400_000), rng.normal(1.3, size=400_000)
    power = (alternative > np.quantile(null, 0.95)).mean()
    assert rero_gamma(0.05, 1.3) == pytest.approx(power, abs=0.005)
    assert rero_gamma(0.05, 0.0) == pytest.approx(0.05)
    assert rero_gamma(1.0, 0.5) == 1.0


@pytest.mark.parametrize("mu", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("kappa", [0.1, 0.01, 0.001])
def test_profile_of_a_gaussian_gives_its_gamma(mu: float, kappa: float) -> None:
    """The trade-off function is the envelope of its (epsilon, delta) lines, so both routes agree."""
    grid = np.linspace(0, 40, 8001)
    deltas = [gaussian_delta(epsilon, mu) for epsilon in grid]
    assert rero_from_profile(grid, deltas, kappa) == pytest.approx(rero_gamma(kappa, mu), rel=1e-4)
    coarse = rero_from_profile(grid[::1000], deltas[::1000], kappa)
    assert coarse >= rero_gamma(kappa, mu) - 1e-12


def test_profile_by_hand() -> None:
    assert rero_from_profile([0.0, 1.0], [0.3, 0.05], 0.01) == pytest.approx(0.05 + math.e * 0.01)
    assert rero_from_profile([0.0, 2000.0], [1.0, 0.0], 0.5) == 1.0


@pytest.mark.parametrize(("sigma", "psnr"), [(0.001, 30.4), (0.003, 20.8), (0.01, 10.4), (0.03, 0.8)])
def test_pixel_ceiling_at_32_pixels(sigma: float, psnr: float) -> None:
    assert pixel_ceiling_psnr(sigma, 0.3, 3 * 32 * 32) == pytest.approx(psnr, abs=0.05)


@pytest.mark.parametrize(("sigma", "psnr"), [(0.03, 18.7), (0.1, 8.2)])
def test_pixel_ceiling_with_a_face_prior(sigma: float, psnr: float) -> None:
    assert pixel_ceiling_psnr(sigma, 0.3, 3 * 32 * 32, prior_dimensions=50) == pytest.approx(psnr, abs=0.05)


def test_pixel_ceiling_is_what_rescaling_reaches() -> None:
    rng = np.random.default_rng(2)
    image = rng.uniform(size=3072)
    length = np.linalg.norm(image)
    errors = [np.mean((length * (image / length + 0.01 * rng.normal(size=3072)) - image) ** 2) for _ in range(50)]
    ceiling = pixel_ceiling_psnr(0.01, float(np.mean(image**2)), 3072)
    assert -10 * np.log10(np.mean(errors)) == pytest.approx(ceiling, abs=0.05)
    assert pixel_ceiling_psnr(0, 0.3, 3072) == math.inf


@pytest.mark.parametrize(("K", "bounds"), [(100, [0.09, 0.37, 0.75, 0.95]), (1000, [0.02, 0.14, 0.46, 0.82])])
def test_candidate_ceiling_table(K: int, bounds: list[float]) -> None:
    for signal, bound in zip([1, 2, 3, 4], bounds, strict=True):
        assert candidate_ceiling(K, 1, 1 / signal) == pytest.approx(bound, abs=0.0051)
        assert candidate_ceiling(K, signal**2, 1.0) == pytest.approx(candidate_ceiling(K, 1, 1 / signal))


def test_maximum_likelihood_stays_below_the_candidate_ceiling() -> None:
    rng = np.random.default_rng(4)
    z = rng.normal(size=(20_000, 100))
    z[:, 0] += 3  # orthogonal candidates, sqrt(T)/sigma = 3
    success = (z.argmax(axis=1) == 0).mean()
    assert success == pytest.approx(0.68, abs=0.01)
    assert success < candidate_ceiling(100, 9, 1.0)


def test_candidate_ceiling_edges() -> None:
    assert candidate_ceiling(1, 5, 1.0) == 1.0
    assert candidate_ceiling(50, 0, 1.0) == 0.02
    assert candidate_ceiling(50, 1, 0.0) == 1.0
    assert candidate_ceiling(50, 0, 1.0, best=5) == 0.1
    assert candidate_ceiling(5, 1, 1.0, best=5) == 1.0


def test_five_guesses_stay_below_their_candidate_ceiling() -> None:
    z = np.random.default_rng(6).normal(size=(20_000, 100))
    z[:, 0] += 2
    success = ((z >= z[:, :1]).sum(axis=1) <= 5).mean()
    assert candidate_ceiling(100, 4, 1.0) < success < candidate_ceiling(100, 4, 1.0, best=5)


@pytest.mark.parametrize(
    "call",
    [
        lambda: gaussian_mu(-1, 1e-5),
        lambda: gaussian_mu(math.inf, 1e-5),
        lambda: gaussian_mu(1, 0),
        lambda: rero_gamma(0, 1),
        lambda: rero_gamma(0.5, -1),
        lambda: rero_from_profile([1.0], [0.1, 0.2], 0.1),
        lambda: rero_from_profile([], [], 0.1),
        lambda: rero_from_profile([1.0], [1.5], 0.1),
        lambda: rero_from_profile([1.0], [math.nan], 0.1),
        lambda: pixel_ceiling_psnr(-1, 0.3, 10),
        lambda: pixel_ceiling_psnr(1, 0.3, 10, prior_dimensions=11),
        lambda: candidate_ceiling(0, 1, 1.0),
    ],
)
def test_impossible_arguments_are_refused(call) -> None:
    with pytest.raises(UsageError):
        call()
