"""PSNR, SSIM and matching against scipy, brute force and permutations that are not their own inverse."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from eval.fidelity import align, fidelity_summary, match, psnr, ssim
from fedgc.errors import UsageError


@pytest.fixture
def images() -> torch.Tensor:
    return torch.rand(5, 3, 24, 20, generator=torch.Generator().manual_seed(1))


def noisy(images: torch.Tensor, scale: float, seed: int = 2) -> torch.Tensor:
    return images + scale * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))


def test_psnr_per_image(images: torch.Tensor) -> None:
    other = noisy(images, 0.1)
    expected = [
        10 * np.log10(1 / np.mean((a - b) ** 2))
        for a, b in zip(images.double().numpy(), other.double().numpy(), strict=True)
    ]
    assert psnr(images, other).numpy() == pytest.approx(np.array(expected), abs=1e-10)
    assert psnr(torch.zeros(1, 3, 4, 4), torch.full((1, 3, 4, 4), 0.1)).item() == pytest.approx(20, abs=1e-5)


def test_psnr_of_an_exact_copy_is_infinite(images: torch.Tensor) -> None:
    other = images.clone()
    other[1:] += 0.1
    assert torch.isinf(psnr(images, other)).tolist() == [True, False, False, False, False]


def ssim_by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """One image (C, H, W); truncate 3.5 makes scipy's window 11 wide."""
    values = []
    for a, b in zip(x, y, strict=True):
        blur = lambda z: gaussian_filter(z, 1.5, truncate=3.5)[5:-5, 5:-5]  # noqa: E731
        ma, mb = blur(a), blur(b)
        va, vb, cov = blur(a * a) - ma**2, blur(b * b) - mb**2, blur(a * b) - ma * mb
        values.append(((2 * ma * mb + 1e-4) * (2 * cov + 9e-4)) / ((ma**2 + mb**2 + 1e-4) * (va + vb + 9e-4)))
    return float(np.mean(values))


@pytest.mark.parametrize("scale", [0.02, 0.2, 1.0])
def test_ssim_agrees_with_scipy_windows(images: torch.Tensor, scale: float) -> None:
    other = noisy(images, scale)
    expected = [ssim_by_scipy(a, b) for a, b in zip(images.double().numpy(), other.double().numpy(), strict=True)]
    assert ssim(images, other).numpy() == pytest.approx(np.array(expected), abs=1e-12)


