"""Scores of all pairs of images and the step functions over them: FMR, FNMR, AUC, EER, TAR at a threshold.

Similarity is the cosine; a pair matches if s >= t. Rates are identity-balanced: genuine rates are means over
identities, impostor rates means over pairs of identities. Rates are step functions, never interpolated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.sparse import csr_array

from eval.statistics import Floats, Ints
from fedgc.errors import UsageError, WorkFailedError

Array = NDArray[np.float64] | NDArray[np.float32] | torch.Tensor
_Scalar = TypeVar("_Scalar", bound=np.generic)

_DECIMALS = 10  # embeddings are float32: cosines closer than this are ties, whatever the order of summation
_CHUNK = 64  # draws at once
_SLACK = 1e-9  # relative; a rate equal to its target but for rounding meets it


@dataclass(frozen=True)
class PairScores:
    """Cosine similarity of all pairs of images, and the identities behind each; memory grows with images^2.

    genuine (m,) ascending, genuine_identity (m,); impostor (n,) descending, impostor_pair (n,) the position
    of its two identities in the upper triangle. genuine_share (K,) and impostor_share (K(K-1)/2,) weigh one
    image pair of that identity or identity pair.
    """

    genuine: Floats
    genuine_identity: Ints
    impostor: Floats
    impostor_pair: Ints
    genuine_share: Floats
    impostor_share: Floats
    identities: int
    images: int

    @classmethod
    def from_embeddings(cls, embeddings: Array, labels: ArrayLike, *, balanced: bool = True) -> PairScores:
        """Score embeddings (N, d) of people ``labels`` (N,); unbalanced, every image pair weighs the same."""
        units, person = unit(embeddings), person_index(labels)
        if len(units) != len(person):
            raise UsageError(f"{len(units)} embeddings but {len(person)} labels; pass one label for each embedding")
        sizes = np.bincount(person)
        count = len(sizes)
        left, right = np.triu_indices(len(units), 1)
        scores = cosine(units, units)[left, right]
        a, b = np.minimum(person[left], person[right]), np.maximum(person[left], person[right])
        same = a == b
        up, down = np.argsort(scores[same]), np.argsort(-scores[~same])
        pair = (a * (2 * count - a - 1) // 2 + b - a - 1)[~same]  # position in np.triu_indices(count, 1)
        first, second = np.triu_indices(count, 1)
        own = np.maximum(sizes * (sizes - 1) / 2, 1)
        return cls(
            scores[same][up],
            a[same][up],
            scores[~same][down],
            pair[down],
            1 / own if balanced else np.ones(count),
            1 / (sizes[first] * sizes[second]) if balanced else np.ones(len(first)),
            count,
            len(units),
        )

    @property
    def identity_pairs(self) -> int:
        return self.identities * (self.identities - 1) // 2

    def pair_weights(self, weights: Ints) -> Floats:
        """(D, pairs) w_a w_b: an identity drawn twice is never an impostor of itself."""
        first, second = np.triu_indices(self.identities, 1)
        return (weights[:, first] * weights[:, second]).astype(np.float64)

    @property
    def why_not(self) -> str | None:
        """Why these scores support no error rate with an interval, or None."""
        if self.identities < 2:
            return "one identity only: no impostor pairs"
        if len(np.unique(self.genuine_identity)) < 2:
            return "fewer than two identities have a second image: no interval for genuine pairs"
        return None

    def fmr(self, threshold: float) -> float:
        """False match rate: share of impostor scores >= threshold; `UsageError` without impostor pairs."""
        return _share(self.impostor >= threshold, self.impostor_share[self.impostor_pair], "impostor")

    def fnmr(self, threshold: float) -> float:
        """False non-match rate: share of genuine scores < threshold; `UsageError` without genuine pairs."""
        return _share(self.genuine < threshold, self.genuine_share[self.genuine_identity], "genuine")

    def thresholds(self, targets: Sequence[float], weights: Ints | None = None) -> Floats:
        """(D, targets) for each draw the smallest threshold with FMR <= target, just above an impostor score.

        NaN where a draw has no impostors.
        """
        draws = _once(self.identities) if weights is None else weights
        goals = np.asarray(targets, dtype=np.float64) * (1 + _SLACK)
        totals = np.bincount(self.impostor_pair, minlength=self.identity_pairs) * self.impostor_share
        head = int(2 * goals.max() * len(self.impostor)) + 1  # nearly always enough; all scores otherwise
        result = np.full((len(draws), len(goals)), np.nan)
        pair_weights = (weight for chunk in chunks(draws) for weight in self.pair_weights(chunk))
        for row, weight in enumerate(pair_weights):
            total = weight @ totals
            if total == 0:
                continue
            for size in (head, len(self.impostor)):
                mass = np.cumsum((weight * self.impostor_share)[self.impostor_pair[:size]])
                if mass[-1] > goals.max() * total:
                    break
            beyond = np.searchsorted(mass, goals * total, side="right")
            inside = beyond < len(mass)
            result[row, ~inside] = -np.inf  # every impostor may match
            result[row, inside] = np.nextafter(self.impostor[beyond[inside]], np.inf)
        return result

    @cached_property
    def _levels(self) -> Floats:
        """(L,) distinct genuine scores; where an impostor lies between two of them matters not."""
        return np.unique(self.genuine)

    @cached_property
    def _genuine_mass(self) -> csr_array:
        """(L, K) mass of each identity's genuine pairs at each level."""
        rows = np.searchsorted(self._levels, self.genuine)
        entries = (self.genuine_share[self.genuine_identity], (rows, self.genuine_identity))
        return csr_array(entries, shape=(len(self._levels), self.identities))

    @cached_property
    def _impostor_mass(self) -> csr_array:
        """(2L+1, pairs) mass of each identity pair below level 0, at it, up to level 1, at level 1, ..."""
        levels = self._levels
        rows = np.searchsorted(levels, self.impostor) + np.searchsorted(levels, self.impostor, "right")
        entries = (self.impostor_share[self.impostor_pair], (rows, self.impostor_pair))
        return csr_array(entries, shape=(2 * len(self._levels) + 1, self.identity_pairs))

    def curve(self, weights: Ints | None = None) -> Curve:
        """Error rates around every genuine score, for each of the identity draws (D, K)."""
        draws = _once(self.identities) if weights is None else weights
        genuine = np.cumsum(self._genuine_mass @ draws.T.astype(np.float64), axis=0)
        impostor = np.cumsum(self._impostor_mass @ self.pair_weights(draws).T, axis=0)
        with np.errstate(invalid="ignore"):  # a draw without genuine or impostor pairs is NaN throughout
            return Curve(self._levels, genuine / genuine[-1], impostor / impostor[-1])


