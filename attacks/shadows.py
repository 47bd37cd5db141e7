"""Small recognisers that an attacker trains on its own strangers, to learn how a model treats people whom it was trained on.

Shadow models (Shokri et al. 2017, arXiv 1610.05820), here of people and not of photos: each is trained on some photos of half of
the strangers, and looked at with other photos of all of them, as the attacked model will be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from attacks.priors import Faces
from fedgc.doors import ClientPlan, Defense
from fedgc.heads import CosineHead, initial_rows
from fedgc.local import epoch_batches, load_tensors, train_locally
from fedgc.models import FaceModel, as_bytes, build_backbone
from fedgc.rng import generator
from fedgc.types import HEAD, Gallery, LocalConstants, Observation, Progress

FEWEST = 3  # photos of a stranger of whom some are trained on and others looked at
PEOPLE = 8  # at least
LOOKED_AT = 3  # at most, as of a suspect
LR, BATCH, MOMENTUM = 0.05, 32, 0.9


@dataclass(frozen=True)
class Strangers:
    """People of whom the attacker owns several photos. trained: uint8 (N, 3, S, S) and ``of``: int64 (N,) person of each, for
    shadows to learn; seen: other photos of the same people, numbered alike."""

    trained: Tensor
    of: Tensor
    seen: Gallery


@dataclass(frozen=True)
class Shadow:
    """A trained recogniser. rows: (C, d) its class embeddings; members: bool (P,) which strangers it was trained on."""

    backbone: nn.Module
    rows: Tensor
    members: Tensor


def too_few(observation: Observation, what: str) -> str | None:
    """Why the strangers of an observation cannot teach ``what``, or None; nothing is computed but how many photos each has."""
    faces, people = observation.auxiliary_faces, observation.auxiliary_people
    each = people.unique(return_counts=True)[1] if faces is not None and people is not None else torch.zeros(0)
    if int((each >= FEWEST).sum()) >= PEOPLE:
        return None
    return f"needs eight strangers or more of three photos each, told apart, to train {what} on"


def strangers(faces: Tensor, people: Tensor) -> Strangers | None:
    """Photos dealt to training and looking; None where fewer than ``PEOPLE`` people have ``FEWEST`` photos."""
    to_train, of, to_see, seen = [], [], [], []
    number = 0
    for person in people.unique().tolist():
        index = (people == person).nonzero()[:, 0]
        if len(index) < FEWEST:
            continue
        looked = min(LOOKED_AT, len(index) // 2)
        to_see.append(index[:looked])
        to_train.append(index[looked:])
        seen.append(torch.full((looked,), number))
        of.append(torch.full((len(index) - looked,), number))
        number += 1
    if number < PEOPLE:
        return None
    return Strangers(
        as_bytes(faces[torch.cat(to_train)]), torch.cat(of), Gallery(faces[torch.cat(to_see)], torch.cat(seen))
    )


def halves(people: int, models: int, draw: torch.Generator) -> Tensor:
    """bool (models, people): each pair of models shares out the people, so that everybody is in half of them."""
    rows: list[Tensor] = []
    for _ in range(models // 2):
        chosen = torch.zeros(people, dtype=torch.bool)
        chosen[torch.randperm(people, generator=draw)[: people // 2]] = True
        rows += [chosen, ~chosen]
    return torch.stack(rows)


_MADE: dict[Hashable, list[Shadow]] = {}  # one set for all seats and runs that share strangers and settings
KEPT = 2


def shadows(
    faces: Tensor, people: Tensor, constants: LocalConstants, models: int, epochs: int, progress: Progress
) -> list[Shadow]:
    """So many shadows of `halves` of the strangers; one alone is trained on all of them. Of what is attacked they know its
    network and the public constants of its training, and so are made once a process."""
    own = strangers(faces, people)
    assert own is not None
    c = constants
    recipe = c.spec, c.weight_decay, c.head_lr_factor, c.clip_norm, c.augmented, models, epochs
    key = Faces(faces), tuple(people.tolist()), recipe
    if key not in _MADE:
        draw = generator("shadows", models, epochs)
        everybody = torch.ones(1, own.seen.size, dtype=torch.bool)
        made = []
        for k, members in enumerate(everybody if models == 1 else halves(own.seen.size, models, draw)):
            tick = lambda epoch, k=k: progress(k * epochs + epoch, models * epochs)  # noqa: E731
            made.append(trained(own, members, constants, epochs, draw, tick))
        while len(_MADE) >= KEPT:
            del _MADE[next(iter(_MADE))]
        _MADE[key] = made
    return _MADE[key]


def trained(
    own: Strangers, members: Tensor, constants: LocalConstants, epochs: int, draw: torch.Generator,
    done: Callable[[int], None],
) -> Shadow:  # fmt: skip
    """One shadow, trained in one place with the loss, margin and clipping that the parties use. done: told of each epoch."""
    people = members.nonzero()[:, 0]
    mine = members[own.of]
    photos, labels = own.trained[mine], torch.searchsorted(people, own.of[mine])
    spec = replace(constants.spec, softmax_classes=0)
    seed = int(torch.randint(2**31, (1,), generator=draw))
    model = FaceModel(build_backbone(spec, seed), CosineHead(len(people), spec.embedding_size))
    load_tensors(model, {HEAD: initial_rows(len(people), spec.embedding_size, draw)})
    batch = min(BATCH, len(photos))
    plan = ClientPlan(0, len(photos), batch, epochs * math.ceil(len(photos) / batch))
    model.train()
    for epoch in range(epochs):
        rate = LR * min(1.0, (epoch + 1) / 3) * 0.5 * (1 + math.cos(math.pi * epoch / epochs))
        now = replace(
            constants,
            spec=spec,
            lr=rate,
            batch_size=batch,
            momentum=MOMENTUM,
            steps=None,
            defense={},
            precision="float32",
        )
        train_locally(
            model, photos, labels, epoch_batches(len(photos), batch, 1, draw), now, Defense(name="none"), plan,
            sampling=None, augmenting=draw, noise=draw,
        )  # fmt: skip
        done(epoch + 1)
    return Shadow(model.backbone.eval(), model.head.weight.detach().clone(), members)