def test_ssim_of_one_window_by_definition() -> None:
    """An 11 x 11 image has one window: weighted moments written out."""
    rng = np.random.default_rng(0)
    x, y = rng.uniform(size=(2, 11, 11))
    taps = np.exp(-((np.arange(11) - 5.0) ** 2) / 4.5)
    w = np.outer(taps, taps) / taps.sum() ** 2
    mx, my = (w * x).sum(), (w * y).sum()
    vx, vy, cov = (w * (x - mx) ** 2).sum(), (w * (y - my) ** 2).sum(), (w * (x - mx) * (y - my)).sum()
    expected = (2 * mx * my + 1e-4) * (2 * cov + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
    assert ssim(torch.tensor(x)[None, None], torch.tensor(y)[None, None]).item() == pytest.approx(expected, abs=1e-12)


def test_ssim_properties(images: torch.Tensor) -> None:
    other = noisy(images, 0.3)
    assert ssim(images, images).numpy() == pytest.approx(np.ones(5))
    assert torch.allclose(ssim(images, other), ssim(other, images))
    assert (ssim(images, noisy(images, 0.05)) > ssim(images, other)).all()


@pytest.mark.parametrize("cycle", [(1, 2, 0, 3, 4), (2, 0, 1, 3, 4), (1, 2, 3, 4, 0)])
def test_match_undoes_cycles(images: torch.Tensor, cycle: tuple[int, ...]) -> None:
    """A 3-cycle is not its own inverse: returning the permutation the wrong way round fails here."""
    shuffled = noisy(images[list(cycle)], 0.05)
    found = match(shuffled, images)
    assert found.tolist() == [cycle.index(original) for original in range(5)]
    assert found.tolist() != list(cycle)
    aligned, missing = align(shuffled, images)
    assert missing == 0
    assert torch.equal(aligned, shuffled[torch.from_numpy(found)])
    assert psnr(aligned, images).min() > 20


def test_match_is_optimal_where_greedy_is_not() -> None:
    originals = torch.tensor([0.0, 0.4]).view(2, 1, 1, 1)
    guesses = torch.tensor([0.3, 1.0]).view(2, 1, 1, 1)
    # 0.0-0.3 and 0.4-1.0 cost 0.45; 0.0-1.0 and 0.4-0.3, which starts with the best pair, cost 1.01
    assert match(guesses, originals).tolist() == [0, 1]


def test_match_agrees_with_all_permutations() -> None:
    generator = torch.Generator().manual_seed(7)
    for _ in range(20):
        guesses, originals = torch.rand(2, 5, 1, 2, 2, generator=generator).double()
        cost = ((originals[:, None] - guesses[None]) ** 2).flatten(2).sum(-1).numpy()
        best = min(permutations(range(5)), key=lambda order: sum(cost[i, j] for i, j in enumerate(order)))
        assert match(guesses, originals).tolist() == list(best)


def test_duplicates_are_used_once(images: torch.Tensor) -> None:
    copies = images[0].repeat(5, 1, 1, 1)
    assert sorted(match(copies, images).tolist()) == [0, 1, 2, 3, 4]
    aligned, _ = align(copies, images)
    assert torch.isinf(psnr(aligned, images)).tolist() == [True, False, False, False, False]


def test_missing_reconstructions_become_grey(images: torch.Tensor) -> None:
    guesses = noisy(images[[3, 0]], 0.01)
    assert match(guesses, images).tolist() == [1, -1, -1, 0, -1]
    aligned, missing = align(guesses, images)
    assert missing == 3
    assert torch.equal(aligned[[0, 3]], guesses[[1, 0]])
    assert (aligned[[1, 2, 4]] == 0.5).all()
    assert align(images[:0], images)[1] == 5


def test_reconstructions_that_are_not_finite_are_missing(images: torch.Tensor) -> None:
    guesses = images[[1, 2, 0, 4, 3]].clone()
    guesses[1, 0, 0, 0] = float("nan")
    assert match(guesses, images).tolist() == [2, 0, -1, 4, 3]
    assert match(torch.full_like(images, torch.inf), images).tolist() == [-1] * 5


def test_shapes_are_checked(images: torch.Tensor) -> None:
    with pytest.raises(UsageError, match="own loss"):
        match(images, images[:3])
    with pytest.raises(UsageError, match="image shape"):
        match(images[..., :10], images)
    with pytest.raises(UsageError, match="one shape"):
        psnr(images[:2], images)
    with pytest.raises(UsageError, match="11 x 11"):
        ssim(images[..., :10], images[..., :10])


def test_summary_is_medians_with_intervals() -> None:
    rng = np.random.default_rng(3)
    decibels, structure = rng.normal(20, 2, 60), rng.uniform(size=60)
    summary = fidelity_summary(decibels, structure, np.arange(60) // 3, draws=300, rng=rng)
    assert summary["psnr"].value == pytest.approx(np.median(decibels))
    assert summary["ssim"].value == pytest.approx(np.median(structure))
    assert (summary["psnr"].n, summary["psnr"].exact, summary["ssim"].exact) == (20, 0, None)
    assert summary["psnr"].low < summary["psnr"].value < summary["psnr"].high


def test_summary_counts_exact_copies() -> None:
    rng = np.random.default_rng(3)
    some = fidelity_summary([20.0] * 15 + [np.inf] * 2, [0.5] * 17, draws=300, rng=rng)["psnr"]
    assert (some.value, some.high, some.exact) == (20.0, 20.0, 2)
    most = fidelity_summary([20.0] * 5 + [np.inf] * 6, [0.5] * 11, draws=300, rng=rng)["psnr"]
    assert most.value is None
    assert most.exact == 6
    assert "6 of 11 reconstructions are exact copies" in str(most.why)
