"""Measured values with 95 % intervals.

Faces of one person are not independent, so what is resampled is the person (or the victim batch), never the
pair or the photo: every bootstrap here draws whole clusters.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import beta

from fedgc.errors import UsageError

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

CONFIDENCE = 0.95
DRAWS = 2000
Z95 = 1.959964  # standard normal, 97.5 %
_BLOCK = 4_000_000  # numbers held at once by a bootstrap: 32 MB


@dataclass(frozen=True)
class Measured:
    """A value with its 95 % interval, or no value and the reason ("why").

    ``n`` is what was resampled (identities, victims, trials). ``high`` alone may be None: the interval is
    then open upwards, and ``note`` says so. ``note`` also marks indicative support. ``far`` is the realised
    false match rate of an operating point, ``exact`` the number of reconstructions equal to their original,
    ``ceiling`` what no attack on the same release can exceed.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int
    why: str | None = None
    chance: float | None = None
    note: str | None = None
    far: float | None = None
    exact: int | None = None
    ceiling: float | None = None

    def __post_init__(self) -> None:
        if (self.value is None) != (self.why is not None):
            raise ValueError("a measured value has either a value or a reason why there is none")
        numbers = (self.value, self.low, self.high, self.chance, self.far, self.ceiling)
        if any(number is not None and not math.isfinite(number) for number in numbers):
            raise ValueError(f"a measured value must be finite, got {numbers}")

    @classmethod
    def unsupported(cls, why: str, n: int = 0, chance: float | None = None, **more: Any) -> Measured:
        """No value, because the data do not support one."""
        return cls(None, None, None, n, why, chance, **more)

    def to_json(self) -> dict[str, float | int | str | None]:
        """``value``, ``low``, ``high``, ``n`` always (null where unsupported); the other fields where set."""
        always = ("value", "low", "high", "n")
        pairs = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in pairs if name in always or value is not None}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Measured:
        """The inverse of `to_json`; keys that are not fields are an error."""
        try:
            return cls(**entry)
        except (TypeError, ValueError) as error:
            raise UsageError(f"not a measured value: {dict(entry)!r} ({error}); expected value, low, high, n") from None


def clopper_pearson(successes: int, n: int, confidence: float = CONFIDENCE, *, chance: float | None = None) -> Measured:
    """Exact binomial interval of ``successes`` in ``n`` independent trials (Clopper & Pearson 1934)."""
    if not 0 <= successes <= n:
        raise UsageError(f"{successes} successes in {n} trials is impossible; pass 0 <= successes <= n")
    if n == 0:
        return Measured.unsupported("no trials", 0, chance)
    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, successes, n - successes + 1)) if successes else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return Measured(successes / n, low, high, n, chance=chance)


def identity_weights(n_identities: int, draws: int, rng: np.random.Generator) -> Ints:
    """(draws, n_identities) bootstrap counts: how often each identity is drawn; rows sum to n_identities."""
    return rng.multinomial(n_identities, np.full(n_identities, 1 / n_identities), size=draws)


