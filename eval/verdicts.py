"""What an independent judge says of reconstructions: whether they pass for the photo (type I) or for the person (type II).

Success attack rates (SAR) after Mai et al. 2017 (arXiv:1703.00832): a reconstruction succeeds where the judge's cosine with the
very photo (SAR-I), or with another photo of the person (SAR-II), reaches the judge's threshold. Thresholds come from calibration
people, never from targets, and every comparison is of one picture with one photo, as it was there. So an impostor
succeeds at the nominal false match rate (FMR), which is the chance level.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from eval.pairs import Array, PairScores, chunks, cosine, person_index, support
from eval.scoring import Metrics
from eval.statistics import (
    DRAWS,
    Floats,
    Ints,
    Measured,
    bootstrap_mean,
    clopper_pearson,
    identity_weights,
    measured_rate,
    percentile_interval,
)

FMRS = (0.01, 0.001)
STRONG = 0.9  # AUC; the low end of a judge's interval should reach it
WEAK = "a weak judge on such photos: what it does not recognise, a better one may"


@dataclass(frozen=True)
class OperatingPoint:
    """The threshold at one FMR (``far`` in it: the one realised on calibration people), and what it is in each draw of them."""

    threshold: Measured
    draws: Floats


@dataclass(frozen=True)
class JudgeGate:
    """A judge's own accuracy on people whom nobody trained on, measured before it speaks.

    points: by FMR; impostor_mean, impostor_spread: mean and standard deviation of its cosines of different people.
    """

    auc: Measured
    eer: Measured
    tar: Mapping[float, Measured]
    points: Mapping[float, OperatingPoint]
    impostor_mean: float
    impostor_spread: float
    people: int
    photos: int

    def to_json(self) -> dict[str, Any]:
        weak = self.auc.low is None or self.auc.low < STRONG
        return {
            "people": self.people, "photos": self.photos, "auc": self.auc.to_json(), "eer": self.eer.to_json(),
            **{f"tar@fmr={f:g}": m.to_json() for f, m in self.tar.items()},
            "thresholds": {f"fmr={f:g}": p.threshold.to_json() for f, p in self.points.items()},
            "impostor_mean": self.impostor_mean, "impostor_spread": self.impostor_spread, **({"note": WEAK} if weak else {}),
        }  # fmt: skip


def judge_gate(embeddings: Array, people: ArrayLike, *, draws: int = DRAWS, rng: np.random.Generator) -> JudgeGate:
    """Verification of calibration people, embeddings (N, d), and the smallest thresholds with FMR <= 1 % and 0.1 %.

    Rates are identity-balanced step functions (`eval.pairs`). TAR is of the same people as its threshold, and so a little
    kind to the judge. An FMR that the number of people does not support has a reason in place of a threshold.
    """
    scores = PairScores.from_embeddings(embeddings, people)
    n = scores.identities
    if scores.why_not:
        nothing = Measured.unsupported(f"calibration people: {scores.why_not}", n)
        point = OperatingPoint(nothing, np.empty(0))
        return JudgeGate(
            nothing, nothing, dict.fromkeys(FMRS, nothing), dict.fromkeys(FMRS, point), 0.0, 1.0, n, scores.images
        )
    weights = identity_weights(n, draws, rng)
    limits = scores.thresholds(FMRS, weights)
    rows = []
    for part, part_limits in zip(chunks(weights), chunks(limits), strict=True):
        curve = scores.curve(part)
        rows.append(np.stack([curve.auc(), curve.eer(), *(curve.tar(column) for column in part_limits.T)]))
    auc, eer, *tars = np.concatenate(rows, axis=1)
    whole = scores.curve()
    points = {
        f: _point(scores, f, float(t), column)
        for f, t, column in zip(FMRS, scores.thresholds(FMRS)[0], limits.T, strict=True)
    }
    tar = {f: _tar(scores, points[f].threshold, f, samples) for f, samples in zip(FMRS, tars, strict=True)}
    share = scores.impostor_share[scores.impostor_pair]
    mean = float(np.average(scores.impostor, weights=share))
    spread = float(np.sqrt(np.average((scores.impostor - mean) ** 2, weights=share)))
    accuracy, error = (
        measured_rate(float(x[0]), d, n, chance=0.5) for x, d in ((whole.auc(), auc), (whole.eer(), eer))
    )
    return JudgeGate(accuracy, error, tar, points, mean, spread, n, scores.images)


def _point(scores: PairScores, target: float, threshold: float, draws: Floats) -> OperatingPoint:
    refused, note = support(target, scores.identities, "calibration")
    if refused:
        return OperatingPoint(Measured.unsupported(refused, scores.identities), np.empty(0))
    usable = draws[np.isfinite(draws)]
    low, high = percentile_interval(threshold, usable)
    far = scores.fmr(threshold)
    return OperatingPoint(Measured(threshold, low, high, scores.identities, note=note, far=far), usable)


def _tar(scores: PairScores, threshold: Measured, target: float, samples: Floats) -> Measured:
    if threshold.value is None:
        return Measured.unsupported(str(threshold.why), threshold.n, target)
    value = 1 - scores.fnmr(threshold.value)
    return measured_rate(value, samples, threshold.n, chance=target, note=threshold.note, far=threshold.far)


@dataclass(frozen=True)
class Targets:
    """Whom reconstructions are compared with, in the judge's unit embeddings.

    people: (n,) the person of each target. photos: (n, d) the very photo of each, None where there is none (a class
    embedding has no photo). others: of each target (m, d) other photos of the person, m may be 0.
    """

    people: Ints
    photos: Floats | None
    others: Sequence[Floats]


@dataclass(frozen=True)
class Panel:
    """Comparisons of one picture with one photo each. scores (M,) cosines; owner (M,) its target's place in people (k,)."""

    scores: Floats
    owner: Ints
    people: Ints

    def per_target(self, values: Floats) -> Floats:
        """(..., k) mean over each target's comparisons of values (..., M)."""
        members = np.zeros((len(self.owner), len(self.people)))
        members[np.arange(len(self.owner)), self.owner] = 1 / np.bincount(self.owner)[self.owner]
        return np.asarray(values @ members)