@dataclass(frozen=True)
class Curve:
    """Cumulative shares for D draws: genuine (L, D) up to each of the levels (L,), impostor (2L+1, D) up to
    below the first level, at it, between it and the next, and so on."""

    levels: Floats
    genuine: Floats
    impostor: Floats

    def auc(self) -> Floats:
        """(D,) P(genuine > impostor) + P(tie)/2."""
        steps = np.diff(self.genuine, axis=0, prepend=0.0)
        return (steps * (self.impostor[0:-1:2] + self.impostor[1::2])).sum(axis=0) / 2

    def eer(self) -> Floats:
        """(D,) where the step ROC crosses FMR = FNMR: the midpoint of the two bracketing rates."""
        fnmr_at = np.concatenate([np.zeros_like(self.genuine[:1]), self.genuine[:-1]])
        fmr = 1 - np.concatenate([self.impostor[0:-1:2], self.impostor[1::2]])  # thresholds at, then just above, levels
        fnmr = np.concatenate([fnmr_at, self.genuine])
        return (np.minimum(fmr, fnmr).max(axis=0) + np.maximum(fmr, fnmr).min(axis=0)) / 2

    def tar(self, thresholds: Floats) -> Floats:
        """(D,) true accept rate of each draw at its own threshold (D,)."""
        below = np.searchsorted(self.levels, thresholds, side="left")
        missed = np.where(below > 0, self.genuine[below - 1, np.arange(len(thresholds))], 0.0)
        return np.where(np.isnan(thresholds), np.nan, 1 - missed)


def support(target: float, identities: int, where: str) -> tuple[str | None, str | None]:
    """(why refused, note if indicative): FAR = target needs 3/target identity pairs, in full 30/target."""
    pairs = identities * (identities - 1) // 2
    if pairs * target * (1 + _SLACK) >= 30:
        return None, None
    text = f"{pairs} identity pairs in the {where} set ({identities} identities)"
    if pairs * target * (1 + _SLACK) >= 3:
        return None, f"indicative: {text}, {round(30 / target)} wanted for FAR {target:g}"
    return f"not supported: {text}, at least {round(3 / target)} needed for FAR {target:g}", None


def _share(chosen: NDArray[np.bool_], mass: Floats, kind: str) -> float:
    if not len(mass):
        raise UsageError(f"no {kind} pairs: give at least two identities, and two images of one")
    return float(mass[chosen].sum() / mass.sum())


def _once(identities: int) -> Ints:
    return np.ones((1, identities), dtype=np.int64)


def matrix(embeddings: Array) -> Floats:
    raw = embeddings.detach().cpu().numpy() if isinstance(embeddings, torch.Tensor) else embeddings
    rows = np.asarray(raw, dtype=np.float64)
    if rows.ndim != 2 or not rows.size:
        raise UsageError(f"embeddings must be a non-empty (images, dimensions) array, got shape {rows.shape}")
    return rows


def unit(embeddings: Array) -> Floats:
    """Rows of length one; a zero row stays zero and is similar to nothing."""
    rows = matrix(embeddings)
    if not np.isfinite(rows).all():
        raise WorkFailedError("embeddings contain NaN or infinity: the model diverged; lower the learning rate")
    return rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def cosine(a: Floats, b: Floats) -> Floats:
    return np.round(a @ b.T, _DECIMALS)


def person_index(labels: ArrayLike) -> Ints:
    """Labels of any kind as identity numbers 0..K-1."""
    raw = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if raw.ndim != 1:
        raise UsageError(f"labels must be one-dimensional, got shape {raw.shape}")
    return np.unique(raw, return_inverse=True)[1].astype(np.int64)


def chunks(rows: NDArray[_Scalar]) -> Iterator[NDArray[_Scalar]]:
    return (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))
