"""Verification and identification from embeddings, with intervals by resampling people.

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

from eval.statistics import (
    DRAWS,
    Floats,
    Ints,
    Measured,
    identity_weights,
    percentile_interval,
    rate,
    rate_interval,
    weight_blocks,
)
from fedgc.errors import UsageError, WorkFailedError

Array = NDArray[np.float64] | NDArray[np.float32] | torch.Tensor
_Scalar = TypeVar("_Scalar", bound=np.generic)

FAR_TARGETS = (0.1, 0.01)
_DECIMALS = 10  # embeddings are float32: cosines closer than this are ties, whatever the order of summation
_SLACK = 1e-9  # relative; a rate equal to its target but for rounding meets it
_CHUNK = 64  # draws at once
_FEW = 20  # below this many identities the coverage of the bootstrap has not been checked


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
        units, person = _unit(embeddings), _person(labels)
        if len(units) != len(person):
            raise UsageError(f"{len(units)} embeddings but {len(person)} labels; pass one label for each embedding")
        sizes = np.bincount(person)
        count = len(sizes)
        left, right = np.triu_indices(len(units), 1)
        scores = _cosine(units, units)[left, right]
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
        pair_weights = (weight for chunk in _chunks(draws) for weight in self.pair_weights(chunk))
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


def verification(
    test_embeddings: Array,
    test_labels: ArrayLike,
    calib_embeddings: Array,
    calib_labels: ArrayLike,
    *,
    draws: int = DRAWS,
    rng: np.random.Generator,
) -> dict[str, Measured | int]:
    """Utility on people never trained on: "auc", "eer", "tar@far=0.1", "tar@far=0.01", "rank1" (`Measured`),
    "identities", "images".

    Thresholds come from the calibration set and both sets are resampled, by identity. Raises `UsageError` for
    malformed input and `WorkFailedError` for embeddings that are not finite (a diverged model).
    """
    test = PairScores.from_embeddings(test_embeddings, test_labels)
    calib = PairScores.from_embeddings(calib_embeddings, calib_labels)
    n = test.identities
    result: dict[str, Measured | int] = {}
    why = test.why_not
    if why:
        result |= {name: Measured.unsupported(why, n) for name in ("auc", "eer", *map(_tar_name, FAR_TARGETS))}
    else:
        result |= _verification_rates(test, calib, draws, rng)
    result["rank1"] = closed_set_rank1(test_embeddings, test_labels, draws=draws, rng=rng)
    return result | {"identities": n, "images": test.images}


def _verification_rates(
    test: PairScores, calib: PairScores, draws: int, rng: np.random.Generator
) -> dict[str, Measured]:
    n = test.identities
    weights = identity_weights(n, draws, rng)
    limits = calib.thresholds(FAR_TARGETS, identity_weights(calib.identities, draws, rng))
    limit = calib.thresholds(FAR_TARGETS)[0]
    rows = []
    for chunk, chunk_limits in zip(_chunks(weights), _chunks(limits), strict=True):
        curve = test.curve(chunk)
        rows.append(np.stack([curve.auc(), curve.eer(), *(curve.tar(column) for column in chunk_limits.T)]))
    auc, eer, *tars = np.concatenate(rows, axis=1)
    whole = test.curve()
    note = f"indicative: {n} identities" if n < _FEW else None
    result = {
        "auc": _rate(float(whole.auc()[0]), auc, n, chance=0.5, note=note),
        "eer": _rate(float(whole.eer()[0]), eer, n, chance=0.5, note=note),
    }
    for column, target in enumerate(FAR_TARGETS):
        verdicts = support(target, calib.identities, "calibration"), support(target, n, "test")
        refusal = next((refused for refused, _ in verdicts if refused), None)
        if refusal:
            result[_tar_name(target)] = Measured.unsupported(refusal, n, target)
            continue
        note = "; ".join(remark for _, remark in verdicts if remark) or None
        value, far = 1 - test.fnmr(limit[column]), test.fmr(limit[column])
        result[_tar_name(target)] = _rate(value, tars[column], n, chance=target, note=note, far=far)
    return result


def closed_set_rank1(embeddings: Array, labels: ArrayLike, *, draws: int = DRAWS, rng: np.random.Generator) -> Measured:
    """Identification inside one set: the first photo of each identity is the gallery, the others are probes.

    Identity-balanced share of probes at rank 1, ties broken against the claim; the gallery stays, the people
    who are looked for are resampled. People with one photo are distractors.
    """
    units, person = _unit(embeddings), _person(labels)
    first = np.unique(person, return_index=True)[1]
    probes = np.setdiff1d(np.arange(len(person)), first)
    chance = 1 / len(first)
    if len(first) < 2 or not len(probes):
        return Measured.unsupported("identification needs two people and a second photo of one", 0, chance)
    hit = rank_k(units[probes], units[first], person[probes]) == 1
    looked_for, index = np.unique(person[probes], return_inverse=True)
    shares = np.bincount(index, weights=hit) / np.bincount(index)
    n = len(looked_for)
    samples = identity_weights(n, draws, rng) @ shares / n
    return _rate(float(shares.mean()), samples, n, chance=chance)


def rank_k(queries: Array, gallery: Array, truth: ArrayLike) -> Ints:
    """(Q,) rank of the true mate of each query; 1 is best, ties are broken against the claim.

    queries (Q, d); gallery (G, d) one template a person; truth (Q,) the gallery row of the mate. A query that
    is not finite found nobody: rank G.
    """
    scores, mate, failed = _claim_scores(queries, gallery, truth)
    own = scores[np.arange(len(mate)), mate]
    ranks = (scores >= own[:, None]).sum(axis=1)
    ranks[failed] = scores.shape[1]
    return ranks


def identification(
    ranks: ArrayLike,
    gallery_size: int,
    *,
    ks: Sequence[int] = (1, 5),
    clusters: ArrayLike | None = None,
    draws: int = DRAWS,
    rng: np.random.Generator | None = None,
) -> dict[str, Measured]:
    """ "rank1", "rank5": share of queries whose mate is among the k best, with chance k/G.

    Clopper-Pearson over queries; give ``clusters`` (and ``rng``) where several queries are of one identity.
    """
    rank = np.asarray(ranks)
    if rank.ndim != 1 or (len(rank) and not 1 <= rank.min() <= rank.max() <= gallery_size):
        raise UsageError(f"ranks must be one-dimensional and within 1..{gallery_size}, the gallery size")
    result = {}
    for k in ks:
        if k >= gallery_size:
            why = f"a gallery of {gallery_size} puts everybody among the {k} best"
            result[f"rank{k}"] = Measured.unsupported(why, len(rank), 1.0)
        else:
            result[f"rank{k}"] = rate(rank <= k, clusters, chance=k / gallery_size, draws=draws, rng=rng)
    return result


def linkage_auc(
    queries: Array, gallery: Array, truth: ArrayLike, *, draws: int = DRAWS, rng: np.random.Generator
) -> Measured:
    """AUC of query-mate against query-other cosines; chance .5.

    Shapes as in `rank_k`. Queries are resampled, those of one person together. A query that is not finite has
    cosine 0 with everybody.
    """
    scores, mate, failed = _claim_scores(queries, gallery, truth)
    scores[failed] = 0.0
    people, cluster = np.unique(mate, return_inverse=True)
    n = len(people)
    if n < 2 or scores.shape[1] < 2:
        return Measured.unsupported("linkage needs queries of two people", n, 0.5)
    rows = np.arange(len(mate))
    others = np.sort(np.delete(scores.ravel(), rows * scores.shape[1] + mate).reshape(len(mate), -1), axis=1)
    own = scores[rows, mate]
    wins = np.stack([np.searchsorted(row, own) + np.searchsorted(row, own, "right") for row in others])
    beats = wins.T / (2 * others.shape[1])  # (query, whose impostors)
    members = np.eye(n)[cluster]
    total, sizes = members.T @ beats @ members, members.sum(axis=0)
    samples = []
    for weights in weight_blocks(n, draws, rng, width=n):
        samples.append(((weights @ total) * weights).sum(axis=1) / (weights @ sizes) ** 2)
    return _rate(float(beats.mean()), np.concatenate(samples), n, chance=0.5)


def paired_auc_difference(
    embeddings_a: Array,
    embeddings_b: Array,
    labels: ArrayLike,
    *,
    draws: int = DRAWS,
    rng: np.random.Generator,
) -> Measured:
    """AUC of model a less AUC of model b on the same images; both see the same identity draws."""
    a, b = PairScores.from_embeddings(embeddings_a, labels), PairScores.from_embeddings(embeddings_b, labels)
    if a.why_not:
        return Measured.unsupported(a.why_not, a.identities)
    weights = identity_weights(a.identities, draws, rng)
    samples = np.concatenate([a.curve(w).auc() - b.curve(w).auc() for w in _chunks(weights)])
    value = float(a.curve().auc()[0] - b.curve().auc()[0])
    low, high = percentile_interval(value, samples)
    return Measured(value, low, high, a.identities)


def _claim_scores(queries: Array, gallery: Array, truth: ArrayLike) -> tuple[Floats, Ints, NDArray[np.bool_]]:
    """Cosines (Q, G), the mate's gallery row (Q,), and which queries are not finite (cosine zero)."""
    query, mate = _matrix(queries), np.asarray(truth)
    templates = _unit(gallery)
    if mate.shape != (len(query),) or (len(mate) and not 0 <= mate.min() <= mate.max() < len(templates)):
        raise UsageError(f"truth must hold one row of the gallery (0..{len(templates) - 1}) for each query")
    failed: NDArray[np.bool_] = np.logical_not(np.isfinite(query).all(axis=1))
    return _cosine(_unit(np.where(failed[:, None], 0.0, query)), templates), mate.astype(np.int64), failed


