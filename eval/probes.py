"""What a client read of strangers' class embeddings, beside the rows themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.linkage import ranks_of
from eval.scoring import Metrics, Scores
from eval.statistics import bootstrap_mean, rate

REACHED = 0.9  # cosine from which a class embedding counts as reached
DRAWS = 20  # random directions for each guess, for chance


@dataclass(frozen=True)
class Read:
    """One round. guesses: (n, d) unit, each read from the client's own class of the same place in ``sources``: guesses of one row
    are one cluster. strangers: (C', d) class embeddings of other clients, in every round in the same order. people: (G, d) unit
    features of the gallery at that round's model."""

    guesses: Tensor
    sources: tuple[int, ...]
    strangers: Tensor
    people: Tensor


def score_probe(
    rounds: Sequence[Read], classes: Sequence[int], mates: Mapping[int, int], rng: np.random.Generator
) -> Scores:
    """embedding_cosine: mean cosine of a guess with the nearest class embedding of a stranger; reached: share of guesses beyond
    ``REACHED``; strangers_reached: share of strangers that some guess reached; rank1, rank5: whether photos name that nearest
    stranger in the gallery.

    classes: of each stranger; mates: the person of the gallery that a class is. Chance and the baseline random-embedding are
    random directions by the same rule; mean-stranger is what an answer without a direction would give; class-embeddings are the
    nearest rows themselves, which a client under FedAvg would hold.
    """
    mated = torch.tensor([mates.get(c, -1) for c in classes])

    def measured(make: Callable[[Read], Tensor], copies: int = 1) -> Metrics:
        return _metrics([(make(r), r, np.tile(r.sources, copies)) for r in rounds], mated, rng)

    baselines = {
        "random-embedding": measured(lambda r: _random(len(r.guesses) * DRAWS, r.guesses.shape[1], rng), DRAWS),
        "mean-stranger": measured(lambda r: F.normalize(r.strangers, dim=1).mean(dim=0).expand_as(r.guesses)),
        "class-embeddings": measured(lambda r: r.strangers[_nearest(r.guesses, r)[1]]),
    }
    metrics = measured(lambda r: r.guesses)
    for name, metric in metrics.items():
        metric["chance"] = baselines["random-embedding"][name]["value"]
    samples = [
        {"target": n, "class": int(c), "nearest": int(classes[i]), "cosine": round(float(x), 6)}
        for r in rounds
        for n, (c, x, i) in enumerate(zip(r.sources, *_nearest(r.guesses, r), strict=True))
    ]
    return Scores(metrics, baselines, [{**s, "target": n} for n, s in enumerate(samples)])


def _random(count: int, d: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.standard_normal((count, d))).float()


def _nearest(embeddings: Tensor, read: Read) -> tuple[Tensor, Tensor]:
    """Cosine with the nearest stranger of each embedding (n,), and which that is (n,)."""
    best, which = (F.normalize(embeddings, dim=1) @ F.normalize(read.strangers, dim=1).T).max(dim=1)
    return best, which


def _metrics(found: Sequence[tuple[Tensor, Read, np.ndarray]], mated: Tensor, rng: np.random.Generator) -> Metrics:
    """found: embeddings (n, d) of a round, and the cluster of each."""
    near = [_nearest(embeddings, read) for embeddings, read, _ in found]
    cosine, which = torch.cat([c for c, _ in near]), torch.cat([w for _, w in near])
    clusters = np.concatenate([c for _, _, c in found])
    reached = cosine >= REACHED
    every = torch.zeros(len(mated), dtype=torch.bool).index_fill_(0, which[reached], True)
    metrics = {
        "embedding_cosine": bootstrap_mean(cosine.double().numpy(), clusters, rng=rng).to_json(),
        "reached": rate(reached.numpy(), clusters, rng=rng).to_json(),
        "strangers_reached": rate(every.numpy()).to_json(),
    }
    mate = mated[which]
    scores = torch.cat([F.normalize(embeddings, dim=1) @ read.people.T for embeddings, read, _ in found])
    named = (mate >= 0).numpy()
    if named.any():
        ranks = ranks_of(scores[named], mate[named].numpy())
        for k in (1, 5):
            metrics[f"rank{k}"] = rate(ranks <= k, clusters[named], rng=rng).to_json()
    return metrics
