"""Paired differences: the same people, the same victims and the same seeds under two treatments.

What the two share (hard faces, a lucky seed) cancels, so that a difference is known far better than either value. Utility is
paired by the draws that each run keeps (`eval.recognition.verified`), attacks by their samples, one a target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtri

from eval.results import Cell, Entry, RunResult, headline_metric
from eval.statistics import (
    CONFIDENCE,
    DRAWS,
    Floats,
    Ints,
    Measured,
    bootstrap_paired,
    cluster_index,
    over_seeds,
    statistic_draws,
)
from fedgc.errors import UsageError

FEW = 20  # people below whom the coverage of these intervals was not checked
HITS = {"rank1": ("rank", 1), "rank5": ("rank", 5)}  # metric: (sample column, the greatest that counts)
VALUES = {  # metric: (sample column, statistic)
    "psnr_gain": ("psnr_gain", "median"), "psnr": ("psnr", "median"), "embedding_cosine": ("cosine", "mean"),
    "identity_similarity": ("similarity", "mean"), "label_accuracy": ("named", "mean"),
}  # fmt: skip
RATES = (*HITS, "label_accuracy")


@dataclass(frozen=True)
class Difference:
    """What changed in ``metric``: value and interval, each seed's own value apart."""

    metric: str
    measured: Measured
    seeds: tuple[float, ...] = ()

    @property
    def told(self) -> bool:
        """Whether the interval leaves zero out."""
        m = self.measured
        return m.low is not None and m.high is not None and (m.low > 0 or m.high < 0)


@dataclass(frozen=True)
class Pair:
    """Two runs of one seed on the same targets: values of each (n,), and the person of each target (n,)."""

    a: Floats
    b: Floats
    people: Ints


def paired_rate(a: ArrayLike, b: ArrayLike) -> Measured:
    """Difference of two success rates on the same n targets, each of another person: (n,) bool each.

    Newcombe 1998 (Statistics in Medicine 17:2635), method 10: Wilson's limits of both rates, joined by their correlation.
    Unlike a bootstrap it keeps a width where all targets agree. Raises UsageError for unequal lengths.
    """
    first, second = np.asarray(a, dtype=bool), np.asarray(b, dtype=bool)
    if first.shape != second.shape or first.ndim != 1:
        raise UsageError(f"a paired difference needs equal lengths, got {first.shape} and {second.shape}")
    n = len(first)
    if not n:
        return Measured.unsupported("no target in common", 0)
    both, neither = int((first & second).sum()), int((~first & ~second).sum())
    only_a, only_b = int((first & ~second).sum()), int((~first & second).sum())
    (p, below_a, above_a), (q, below_b, above_b) = (_wilson(int(x.sum()), n) for x in (first, second))
    product = math.sqrt((both + only_a) * (only_b + neither) * (both + only_b) * (only_a + neither))
    excess = both * neither - only_a * only_b
    phi = (max(excess - n / 2, 0.0) if excess > 0 else excess) / product if product else 0.0
    down, up = p - below_a, above_b - q
    low = p - q - math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    down, up = q - below_b, above_a - p
    high = p - q + math.sqrt(max(0.0, down**2 - 2 * phi * down * up + up**2))
    return Measured(p - q, max(-1.0, low), min(1.0, high), n)


def _wilson(successes: int, n: int) -> tuple[float, float, float]:
    """The rate and Wilson's limits of it."""
    z = float(ndtri((1 + CONFIDENCE) / 2))
    p = successes / n
    centre, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    return p, (centre - half) / (1 + z**2 / n), (centre + half) / (1 + z**2 / n)


def utility_difference(a: Cell, b: Cell, metric: str, *, rng: np.random.Generator) -> Difference:
    """Utility of a less that of b, on the same draws of the same people; seeds and people are resampled together."""
    values, draws, people = [], [], 0
    for one, other in _seeds(a, b):
        x, y = one.utility(metric), other.utility(metric)
        of_one, of_other = (run.draws().get(f"trained/{metric}") for run in (one, other))
        if _none(x) or _none(y) or of_one is None or of_other is None or not _same_test(one, other):
            continue
        assert x is not None and y is not None  # noqa: PT018
        values.append(float(x["value"] - y["value"]))
        draws.append(of_one - of_other)
        people = int(x["n"])
    if not values:
        why = "not the same test people and seed, or a run that kept no draws of people"
        return Difference(metric, Measured.unsupported(why))
    return Difference(metric, _noted(over_seeds(values, draws, people, rng)), tuple(values) if len(values) > 1 else ())


