"""A reconstruction against the truth: metrics, with the baselines that every number stands beside.

Which entries are compared with which photos follows from the protocol alone (the update an entry came from); within a
batch one Hungarian assignment on the mean squared error serves all image metrics. Nothing here reaches an attack.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from eval.fidelity import align, fidelity_summary, psnr, ssim
from eval.statistics import Measured, bootstrap_mean, bootstrap_median, rate
from fedgc.types import Reconstruction, Truth

Metrics = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Scores:
    """metrics and baselines as the contract's JSON; samples: one row a target; pictures: originals, then what was found."""

    metrics: Metrics
    baselines: Mapping[str, Metrics]
    samples: list[dict[str, Any]]
    pictures: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Batch:
    """Photos behind one target, and the entries that an attack returned for it."""

    source: int
    photos: Tensor
    labels: Tensor
    images: Tensor | None
    found: Tensor | None
    embeddings: Tensor | None = None
    every: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Features:
    """What the network says of a batch, for the judge alone. true: (n, d) unit features of its photos at the model that the
    step started from; stranger: (d,) mean unit feature of the auxiliary faces; rows: (C, d) class embeddings that the attacker
    holds, None where none reach it."""

    true: Tensor
    stranger: Tensor
    rows: Tensor | None


def batches(reconstruction: Reconstruction, truth: Truth, seat: int | None) -> list[Batch]:
    """Pair entries with photos. seat: the client in whose seat the attacker sits; it knows its own photos."""
    out = []
    source = torch.tensor(reconstruction.sources)
    for target in dict.fromkeys(reconstruction.sources):
        behind = [i for i, k in enumerate(truth.clients) if k == target or (target == -1 and k != seat)]
        mine = source == target
        pick = lambda x, mine=mine: None if x is None else x[mine]  # noqa: E731
        out.append(
            Batch(
                target,
                truth.images[behind].flatten(0, 1),
                truth.labels[behind].flatten(),
                pick(reconstruction.images),
                pick(reconstruction.labels),
                pick(reconstruction.embeddings),
                None if reconstruction.every is None else reconstruction.every[:, mine],
                pick(reconstruction.scores),
            )
        )
    return out


def score_labels(
    groups: Sequence[Batch], among: Sequence[Sequence[int]], rng: np.random.Generator
) -> tuple[Metrics, Mapping[str, Metrics]]:
    """label_accuracy: share of photos whose label was named, a batch's labels counted as a multiset; chance: guessing among the
    classes that the photos of each batch may have, whoever sent it being known."""
    hits = np.concatenate([named(g.found, g.labels) for g in groups if g.found is not None])
    people = torch.cat([g.labels for g in groups]).numpy()
    guess = lambda pool, n: torch.from_numpy(rng.choice(np.asarray(pool), n))  # noqa: E731
    guessed = np.concatenate(
        [named(guess(pool, len(g.labels)), g.labels) for g, pool in zip(groups, among, strict=True) for _ in range(200)]
    )
    chance = round(float(guessed.mean()), 6)
    found = rate(hits, people, chance=chance, rng=rng)
    baseline = Measured(chance, chance, chance, len(guessed))
    return {"label_accuracy": found.to_json()}, {"random-labels": {"label_accuracy": baseline.to_json()}}


def named(found: Tensor, labels: Tensor) -> np.ndarray:
    """(B,) whether each photo's label is among the labels found, each of which counts once."""
    left = found.tolist()
    hits = []
    for label in labels.tolist():
        hits.append(label in left)
        if hits[-1]:
            left.remove(label)
    return np.array(hits)


def score_embeddings(groups: Sequence[Batch], features: Sequence[Features], rng: np.random.Generator) -> Scores:
    """embedding_cosine: mean cosine of what was found with the photo's unit feature, one to one within a batch by the
    assignment of the greatest sum; a feature that was not found counts 0.

    Baselines: random directions, the mean stranger, and the nearest class embedding (an oracle, where the seat holds any).
    Chance is the better of the first two, which need no update: features of all faces lie close together in many a network, so
    that anybody's comes near a photo's own.
    """
    people = torch.cat([g.labels for g in groups]).numpy()
    draw = lambda f: torch.from_numpy(rng.standard_normal(f.true.shape))  # noqa: E731
    own = np.concatenate([_cosines(g.embeddings, f.true) for g, f in zip(groups, features, strict=True)])
    rivals = {
        "random-embedding": [_cosines(draw(f), f.true) for f in features],
        "mean-stranger": [_cosines(f.stranger.expand_as(f.true), f.true) for f in features],
        "nearest-class-embedding": [_nearest_rows(f) for f in features if f.rows is not None],
    }
    chance = max(float(np.concatenate(rivals[name]).mean()) for name in ("random-embedding", "mean-stranger"))
    found = replace(bootstrap_mean(own, people, rng=rng), chance=round(chance, 6))
    baselines = {
        name: {"embedding_cosine": bootstrap_mean(np.concatenate(values), people, rng=rng).to_json()}
        for name, values in rivals.items()
        if len(values) == len(features)
    }
    samples = [
        {"target": i, "class": int(c), "cosine": round(float(x), 6)}
        for i, (c, x) in enumerate(zip(people, own, strict=True))
    ]
    return Scores({"embedding_cosine": found.to_json()}, baselines, samples)