def percentile_interval(value: float, draws: ArrayLike, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Percentile bootstrap interval, widened where needed to contain ``value``; NaN draws are left out.

    Order statistics are not interpolated, so that infinite draws (the PSNR of an exact copy) stay meaningful.
    """
    kept = np.asarray(draws, dtype=np.float64)
    kept = kept[~np.isnan(kept)]
    if not len(kept):
        raise UsageError("no bootstrap draw is defined; more identities are needed")
    tail = (1 - confidence) / 2
    low = float(np.quantile(kept, tail, method="lower"))
    high = float(np.quantile(kept, 1 - tail, method="higher"))
    return min(low, value), max(high, value)


def rate_interval(value: float, draws: ArrayLike, n: int) -> tuple[float, float]:
    """Percentile interval of a rate in [0, 1] over ``n`` identities, honest at the ends.

    Resampling n faultless identities never shows a fault. A mean m of values in [0, 1] shows n ones with
    probability at most m^n, so at exactly 0 or 1 the Clopper-Pearson end for n trials holds, and the wider of
    the two is taken.
    """
    low, high = percentile_interval(value, draws)
    if value in (0.0, 1.0):
        exact = clopper_pearson(round(value) * n, n)
        assert exact.low is not None
        assert exact.high is not None
        low, high = min(low, exact.low), max(high, exact.high)
    return low, high


def measured_rate(
    value: float, samples: ArrayLike, n: int, *, chance: float, note: str | None = None, far: float | None = None
) -> Measured:
    """A rate of n identities, made of shares, with `rate_interval` of its draws, inside [0, 1]."""
    rounded = float(np.round(value, 12))  # a sum of shares that should be exactly 0 or 1 is
    low, high = rate_interval(rounded, samples, n)
    return Measured(rounded, max(0.0, low), min(1.0, high), n, chance=chance, note=note, far=far)


def bootstrap_mean(
    values: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = DRAWS, rng: np.random.Generator
) -> Measured:
    """Mean of ``values`` (n,), interval by resampling whole clusters; ``clusters`` (n,) labels, if any."""
    return _bootstrap("mean", [_vector(values)], clusters, draws, rng)


def bootstrap_median(
    values: ArrayLike, clusters: ArrayLike | None = None, *, draws: int = DRAWS, rng: np.random.Generator
) -> Measured:
    """Median of ``values`` (n,), as `bootstrap_mean`. Values may be +inf as long as the median is not."""
    return _bootstrap("median", [_vector(values, allow_inf=True)], clusters, draws, rng)


def bootstrap_paired(
    a: ArrayLike,
    b: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    statistic: Literal["mean", "median"] = "mean",
    draws: int = DRAWS,
    rng: np.random.Generator,
) -> Measured:
    """statistic(a) - statistic(b) for two treatments of the same victims: both see the same draws."""
    pair = [_vector(a), _vector(b)]
    if len(pair[0]) != len(pair[1]):
        raise UsageError(f"a paired difference needs equal lengths, got {len(pair[0])} and {len(pair[1])}")
    return _bootstrap(statistic, pair, clusters, draws, rng)


def over_seeds(values: Sequence[float], draws: Sequence[ArrayLike], n: int, rng: np.random.Generator) -> Measured:
    """Mean of the values of several seeds, (seed, person) resampled together: each draw takes as many seeds, with replacement,
    and of each its draw of people. values: one a seed; draws: (draws,) of each; n: people of a seed.

    S seeds show (S - 1)/S of the variance between seeds, which is made up for. Where seeds hardly differ, the chance of who is
    in the test is counted twice, and the interval is wide (by simulation: 98 % of five seeds hold the truth).
    """
    stacked = np.stack([np.asarray(d, dtype=np.float64) for d in draws])
    chosen = rng.integers(0, len(stacked), size=stacked.shape)
    value = float(np.mean(values))
    samples = np.take_along_axis(stacked, chosen, axis=0).mean(axis=0)
    count = len(stacked)
    samples = value + math.sqrt(count / max(1, count - 1)) * (samples - value)
    low, high = percentile_interval(value, samples)
    return Measured(value, low, high, n)


def mean_of_seeds(values: Sequence[float], lows: Sequence[float], highs: Sequence[float]) -> tuple[float, float]:
    """The interval of a mean over seeds from the interval of each, where no draws were kept.

    The seeds' victims may be the same people: their half-widths are averaged, not shortened by the number of seeds. What differs
    between seeds is added to that, independent, and so counted in part twice: the interval is wide rather than narrow.
    Within [0, 1] where all of the intervals are.
    """
    v, low, high = (np.asarray(x, dtype=np.float64) for x in (values, lows, highs))
    between = Z95 * float(v.std(ddof=1)) / math.sqrt(len(v)) if len(v) > 1 else 0.0
    below = float(v.mean()) - math.hypot(float((v - low).mean()), between)
    above = float(v.mean()) + math.hypot(float((high - v).mean()), between)
    return (max(0.0, below) if (low >= 0).all() else below), (min(1.0, above) if (high <= 1).all() else above)


def rate(
    hits: ArrayLike,
    clusters: ArrayLike | None = None,
    *,
    chance: float | None = None,
    draws: int = DRAWS,
    rng: np.random.Generator | None = None,
) -> Measured:
    """Share of ``hits`` (n,) bool: Clopper-Pearson, or a cluster bootstrap where targets share clusters."""
    hit = np.asarray(hits, dtype=bool)
    label = cluster_index(len(hit), clusters)
    n = int(label.max()) + 1 if len(hit) else 0
    if n == len(hit):
        return clopper_pearson(int(hit.sum()), n, chance=chance)
    if n < 2:
        return Measured.unsupported(f"all {len(hit)} targets are of one cluster: no interval", n, chance)
    if rng is None:
        raise UsageError("targets share clusters: pass rng= for the cluster bootstrap")
    value = float(hit.mean())
    samples = statistic_draws("mean", [hit.astype(np.float64)], label, draws, rng)
    return Measured(value, *rate_interval(value, samples, n), n, chance=chance)


def _bootstrap(
    statistic: str, columns: list[Floats], clusters: ArrayLike | None, draws: int, rng: np.random.Generator
) -> Measured:
    size = len(columns[0])
    label = cluster_index(size, clusters)
    if not size:
        return Measured.unsupported("no values", 0)
    n = int(label.max()) + 1
    centre = np.mean if statistic == "mean" else np.median
    value = float(centre(columns[0])) - (float(centre(columns[1])) if len(columns) == 2 else 0.0)
    if not math.isfinite(value):
        return Measured.unsupported(f"the {statistic} is not finite", n)
    if n < 2:
        return Measured.unsupported(f"one cluster only (observed {value:.4g}): no interval", n)
    low, high = percentile_interval(value, statistic_draws(statistic, columns, label, draws, rng))
    if math.isinf(high):
        return Measured(value, low, None, n, note="the interval is open upwards")
    return Measured(value, low, high, n)


def statistic_draws(
    statistic: str, columns: Sequence[Floats], label: Ints, draws: int, rng: np.random.Generator
) -> Floats:
    """(draws,) the statistic of the first column, less that of the second if there is one."""
    draw = _mean_draws if statistic == "mean" else _median_draws
    blocks = []
    for weights in weight_blocks(int(label.max()) + 1, draws, rng, width=len(label)):
        parts = [draw(column, weights, label) for column in columns]
        blocks.append(parts[0] - parts[1] if len(parts) == 2 else parts[0])
    return np.concatenate(blocks)


def weight_blocks(n: int, draws: int, rng: np.random.Generator, width: int) -> Iterator[Ints]:
    """`identity_weights` of all draws in blocks small enough that (block, width) numbers fit in memory."""
    weights = identity_weights(n, draws, rng)
    step = max(1, _BLOCK // max(1, width))
    for start in range(0, draws, step):
        yield weights[start : start + step]


def _mean_draws(values: Floats, weights: Ints, label: Ints) -> Floats:
    sums, sizes = np.bincount(label, weights=values), np.bincount(label)
    return (weights @ sums) / (weights @ sizes)


def _median_draws(values: Floats, weights: Ints, label: Ints) -> Floats:
    order = np.argsort(values)
    ranked = values[order]
    upto = np.cumsum(weights[:, label[order]], axis=1)
    total = upto[:, -1:]
    lower = ranked[np.argmax(upto > (total - 1) // 2, axis=1)]
    upper = ranked[np.argmax(upto > total // 2, axis=1)]
    return (lower + upper) / 2


def _vector(values: ArrayLike, *, allow_inf: bool = False) -> Floats:
    vector = np.asarray(values, dtype=np.float64)
    if vector.ndim != 1:
        raise UsageError(f"values must be one-dimensional, got shape {vector.shape}")
    if np.isnan(vector).any() or np.isneginf(vector).any() or (not allow_inf and np.isinf(vector).any()):
        raise UsageError("values contain NaN or infinity; count failures separately before averaging")
    return vector


def cluster_index(size: int, clusters: ArrayLike | None) -> Ints:
    """(size,) cluster numbers 0..n-1."""
    if clusters is None:
        return np.arange(size)
    labels = np.asarray(clusters)
    if labels.shape != (size,):
        raise UsageError(f"clusters must name one cluster for each of the {size} values, got shape {labels.shape}")
    return np.unique(labels, return_inverse=True)[1].astype(np.int64)