def attack_difference(a: Cell, b: Cell, attack: str, seat: str, *, rng: np.random.Generator) -> Difference | None:
    """What an attack got under a less what it got under b, on the same targets. None where either has no figure."""
    found = [
        (one, other, x, y)
        for one, other in _seeds(a, b)
        if (x := one.leading(attack, seat)) and (y := other.leading(attack, seat)) and not x["refused"] and not y["refused"]
    ]  # fmt: skip
    metric = headline_metric(found[0][2]) if found else None
    if metric is None:
        return None
    pairs = [p for one, other, x, y in found if (p := _pair(one, other, x, y, metric)) is not None]
    if not pairs:
        return Difference(metric, Measured.unsupported("not the same victims, or nothing kept of each target"))
    measured = _measured(pairs, metric, rng)
    values = tuple(_statistic(p.a, metric) - _statistic(p.b, metric) for p in pairs)
    return Difference(metric, measured, values if len(values) > 1 else ())


def _seeds(a: Cell, b: Cell) -> list[tuple[RunResult, RunResult]]:
    by_seed = {run.seed: run for run in b.runs}
    return [(run, by_seed[run.seed]) for run in a.runs if run.seed in by_seed]


def _same_test(one: RunResult, other: RunResult) -> bool:
    splits = [{k: (run.about.get("splits") or {}).get(k) for k in ("test", "calibration")} for run in (one, other)]
    return splits[0] == splits[1] and None not in splits[0].values()


def _pair(one: RunResult, other: RunResult, x: Entry, y: Entry, metric: str) -> Pair | None:
    """The targets that two entries have in common; None where they are not comparable."""
    alike = all(x.get(key) == y.get(key) for key in ("round", "batch_size", "local_steps"))
    same = [run.about.get("victims") for run in (one, other)]
    splits = [(run.about.get("splits") or {}).get("train") for run in (one, other)]
    if not alike or same[0] != same[1] or splits[0] != splits[1] or metric not in (*HITS, *VALUES):
        return None
    steps = x.get("batch_size") is not None
    left, right = (_samples(run.samples(e), metric, steps) for run, e in ((one, x), (other, y)))
    keys = [key for key in left if key in right]
    if not keys:
        return None
    a, b = (np.array([side[key] for key in keys], dtype=np.float64) for side in (left, right))
    return Pair(a, b, np.array([key[1] for key in keys], dtype=np.int64))


def _samples(samples: Sequence[Mapping[str, Any]], metric: str, steps: bool) -> dict[tuple[int, int], float]:
    """Value of each target: of a recorded step by its number and person, else by person."""
    column, limit = HITS.get(metric, (VALUES.get(metric, ("", ""))[0], None))
    out = {}
    for sample in samples:
        value = sample.get(column)
        if value is not None:
            key = (int(sample["target"]) if steps else 0, int(sample["class"]))
            out[key] = float(value <= limit) if limit is not None else float(value)
    return out


def _statistic(values: Floats, metric: str) -> float:
    return float(np.median(values) if VALUES.get(metric, ("", "mean"))[1] == "median" else np.mean(values))


def _measured(pairs: Sequence[Pair], metric: str, rng: np.random.Generator) -> Measured:
    people = max(len(np.unique(p.people)) for p in pairs)
    if people < 2:
        return Measured.unsupported("one person only: no interval", people)
    statistic = VALUES.get(metric, ("", "mean"))[1]
    if len(pairs) == 1:
        [p] = pairs
        if metric in RATES and people == len(p.people):
            return _noted(paired_rate(p.a > 0.5, p.b > 0.5))
        found = bootstrap_paired(p.a, p.b, p.people, statistic=statistic, rng=rng)  # type: ignore[arg-type]
        return _noted(_widened(found) if metric in RATES else found)
    values = [_statistic(p.a, metric) - _statistic(p.b, metric) for p in pairs]
    draws = [statistic_draws(statistic, (p.a, p.b), cluster_index(len(p.a), p.people), DRAWS, rng) for p in pairs]
    found = over_seeds(values, draws, people, rng)
    return _noted(_widened(found) if metric in RATES else found)


def _widened(found: Measured) -> Measured:
    """A difference of rates that n people agree on: who would not agree shows up with a probability of 97.5 % if their share is
    above 1 - 0.025^(1/n), and could move it that far."""
    if found.value is None or found.low != found.high:
        return found
    share = 1 - ((1 - CONFIDENCE) / 2) ** (1 / found.n)
    return replace(found, low=found.value - share * (1 + found.value), high=found.value + share * (1 - found.value))


def _noted(measured: Measured) -> Measured:
    few = measured.value is not None and measured.n < FEW
    return replace(measured, note=f"indicative: {measured.n} people") if few else measured


def _none(value: Mapping[str, Any] | None) -> bool:
    return value is None or value.get("value") is None