def _cosines(found: Tensor | None, true: Tensor) -> np.ndarray:
    """(n,) cosine of each true unit feature (n, d) with the found one assigned to it, 0 where there is none."""
    cosines = np.zeros(len(true))
    if found is not None:
        rows, columns, table = assigned(found, true)
        cosines[rows] = table[rows, columns]
    return cosines


def assigned(found: Tensor, true: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """True features (n, d) and found ones (m, d) one to one, with the greatest sum of cosines: places in both, all cosines."""
    table = (F.normalize(true.double(), dim=1) @ F.normalize(found.double(), dim=1).T).clamp(-1, 1).numpy()
    rows, columns = linear_sum_assignment(table, maximize=True)
    return rows, columns, table


def _nearest_rows(f: Features) -> np.ndarray:
    assert f.rows is not None
    return np.asarray((f.true.double() @ F.normalize(f.rows.double(), dim=1).T).amax(dim=1).numpy())


def score_images(groups: Sequence[Batch], auxiliary: Tensor, rng: np.random.Generator) -> Scores:
    """psnr, ssim and psnr_gain (dB above the auxiliary faces' mean, paired by victim), beside faces that saw no update.

    The nearest auxiliary face is chosen with the original in hand: an oracle, the best that owning strangers' photos could do.
    """
    originals, people = torch.cat([g.photos for g in groups]), torch.cat([g.labels for g in groups]).numpy()
    aligned = [align(g.images, g.photos) for g in groups if g.images is not None]
    found, missing = torch.cat([a for a, _ in aligned]), sum(m for _, m in aligned)
    mean = auxiliary.mean(dim=0, keepdim=True).expand_as(originals)
    noise = torch.from_numpy(rng.random(originals.shape, dtype=np.float32))
    rivals = {"mean-face": mean, "nearest-auxiliary-face": nearest(originals, auxiliary), "noise": noise}
    own = psnr(found, originals).numpy()
    gain = own - psnr(mean, originals).numpy()
    metrics = {
        k: m.to_json() for k, m in fidelity_summary(own, ssim(found, originals).numpy(), people, rng=rng).items()
    }
    metrics["psnr_gain"] = replace(bootstrap_median(gain, people, rng=rng), chance=0.0).to_json()
    oracle = [_best_restart(g) for g in groups if g.every is not None]
    if len(oracle) == len(groups):
        metrics["psnr_oracle_restart"] = bootstrap_median(torch.cat(oracle).numpy(), people, rng=rng).to_json()
    baselines = {
        name: {k: m.to_json() for k, m in fidelity_summary(
            psnr(x, originals).numpy(), ssim(x, originals).numpy(), people, rng=rng).items()}
        for name, x in rivals.items()
    }  # fmt: skip
    similarity, rival = ssim(found, originals).tolist(), psnr(rivals["nearest-auxiliary-face"], originals).tolist()
    samples = [
        {
            "target": i,
            "class": int(c),
            "psnr": _finite(p),
            "ssim": round(s, 5),
            "psnr_gain": _finite(g),
            "nearest_psnr": _finite(r),
        }
        for i, (c, p, s, g, r) in enumerate(zip(people, own, similarity, gain, rival, strict=True))
    ]
    if missing:
        metrics["psnr"]["note"] = f"{missing} reconstructions are missing and count as grey"
    return Scores(metrics, baselines, samples, (originals, found))


def _best_restart(group: Batch) -> Tensor:
    """(B,) PSNR where each batch comes from its restart that is nearest to the truth: an oracle, which no attacker has. The
    distance from ``psnr`` is what choosing by the loss cost."""
    assert group.every is not None
    scores = torch.stack([psnr(align(images, group.photos)[0], group.photos) for images in group.every])
    return scores[scores.mean(dim=1).argmax()]


def nearest(originals: Tensor, auxiliary: Tensor) -> Tensor:
    """For each original the auxiliary face with the least squared distance, shapes (n, C, H, W)."""
    distance = torch.cdist(originals.flatten(1), auxiliary.flatten(1))
    return auxiliary[distance.argmin(dim=1)]


def _finite(value: float) -> float | None:
    return round(float(value), 4) if np.isfinite(value) else None
