"""Embeddings against the photos of a gallery: who is named, in a closed set and in an open one, and how linkable they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from eval.linkability import d_sys, tpir
from eval.recognition import identification
from eval.scoring import Batch, Features, Metrics, Scores, assigned
from eval.statistics import bootstrap_mean
from fedgc.types import Reconstruction


def score_linkage(reconstruction: Reconstruction, mates: Mapping[int, int], rng: np.random.Generator) -> Scores:
    """rank1, rank5 and auc of class embeddings against a gallery; mates: gallery number of each class.

    Classes without a held-out photo have no mate and are left out. Baseline: random embeddings in place of the stolen ones.
    """
    scores = reconstruction.scores
    assert scores is not None
    rows = [i for i, c in enumerate(reconstruction.sources) if c in mates]
    truth = np.array([mates[reconstruction.sources[i]] for i in rows])
    size = scores.shape[1]
    metrics = linkage(scores[rows], truth, rng)
    noise = torch.from_numpy(rng.standard_normal((len(rows), size)).astype(np.float32))
    baselines = {"random-embedding": linkage(noise, truth, rng)}
    ranks = ranks_of(scores[rows], truth)
    samples = [
        {"target": n, "class": reconstruction.sources[i], "rank": int(r), "gallery": size}
        for n, (i, r) in enumerate(zip(rows, ranks, strict=True))
    ]
    return Scores(metrics, baselines, samples)


def score_photos(
    groups: Sequence[Batch], features: Sequence[Features], mates: Mapping[int, int], rng: np.random.Generator
) -> Scores:
    """rank1, rank5 and auc of features recovered from recorded steps, photo by photo: within a batch each is held to the photo
    whose true feature it is assigned to. A photo for which nothing was returned ranks last. People, not photos, are resampled."""
    rows, people = [], []
    for group, feature in zip(groups, features, strict=True):
        assert group.scores is not None and group.embeddings is not None  # noqa: PT018
        scores = torch.full((len(group.labels), group.scores.shape[1]), -1.0)
        of_photo, of_found, _ = assigned(group.embeddings, feature.true)
        scores[of_photo] = group.scores[of_found]
        rows.append(scores)
        people.append(group.labels)
    classes, table = torch.cat(people), torch.cat(rows)
    known = [i for i, c in enumerate(classes.tolist()) if c in mates]
    truth = np.array([mates[int(classes[i])] for i in known])
    noise = torch.from_numpy(rng.standard_normal((len(known), table.shape[1])).astype(np.float32))
    ranks = ranks_of(table[known], truth)
    samples = [
        {"target": n, "class": int(classes[i]), "rank": int(r), "gallery": table.shape[1]}
        for n, (i, r) in enumerate(zip(known, ranks, strict=True))
    ]
    return Scores(linkage(table[known], truth, rng), {"random-embedding": linkage(noise, truth, rng)}, samples)


def ranks_of(scores: Tensor, truth: np.ndarray) -> np.ndarray:
    """Rank of the true person by similarity, ties broken against the attacker."""
    s = scores.numpy()
    return (s >= s[np.arange(len(truth)), truth][:, None]).sum(axis=1)


def linkage(scores: Tensor, truth: np.ndarray, rng: np.random.Generator) -> Metrics:
    """rank1, rank5 and auc of similarities (n, G) with the people of a gallery; truth: (n,) whose each row is. Where everybody
    has one row, also tpir@fpir and d_sys."""
    s = scores.numpy()
    alone = len(set(truth.tolist())) == len(truth)
    clusters = None if alone else truth
    found = identification(ranks_of(scores, truth), scores.shape[1], clusters=clusters, rng=rng)
    own = s[np.arange(len(truth)), truth]
    mated = np.zeros(s.shape, dtype=bool)
    mated[np.arange(len(truth)), truth] = True
    others = s[~mated].reshape(len(truth), -1)
    wins = (own[:, None] > others).mean(axis=1) + 0.5 * (own[:, None] == others).mean(axis=1)
    found["auc"] = replace(bootstrap_mean(wins, clusters, rng=rng), chance=0.5)
    if alone:
        found |= {f"tpir@fpir={rate:g}": tpir(s, truth, rate, rng) for rate in (0.1, 0.01)}
        found["d_sys"] = d_sys(own, others, rng)
    return {name: m.to_json() for name, m in found.items()}
