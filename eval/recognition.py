"""Verification and identification from embeddings, with intervals by resampling people.

Similarity is the cosine; a pair matches if s >= t. Rates are identity-balanced: genuine rates are means over
identities, impostor rates means over pairs of identities. Rates are step functions, never interpolated.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.pairs import Array, PairScores, chunks, cosine, matrix, person_index, support, unit
from eval.statistics import (
    DRAWS,
    Floats,
    Ints,
    Measured,
    identity_weights,
    measured_rate,
    percentile_interval,
    rate,
    weight_blocks,
)
from fedgc.errors import UsageError

FAR_TARGETS = (0.1, 0.01)
_FEW = 20  # below this many identities the coverage of the bootstrap has not been checked


def verified(
    test_embeddings: Array,
    test_labels: ArrayLike,
    calib_embeddings: Array,
    calib_labels: ArrayLike,
    *,
    draws: int = DRAWS,
    rng: np.random.Generator,
) -> tuple[dict[str, Measured | int], dict[str, Floats]]:
    """Utility on people never trained on: "auc", "eer", "tar@far=0.1", "tar@far=0.01", "rank1" (`Measured`),
    "identities", "images"; and (draws,) what each verification figure is in each draw of people.

    Thresholds come from the calibration set and both sets are resampled, by identity. Which people a draw holds depends on
    ``rng`` and on their numbers alone: two models of the same people and the same generator see the same draws, so that
    the draws' differences are those of paired resampling. Raises `UsageError` for malformed input and `WorkFailedError`
    for embeddings that are not finite (a diverged model).
    """
    test = PairScores.from_embeddings(test_embeddings, test_labels)
    calib = PairScores.from_embeddings(calib_embeddings, calib_labels)
    n = test.identities
    result: dict[str, Measured | int] = {}
    drawn: dict[str, Floats] = {}
    why = test.why_not
    if why:
        result |= {name: Measured.unsupported(why, n) for name in ("auc", "eer", *map(_tar_name, FAR_TARGETS))}
    else:
        measured, drawn = _verification_rates(test, calib, draws, rng)
        result |= measured
    result["rank1"] = closed_set_rank1(test_embeddings, test_labels, draws=draws, rng=rng)
    return result | {"identities": n, "images": test.images}, drawn


def _verification_rates(
    test: PairScores, calib: PairScores, draws: int, rng: np.random.Generator
) -> tuple[dict[str, Measured], dict[str, Floats]]:
    """Each figure, and its draws where it is supported."""
    n = test.identities
    weights = identity_weights(n, draws, rng)
    limits = calib.thresholds(FAR_TARGETS, identity_weights(calib.identities, draws, rng))
    limit = calib.thresholds(FAR_TARGETS)[0]
    rows = []
    for chunk, chunk_limits in zip(chunks(weights), chunks(limits), strict=True):
        curve = test.curve(chunk)
        rows.append(np.stack([curve.auc(), curve.eer(), *(curve.tar(column) for column in chunk_limits.T)]))
    auc, eer, *tars = np.concatenate(rows, axis=1)
    whole = test.curve()
    note = f"indicative: {n} identities" if n < _FEW else None
    result = {
        "auc": measured_rate(float(whole.auc()[0]), auc, n, chance=0.5, note=note),
        "eer": measured_rate(float(whole.eer()[0]), eer, n, chance=0.5, note=note),
    }
    drawn = {"auc": auc, "eer": eer}
    for column, target in enumerate(FAR_TARGETS):
        verdicts = support(target, calib.identities, "calibration"), support(target, n, "test")
        refusal = next((refused for refused, _ in verdicts if refused), None)
        if refusal:
            result[_tar_name(target)] = Measured.unsupported(refusal, n, target)
            continue
        note = "; ".join(remark for _, remark in verdicts if remark) or None
        value, far = 1 - test.fnmr(limit[column]), test.fmr(limit[column])
        result[_tar_name(target)] = measured_rate(value, tars[column], n, chance=target, note=note, far=far)
        drawn[_tar_name(target)] = tars[column]
    return result, drawn


def closed_set_rank1(embeddings: Array, labels: ArrayLike, *, draws: int = DRAWS, rng: np.random.Generator) -> Measured:
    """Identification inside one set: the first photo of each identity is the gallery, the others are probes.

    Identity-balanced share of probes at rank 1, ties broken against the claim; the gallery stays, the people
    who are looked for are resampled. People with one photo are distractors.
    """
    units, person = unit(embeddings), person_index(labels)
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
    return measured_rate(float(shares.mean()), samples, n, chance=chance)


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
    return measured_rate(float(beats.mean()), np.concatenate(samples), n, chance=0.5)


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
    samples = np.concatenate([a.curve(w).auc() - b.curve(w).auc() for w in chunks(weights)])
    value = float(a.curve().auc()[0] - b.curve().auc()[0])
    low, high = percentile_interval(value, samples)
    return Measured(value, low, high, a.identities)


def _claim_scores(queries: Array, gallery: Array, truth: ArrayLike) -> tuple[Floats, Ints, NDArray[np.bool_]]:
    """Cosines (Q, G), the mate's gallery row (Q,), and which queries are not finite (cosine zero)."""
    query, mate = matrix(queries), np.asarray(truth)
    templates = unit(gallery)
    if mate.shape != (len(query),) or (len(mate) and not 0 <= mate.min() <= mate.max() < len(templates)):
        raise UsageError(f"truth must hold one row of the gallery (0..{len(templates) - 1}) for each query")
    failed: NDArray[np.bool_] = np.logical_not(np.isfinite(query).all(axis=1))
    return cosine(unit(np.where(failed[:, None], 0.0, query)), templates), mate.astype(np.int64), failed


def _tar_name(target: float) -> str:
    return f"tar@far={target:g}"