def verdicts(
    found: Floats, targets: Targets, judged_by: JudgeGate, rivals: Mapping[str, Floats], rng: np.random.Generator
) -> tuple[Metrics, dict[str, Metrics], Floats]:
    """Metrics of what was found, unit embeddings (n, d); the same of each rival (n, d); and each target's mean cosine (NaN
    where there is no photo to compare with).

    "sar1@fmr=...": share of targets accepted as the very photo, where there is one. "sar2@fmr=...": mean share of the person's
    other photos that accept the target's picture; targets without such photos are left out. "identity_similarity": mean
    cosine with the very photo, or else with the other photos; "identity_z": the same in standard deviations above the mean
    of different people. Chance of these two is what the same pictures get when held to other people: noise, or a blur, may look
    more like anybody than people look like each other. Victims (by person) and thresholds (by calibration person) are both
    resampled.
    """
    metrics = _measures(found, targets, judged_by, rng)
    baselines = {name: _measures(e, targets, judged_by, rng) for name, e in rivals.items()}
    if targets.photos is not None:
        person = replace(targets, photos=None)
        best = _measures(targets.photos, person, judged_by, rng)
        baselines["genuine-photo"] = {k: m for k, m in best.items() if k.startswith("sar2")}
    panel = _panel(found, targets, None)
    mean = np.full(len(found), np.nan)
    counts = [1 if targets.photos is not None else len(o) for o in targets.others]
    mean[np.array(counts, dtype=int) > 0] = panel.per_target(panel.scores)
    return metrics, baselines, mean


def _panel(embeddings: Floats, targets: Targets, photos: bool | None) -> Panel:
    """Comparisons with the very photos, with the others, or (None) with the very photos where there are any."""
    own = targets.photos
    if own is not None and photos is not False:
        scores = np.diagonal(cosine(embeddings, own)).copy()
        return Panel(scores, np.arange(len(scores)), targets.people)
    kept = [i for i, others in enumerate(targets.others) if len(others)]
    rows = [cosine(embeddings[i : i + 1], targets.others[i])[0] for i in kept]
    owner = np.repeat(np.arange(len(kept)), [len(row) for row in rows])
    return Panel(np.concatenate(rows) if rows else np.empty(0), owner, targets.people[kept])


