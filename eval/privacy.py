"""Analytic ceilings on reconstruction: what *any* attack on a differentially private release can reach.

These are upper bounds. They are never merged with a measured attack, which is a lower bound on leakage.
Reconstruction robustness (ReRo): Balle, Cherubin, Hayes 2022 (arXiv 2201.04845); Hayes, Mahloujifar, Balle
2023 (arXiv 2302.07225). Gaussian differential privacy (GDP): Dong, Roth, Su 2022 (arXiv 1905.02383).
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy.optimize import brentq
from scipy.special import log_ndtr, ndtr, ndtri

from fedgc.errors import UsageError


def gaussian_delta(epsilon: float, mu: float) -> float:
    """delta(epsilon) of mu-GDP: Phi(mu/2 - eps/mu) - e^eps Phi(-mu/2 - eps/mu) (1905.02383, corollary 1)."""
    if mu == 0:
        return 0.0
    first, second = ndtr(mu / 2 - epsilon / mu), math.exp(epsilon + log_ndtr(-mu / 2 - epsilon / mu))
    return max(0.0, float(first) - second)


def gaussian_mu(epsilon: float, delta: float) -> float:
    """The mu of one Gaussian release that is exactly (epsilon, delta)-DP.

    delta(epsilon) grows with mu, so this is the largest mu (least noise, sigma = 1/mu) that keeps the
    promise, and `rero_gamma` of it bounds every single Gaussian release that keeps it.
    """
    if epsilon < 0 or not math.isfinite(epsilon) or not 0 < delta < 1:
        raise UsageError(f"need finite epsilon >= 0 and 0 < delta < 1, got epsilon={epsilon}, delta={delta}")
    upper = 1.0
    while gaussian_delta(epsilon, upper) <= delta:
        upper *= 2
    return float(brentq(lambda mu: gaussian_delta(epsilon, mu) - delta, 0.0, upper, xtol=1e-12))


def rero_gamma(kappa: float, mu: float) -> float:
    """Largest success of any attack on a mu-GDP release: Phi(Phi^-1(kappa) + mu).

    kappa: success of the best guess that sees no release (1/G among G equally likely candidates).
    Also the largest true positive rate of membership inference at false positive rate kappa.
    """
    _check_prior(kappa)
    if mu < 0:
        raise UsageError(f"mu must be >= 0, got {mu}")
    return float(ndtr(ndtri(kappa) + mu))


def gamma_from_epsilon(epsilon: float, delta: float, kappa: float) -> float:
    """`rero_gamma` for ONE Gaussian release that is (epsilon, delta)-DP; for DP-SGD use `rero_from_profile`.

    The same epsilon from subsampled, composed steps allows another gamma, so this is no bound for DP-SGD.
    """
    return rero_gamma(kappa, gaussian_mu(epsilon, delta))


def rero_from_profile(epsilons: ArrayLike, deltas: ArrayLike, kappa: float) -> float:
    """ReRo bound from a privacy profile delta(epsilon): min over e of delta(e) + exp(e) kappa, at most 1.

    Every (epsilon, delta) pair is a bound by itself, so a coarse grid is valid, only looser.
    """
    _check_prior(kappa)
    epsilon, delta = np.asarray(epsilons, dtype=np.float64), np.asarray(deltas, dtype=np.float64)
    if epsilon.ndim != 1 or epsilon.shape != delta.shape or not len(epsilon):
        raise UsageError(f"a privacy profile needs as many deltas as epsilons, got {epsilon.shape} and {delta.shape}")
    if np.isnan(epsilon).any() or not ((delta >= 0) & (delta <= 1)).all():
        raise UsageError("a privacy profile needs numbers, with every delta in [0, 1]")
    with np.errstate(over="ignore"):
        return float(min(1.0, np.min(delta + np.exp(epsilon) * kappa)))


def pixel_ceiling_psnr(sigma: float, mean_square: float, pixels: int, prior_dimensions: int | None = None) -> float:
    """PSNR in dB of the best prior-free estimate of an image from its clipped, noised gradient (2402.12861).

    The gradient, a multiple of the image x, is clipped to norm 1 and gets noise sigma per coordinate, so the
    error per pixel is sigma^2 |x|^2, with |x|^2 = mean_square * pixels (pixels: all values, 3 x H x W).
    A linear face prior of k dimensions keeps k/pixels of the noise. Without noise the ceiling is infinite.
    """
    if sigma < 0 or mean_square <= 0 or pixels < 1:
        raise UsageError(f"need sigma >= 0, mean_square > 0, pixels >= 1; got {sigma}, {mean_square}, {pixels}")
    if prior_dimensions is not None and not 1 <= prior_dimensions <= pixels:
        raise UsageError(f"prior_dimensions must be between 1 and {pixels}, got {prior_dimensions}")
    if sigma == 0:
        return math.inf
    kept = 1.0 if prior_dimensions is None else prior_dimensions / pixels
    return -10 * math.log10(sigma**2 * mean_square * pixels * kept)


def candidate_ceiling(K: int, T: int, sigma: float, best: int = 1) -> float:
    """Largest chance to have the right one of K equally likely candidates among ``best`` from T full-batch noised gradients.

    Phi(Phi^-1(best/K) + sqrt(T)/sigma): T Gaussian releases of noise multiplier sigma are sqrt(T)/sigma-GDP
    (add/remove, sensitivity = clipping norm), and `rero_gamma` (2302.07225) bounds every success event by its
    chance. The other photos of the batch may be known. Without noise nothing is bounded: 1.
    """
    if K < 1 or T < 0 or sigma < 0 or best < 1:
        raise UsageError(f"need K, best >= 1, T >= 0 observations, sigma >= 0; got {K}, {best}, {T}, {sigma}")
    if best >= K:
        return 1.0
    if T == 0:
        return best / K
    return 1.0 if sigma == 0 else rero_gamma(best / K, math.sqrt(T) / sigma)


def _check_prior(kappa: float) -> None:
    if not 0 < kappa <= 1:
        raise UsageError(f"the prior success kappa must be in (0, 1], got {kappa}")
