"""People some of whom were trained on: whom an attacker is given, and how what it says of them is scored."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from eval.membership import score_membership
from eval.scoring import Scores
from fedgc.pipeline.linking import mates_of
from fedgc.rng import generator
from fedgc.runs import RunDirectory
from fedgc.types import Gallery, Reconstruction


@dataclass(frozen=True)
class LineUp:
    """people: photos of suspects, none of which was trained on, in an order that says nothing; members: bool (P,), for scoring
    alone, who was trained on; names: the class of a member, -1 of others."""

    people: Gallery
    members: np.ndarray
    names: np.ndarray


def line_up(run: RunDirectory, seat: int | None) -> LineUp:
    """Held-out photos of those trained on beside as many a person of test people. seat: the client who asks; it knows its own."""
    _, strangers = run.load_bystanders()
    gallery = run.load_knowledge().gallery
    assert gallery is not None
    mates = mates_of(run)
    last = run.load_transcript(max(n for n in run.transcripts() if "-step-" not in n))
    known = [c for c, owner in enumerate(last.owners) if owner != seat and c in mates]
    photos = [gallery.images[gallery.people == mates[c]] for c in known]
    photos += [strangers.images[strangers.people == n] for n in range(strangers.size)]
    names = np.array(known + [-1] * strangers.size)
    order = torch.randperm(len(photos), generator=generator(run.about()["seed"], "suspects", str(seat)))
    images = torch.cat([photos[i] for i in order.tolist()])
    people = torch.cat([torch.full((len(photos[i]),), n) for n, i in enumerate(order.tolist())])
    names = names[order.numpy()]
    return LineUp(Gallery(images, people), names >= 0, names)


def score_suspects(found: Mapping[str, Reconstruction], suspects: LineUp, rng: np.random.Generator) -> Scores:
    scores = next(iter(found.values())).scores
    assert scores is not None
    return score_membership(scores[0].numpy(), scores[1].numpy(), suspects.members, suspects.names, rng)
