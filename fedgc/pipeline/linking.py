"""What an attack on a whole round found, beside the private names and class embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.identity_linkage import IdentityLinkage, person_embeddings
from eval.linkage import score_linkage
from eval.probes import Read, score_probe
from eval.scoring import Scores
from eval.template_faces import score_faces
from fedgc.models import as_bytes, embed, load_backbone
from fedgc.pipeline.blinding import as_clients_read
from fedgc.pipeline.working import SEAT
from fedgc.rng import generator
from fedgc.runs import RunDirectory
from fedgc.threats import THREATS
from fedgc.types import HEAD, Attack, Reconstruction, Transcript


def round_scores(
    run: RunDirectory, threat: str, found: Mapping[str, Reconstruction], rng: np.random.Generator
) -> Scores:
    """Scores by what was returned: faces, embeddings of strangers, or similarities with the people of the gallery."""
    mates = mates_of(run)
    name, one = next(iter(found.items()))
    if one.images is not None:
        return _faces(run, name, threat, one, mates, rng)
    return score_linkage(one, mates, rng) if one.embeddings is None else _probe_scores(run, found, mates, rng)


def mates_of(run: RunDirectory) -> dict[int, int]:
    """The person of the gallery that each class is; private."""
    return {int(c): int(g) for c, g in run.load_identities()["class_gallery"].items()}


def acquaintances(run: RunDirectory, attack: Attack, seat: int | None, name: str) -> dict[int, int] | None:
    """The person of the gallery behind as many classes as an attack says that the attacker knows, drawn by the run's seed, of
    others than ``seat``; fewer where there are not so many, None for an attack that asks for none."""
    if not isinstance(attack, IdentityLinkage) or not attack.known:
        return None
    owners, mates = run.load_transcript(name).owners, mates_of(run)
    classes = [c for c in sorted(mates) if owners[c] != seat]
    order = torch.randperm(len(classes), generator=generator(run.about()["seed"], "acquaintances")).tolist()
    return {classes[i]: mates[classes[i]] for i in order[: attack.known]}


def _faces(
    run: RunDirectory, name: str, threat: str, found: Reconstruction, mates: Mapping[int, int], rng: np.random.Generator
) -> Scores:
    """Images of class embeddings, against other photos of their people and in the attacked model's own eyes."""
    transcript = as_clients_read(run, run.load_transcript(name))
    observation = THREATS[threat].observe(transcript, seat=SEAT)
    held, owned = observation.class_embeddings, run.load_knowledge()
    rows, classes = foreign_rows(transcript) if held is None else (held.weight, held.classes)
    assert observation.global_model is not None
    assert owned.gallery is not None and owned.auxiliary_faces is not None  # noqa: PT018
    backbone = load_backbone(observation.public_constants.spec, observation.global_model)
    looks = lambda images: embed(backbone, as_bytes(images))  # noqa: E731
    of_classes = dict(zip(classes, rows, strict=True))
    return score_faces(found, mates, owned.gallery, owned.auxiliary_faces, of_classes, looks, rng)


def told_apart(run: RunDirectory, attack: Attack, found: Mapping[str, Reconstruction]) -> dict[str, Reconstruction]:
    """What was found, where faces were made of guesses of strangers with each guess under the class of its nearest stranger, whom
    the attacker does not know and scores have to."""
    if attack.reads == "step":
        return dict(found)
    return {
        name: r if r.images is None or r.embeddings is None else replace(r, sources=_nearest(run, name, r.embeddings))
        for name, r in found.items()
    }


def _nearest(run: RunDirectory, name: str, guesses: Tensor) -> tuple[int, ...]:
    rows, classes = foreign_rows(as_clients_read(run, run.load_transcript(name)))
    nearest = (F.normalize(guesses, dim=1) @ F.normalize(rows, dim=1).T).argmax(dim=1)
    return tuple(classes[i] for i in nearest.tolist())


def _probe_scores(
    run: RunDirectory, found: Mapping[str, Reconstruction], mates: Mapping[int, int], rng: np.random.Generator
) -> Scores:
    """Guesses of each round beside the strangers' class embeddings of that round."""
    gallery = run.load_knowledge().gallery
    assert gallery is not None
    rounds = []
    classes: tuple[int, ...] = ()
    for name, reconstruction in found.items():
        transcript, guesses = as_clients_read(run, run.load_transcript(name)), reconstruction.embeddings
        assert guesses is not None
        rows, classes = foreign_rows(transcript)
        people = person_embeddings(load_backbone(transcript.constants.spec, transcript.released), gallery)
        rounds.append(Read(guesses, reconstruction.sources, rows, people))
    return score_probe(rounds, classes, mates, rng)


def foreign_rows(transcript: Transcript) -> tuple[Tensor, tuple[int, ...]]:
    """Class embeddings that the server returned to others than the curious client, and their classes."""
    others = sorted(set(transcript.returned) - {SEAT})
    rows = torch.cat([transcript.returned[k][HEAD] for k in others]).cpu()
    return rows, tuple(c for k in others for c in transcript.rows[k])
