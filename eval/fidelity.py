"""Pixel fidelity of reconstructions, and which reconstruction belongs to which original.

Images are (B, C, H, W) in [0, 1]. Fidelity says nothing on identity: read it beside the judge's similarity.
"""

from __future__ import annotations

import dataclasses
from typing import cast

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from eval.statistics import DRAWS, Measured, bootstrap_median
from fedgc.errors import UsageError

MID_GREY = 0.5
_WINDOW, _SIGMA = 11, 1.5
_C1, _C2 = 0.01**2, 0.03**2  # data range 1


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """(B,) peak signal-to-noise ratio in dB of each image, float64, data range 1.

    An exact copy has +inf: callers count such images (`fidelity_summary`), they are never averaged.
    """
    x, y = _float64_pair(x, y)
    return -10 * torch.log10((x - y).square().flatten(1).mean(dim=1))


def ssim(x: Tensor, y: Tensor) -> Tensor:
    """(B,) structural similarity, float64 (Wang et al. 2004): 11 x 11 Gaussian of sigma 1.5, data range 1.

    The mean over channels and over the windows that lie wholly inside the image.
    """
    x, y = _float64_pair(x, y)
    if x.ndim != 4 or min(x.shape[-2:]) < _WINDOW:
        raise UsageError(
            f"SSIM needs images (B, C, H, W) of at least {_WINDOW} x {_WINDOW} pixels, got {tuple(x.shape)}"
        )
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    luminance = (2 * mean_x * mean_y + _C1) / (mean_x**2 + mean_y**2 + _C1)
    structure = (2 * covariance + _C2) / (var_x + var_y + _C2)
    return (luminance * structure).flatten(1).mean(dim=1)


def match(reconstructions: Tensor, originals: Tensor) -> NDArray[np.int64]:
    """(N,) for each original the index of its reconstruction; -1 where none is left.

    One optimal assignment on the mean squared error, each reconstruction used once, so that duplicates pay.
    At most as many reconstructions as originals: choosing among more with the originals in hand would be
    cheating. A reconstruction that is not finite counts as missing.
    """
    if len(reconstructions) > len(originals):
        raise UsageError(
            f"{len(reconstructions)} reconstructions for {len(originals)} originals: "
            "select by the attack's own loss first"
        )
    if reconstructions.shape[1:] != originals.shape[1:]:
        raise UsageError(
            f"reconstructions {tuple(reconstructions.shape)} and originals {tuple(originals.shape)} "
            "differ in image shape; undo any resizing first"
        )
    found = np.full(len(originals), -1, dtype=np.int64)
    usable = reconstructions.flatten(1).isfinite().all(dim=1).nonzero().flatten().cpu()
    if not len(usable):
        return found
    guesses, truths = _float64(reconstructions)[usable].flatten(1), _float64(originals).flatten(1)
    cost = torch.cdist(truths, guesses, compute_mode="donot_use_mm_for_euclid_dist").square()
    rows, columns = linear_sum_assignment(cost.numpy())
    found[rows] = usable.numpy()[columns]
    return found


def align(reconstructions: Tensor, originals: Tensor) -> tuple[Tensor, int]:
    """(N, ...) reconstructions in the order of the originals, and how many are missing (mid-grey there)."""
    found = torch.from_numpy(match(reconstructions, originals))
    aligned = torch.full(originals.shape, MID_GREY, dtype=originals.dtype)
    present = found >= 0
    aligned[present] = reconstructions.detach().cpu()[found[present]].to(originals.dtype)
    return aligned, int((~present).sum())


def fidelity_summary(
    psnr_values: ArrayLike,
    ssim_values: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    rng: np.random.Generator,
) -> dict[str, Measured]:
    """Median "psnr" (dB) and "ssim" with intervals by resampling clusters (the victims' identities).

    Exact copies (infinite PSNR) are counted in ``exact`` and rank above every other image; a median among
    them is a reason instead of a number.
    """
    values = np.asarray(psnr_values, dtype=np.float64)
    exact = int(np.isposinf(values).sum())
    signal = bootstrap_median(values, clusters, draws=draws, rng=rng)
    if signal.value is None and exact and 2 * exact >= len(values):
        why = f"{exact} of {len(values)} reconstructions are exact copies: the median PSNR is infinite"
        signal = Measured.unsupported(why, signal.n)
    structure = bootstrap_median(ssim_values, clusters, draws=draws, rng=rng)
    return {"psnr": dataclasses.replace(signal, exact=exact), "ssim": structure}


def _blur(images: Tensor) -> Tensor:
    """Gaussian window over (B, C, H, W), inside the image only; separable, channel by channel."""
    offset = torch.arange(_WINDOW, dtype=images.dtype) - _WINDOW // 2
    taps = torch.exp(-(offset**2) / (2 * _SIGMA**2))
    taps = taps / taps.sum()
    planes = images.reshape(-1, 1, *images.shape[-2:])
    planes = F.conv2d(F.conv2d(planes, taps.view(1, 1, -1, 1)), taps.view(1, 1, 1, -1))
    return planes.reshape(*images.shape[:2], *planes.shape[-2:])


def _float64_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    if x.shape != y.shape or x.ndim < 2:
        raise UsageError(f"images to compare must have one shape (B, ...), got {tuple(x.shape)} and {tuple(y.shape)}")
    return _float64(x), _float64(y)


def _float64(images: Tensor) -> Tensor:
    return cast(Tensor, images.detach().to("cpu", torch.float64))