def _rate(
    value: float, samples: Floats, n: int, *, chance: float, note: str | None = None, far: float | None = None
) -> Measured:
    rounded = float(np.round(value, 12))  # a sum of shares that should be exactly 0 or 1 is
    low, high = rate_interval(rounded, samples, n)
    return Measured(rounded, max(0.0, low), min(1.0, high), n, chance=chance, note=note, far=far)


def _share(chosen: NDArray[np.bool_], mass: Floats, kind: str) -> float:
    if not len(mass):
        raise UsageError(f"no {kind} pairs: give at least two identities, and two images of one")
    return float(mass[chosen].sum() / mass.sum())


def _tar_name(target: float) -> str:
    return f"tar@far={target:g}"


def _chunks(rows: NDArray[_Scalar]) -> Iterator[NDArray[_Scalar]]:
    return (rows[start : start + _CHUNK] for start in range(0, len(rows), _CHUNK))


def _once(identities: int) -> Ints:
    return np.ones((1, identities), dtype=np.int64)


def _matrix(embeddings: Array) -> Floats:
    raw = embeddings.detach().cpu().numpy() if isinstance(embeddings, torch.Tensor) else embeddings
    matrix = np.asarray(raw, dtype=np.float64)
    if matrix.ndim != 2 or not matrix.size:
        raise UsageError(f"embeddings must be a non-empty (images, dimensions) array, got shape {matrix.shape}")
    return matrix


def _unit(embeddings: Array) -> Floats:
    """Rows of length one; a zero row stays zero and is similar to nothing."""
    matrix = _matrix(embeddings)
    if not np.isfinite(matrix).all():
        raise WorkFailedError("embeddings contain NaN or infinity: the model diverged; lower the learning rate")
    return matrix / np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), np.finfo(np.float64).tiny)


def _cosine(a: Floats, b: Floats) -> Floats:
    return np.round(a @ b.T, _DECIMALS)


def _person(labels: ArrayLike) -> Ints:
    """Labels of any kind as identity numbers 0..K-1."""
    raw = labels.detach().cpu().numpy() if isinstance(labels, torch.Tensor) else np.asarray(labels)
    if raw.ndim != 1:
        raise UsageError(f"labels must be one-dimensional, got shape {raw.shape}")
    return np.unique(raw, return_inverse=True)[1].astype(np.int64)