def _measures(embeddings: Floats, targets: Targets, judged_by: JudgeGate, rng: np.random.Generator) -> Metrics:
    out: dict[str, Measured] = {}
    kinds = (("sar1", True), ("sar2", False)) if targets.photos is not None else (("sar2", False),)
    for kind, photos in kinds:
        panel = _panel(embeddings, targets, photos)
        left_out = len(targets.people) - len(panel.people)
        for fmr, point in judged_by.points.items():
            share = accepted(panel, point, fmr, rng)
            if left_out:
                note = f"{left_out} targets have no other photo of the person and are left out"
                share = replace(share, note="; ".join(filter(None, (share.note, note))))
            out[f"{kind}@fmr={fmr:g}"] = share
    panel = _panel(embeddings, targets, None)
    similarity = panel.per_target(panel.scores)
    spread = judged_by.impostor_spread or 1.0
    stranger = _with_others(embeddings, targets, judged_by.impostor_mean)
    for name, values, chance in (
        ("identity_similarity", similarity, stranger),
        ("identity_z", (similarity - judged_by.impostor_mean) / spread, (stranger - judged_by.impostor_mean) / spread),
    ):
        out[name] = replace(bootstrap_mean(values, panel.people, rng=rng), chance=round(chance, 6))
    return {name: m.to_json() for name, m in out.items()}


def _with_others(embeddings: Floats, targets: Targets, otherwise: float) -> float:
    """Mean cosine of the pictures (n, d) with photos of the other targets' people; ``otherwise`` where all are of one person, or
    there is no photo."""
    kept = [i for i, o in enumerate(targets.others) if targets.photos is not None or len(o)]
    photos = targets.photos if targets.photos is not None else [targets.others[i].mean(axis=0) for i in kept]
    people = targets.people[kept]
    different = people[:, None] != people
    if not different.any():
        return otherwise
    return float((embeddings[kept] @ np.stack(list(photos)).T)[different].mean())


def accepted(panel: Panel, point: OperatingPoint, fmr: float, rng: np.random.Generator) -> Measured:
    """Mean over targets of the share of comparisons with score >= threshold; chance: the FMR itself."""
    limit = point.threshold
    n = len(np.unique(panel.people))
    if limit.value is None:
        return Measured.unsupported(str(limit.why), n, fmr)
    if n < 2:
        return Measured.unsupported(f"targets of {n} people: no interval", n, fmr)
    shares = panel.per_target((panel.scores >= limit.value).astype(np.float64))
    drawn = panel.per_target((panel.scores >= point.draws[:, None]).astype(np.float64))
    cluster = person_index(panel.people)
    weights = identity_weights(n, len(drawn), rng)[:, cluster]
    samples = (weights * drawn).sum(axis=1) / weights.sum(axis=1)
    measured = measured_rate(float(shares.mean()), samples, n, chance=fmr)
    if n == len(shares) and _whole(shares):  # independent trials: few of them need the exact interval
        exact = clopper_pearson(int(shares.sum()), n)
        assert exact.low is not None
        assert exact.high is not None
        assert measured.low is not None
        assert measured.high is not None
        measured = replace(measured, low=min(exact.low, measured.low), high=max(exact.high, measured.high))
    return replace(measured, note=limit.note, far=limit.far)


def _whole(shares: NDArray[np.float64]) -> bool:
    return bool(np.isin(shares, (0.0, 1.0)).all())


def another(people: Ints) -> Ints | None:
    """(n,) for each target the next one of another person; None where all are of one."""
    n = len(people)
    if len(np.unique(people)) < 2:
        return None
    return np.array([next((i + k) % n for k in range(1, n) if people[(i + k) % n] != people[i]) for i in range(n)])
