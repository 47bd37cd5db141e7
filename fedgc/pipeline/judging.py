"""What an attack found beside the truth: the only place where reconstructions and private photos meet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from eval.linkage import score_photos
from eval.scoring import Batch, Features, Scores, batches, named, score_embeddings, score_images, score_labels
from fedgc.models import load_backbone
from fedgc.pipeline.linking import mates_of, round_scores
from fedgc.pipeline.working import CLIENTS, SEAT, Job
from fedgc.runs import RunDirectory
from fedgc.threats import THREATS
from fedgc.types import HEAD, ModelSpec, Observation, Reconstruction, Tensors, Transcript

STRANGERS = 256  # auxiliary photos whose mean feature is a baseline


def judged(
    run: RunDirectory, target: str, threat: str, found: Mapping[str, Reconstruction], auxiliary: Tensor,
    rng: np.random.Generator,
) -> Scores:  # fmt: skip
    """Scores of what one attack of a ``target`` ("round" or "step") found in each transcript, from one seat."""
    if target == "round":
        return round_scores(run, threat, found, rng)
    seat = SEAT if threat in CLIENTS else None
    groups = {name: batches(r, run.load_truth(name), seat) for name, r in found.items()}
    every = [g for of_one in groups.values() for g in of_one]
    looked = lambda: [f for name, g in groups.items() for f in _features(run, name, threat, g, auxiliary)]  # noqa: E731
    if every[0].scores is not None:
        return score_photos(every, looked(), mates_of(run), rng)
    among = lambda: [c for name, g in groups.items() for c in _may_be(run.load_transcript(name), g)]  # noqa: E731
    return of_steps(every, looked, among, auxiliary, rng)


def _may_be(transcript: Transcript, groups: list[Batch]) -> list[Sequence[int]]:
    """The classes that the photos behind each target may have, as far as who sent it tells: those of the rows that it trains."""
    return [transcript.rows.get(g.source) or range(len(transcript.owners)) for g in groups]


def of_steps(
    every: list[Batch], looked: Callable[[], list[Features]], among: Callable[[], list[Sequence[int]]], auxiliary: Tensor,
    rng: np.random.Generator,
) -> Scores:  # fmt: skip
    """Scores of labels, features and pictures, as far as they were found. looked: the true features, where they are needed;
    among: for each batch the classes that its photos may have, where they are needed."""
    parts = []
    if every[0].found is not None:
        metrics, baselines = score_labels(every, among(), rng)
        hits = [bool(h) for g in every if g.found is not None for h in named(g.found, g.labels)]
        people = torch.cat([g.labels for g in every]).tolist()
        samples = [{"target": i, "class": c, "named": h} for i, (c, h) in enumerate(zip(people, hits, strict=True))]
        parts.append(Scores(metrics, baselines, samples))
    if every[0].embeddings is not None:
        parts.append(score_embeddings(every, looked(), rng))
    if every[0].images is not None:
        parts.append(score_images(every, auxiliary, rng))
    last = parts[-1]  # what is shown of each target; pictures where there are any
    return replace(
        last,
        metrics={k: v for p in reversed(parts) for k, v in p.metrics.items()},
        baselines={k: v for p in reversed(parts) for k, v in p.baselines.items()},
    )


def _features(run: RunDirectory, name: str, threat: str, groups: list[Batch], auxiliary: Tensor) -> list[Features]:
    """True features of the photos behind each target of one transcript, and what they are compared with."""
    transcript = run.load_transcript(name)
    observation = THREATS[threat].observe(transcript, seat=SEAT)
    updates = observation.client_updates or (observation.aggregate,)
    rows = {u.clients[0] if len(u.clients) == 1 else -1: u.before.get(HEAD) for u in updates if u is not None}
    stranger = features_at(transcript, auxiliary[:STRANGERS]).mean(dim=0)
    return [Features(features_at(transcript, g.photos), stranger, rows.get(g.source)) for g in groups]


def features_at(transcript: Transcript, photos: Tensor) -> Tensor:
    """`unit_features` at the backbone that the server sent out."""
    return unit_features(transcript.constants.spec, transcript.broadcast, photos)


@torch.no_grad()
def unit_features(spec: ModelSpec, backbone: Tensors, photos: Tensor, batch: int = 64) -> Tensor:
    """Unit features (n, d) of photos (n, 3, S, S), by the forward pass that a recorded step takes: not averaged with the mirror
    image, norms in evaluation mode."""
    network = load_backbone(spec, backbone)
    return F.normalize(torch.cat([network(x) for x in photos.split(batch)]), dim=1)


def optimisation_limited(
    run: RunDirectory, job: Job, name: str, observation: Observation, found: Reconstruction
) -> int:
    """In how many updates the search ended above its own loss at the true photos: that it did not find them is then the search's
    doing, and says nothing of what the update holds. Only of attacks that search."""
    if found.loss is None or job.attack.reads == "round":  # no photos are behind a class embedding
        return 0
    truth = run.load_truth(name)
    count = 0
    for number, group in enumerate(batches(found, truth, job.seat)):
        loss = found.loss[[i for i, s in enumerate(found.sources) if s == group.source]][0]
        at_truth = job.attack.loss_at(observation, number, group.photos)
        count += at_truth is not None and bool(loss > at_truth)
    return count
