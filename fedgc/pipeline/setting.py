"""From a configuration to everything that training starts from: faces, split, parties and what attackers own."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from fedgc.algorithms import ALGORITHMS
from fedgc.canaries import Planting, plan_planting, planted
from fedgc.config import Config
from fedgc.data.faces import FaceSet, load_faces
from fedgc.data.splits import Splits, partition, split_identities
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.pipeline.watch import Watch, silent
from fedgc.rng import generator
from fedgc.schedule import Party
from fedgc.types import Tensors

AUXILIARY_PHOTOS = 2000  # enough for a face prior; more only makes runs bigger


@dataclass(frozen=True)
class Setting:
    """people: the person (index into faces.names) of each class; nobody, where nodes keep their photos and parties have none.
    parties: with the photos of people alone; canaries: what is put among them, or not, in training."""

    config: Config
    faces: FaceSet
    splits: Splits
    parties: tuple[Party, ...]
    people: tuple[int, ...]
    device: torch.device
    canaries: Planting | None = None

    @property
    def classes(self) -> int:
        return sum(len(party.classes) for party in self.parties)


def prepare(config: Config, watch: Watch = silent) -> Setting:
    """Load and split the faces and deal the people to clients; everything is a function of the configuration."""
    device = choose_device(config.device)
    faces = load_config_faces(config, watch)
    data = config.data
    splits = split_identities(faces, min_images=data.min_images, held_out=data.held_out, seed=config.seed)
    dealt = deal(config, splits.train)
    photo_person = faces.labels[splits.train_images]
    parties: list[Party] = []
    people: list[int] = []
    for client, members in enumerate(dealt):
        first = len(people)
        index, labels = [], []
        for offset, person in enumerate(members):
            mine = splits.train_images[photo_person == person]
            index.append(mine)
            labels.append(torch.full((len(mine),), first + offset))
        people += members
        photos = faces.images[torch.cat(index)].to(device)
        classes = tuple(range(first, len(people)))
        parties.append(Party(client, photos, torch.cat(labels).to(device), classes))
    count = config.audit.canaries
    canaries = plan_planting(parties, count, data.image_size, config.seed) if count else None
    return Setting(config, faces, splits, tuple(parties), tuple(people), device, canaries)


def deal(config: Config, people: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The people of each client that trains."""
    alone, f = ALGORITHMS[config.federation.algorithm].alone, config.federation
    if alone == "all":
        return partition(people, 1, config.seed)
    dealt = partition(people, len(people) if f.clients == "people" else f.clients, config.seed, f.unevenness)
    return dealt[:1] if alone == "first" else dealt


def load_config_faces(config: Config, watch: Watch = silent) -> FaceSet:
    data = config.data
    return load_faces(
        data.source, image_size=data.image_size, align=data.align, seed=config.seed,
        center_fraction=data.center_fraction, progress=partial(watch, "reading faces"),
    )  # fmt: skip


def federation(setting: Setting, initial: Tensors | None = None) -> Federation:
    """The federation of a setting, with a noise key that nobody knows; a run replaces it by its own."""
    config = setting.config
    return Federation(
        ALGORITHMS[config.federation.algorithm], config.spec(setting.classes), config.schedule(),
        planted(setting.parties, setting.canaries), config.defense, config.seed, secrets.randbits(256), setting.device,
        initial, config.plan_of_probing(), config.model.trained == "last",
    )  # fmt: skip


def notes(setting: Setting) -> list[str]:
    """What a user should know about these settings before the result."""
    head, algorithm = setting.config.head.softmax, ALGORITHMS[setting.config.federation.algorithm]
    lonely = sum(len(p.classes) == 1 for p in setting.parties)
    found = []
    if lonely and not algorithm.softmax_over_all and head == "own":
        found.append(
            f"{lonely} of {len(setting.parties)} clients hold one person: softmax over their own people is constant, so they "
            "train by the pull towards the class embedding alone (head.softmax=everybody counts strangers instead)"
        )
    if lonely and not algorithm.softmax_over_all and not algorithm.corrects:
        found.append(
            f"under {algorithm.name} nothing keeps these people apart: fedgc or fedaws push them apart at the server"
        )
    return found


def choose_device(name: str) -> torch.device:
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("--device cuda: no CUDA device is visible here; use --device cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def auxiliary_photos(setting: Setting) -> tuple[Tensor, Tensor]:
    """Photos of strangers that every attacker owns, uint8 (N, 3, S, S), and a number for each person, int64 (N,)."""
    index = setting.faces.of(setting.splits.auxiliary)
    order = torch.randperm(len(index), generator=generator(setting.config.seed, "auxiliary"))
    kept = index[order[:AUXILIARY_PHOTOS]].sort().values
    return setting.faces.images[kept], setting.faces.labels[kept].unique(return_inverse=True)[1]


def gallery(setting: Setting) -> tuple[Tensor, Tensor, dict[int, int]]:
    """Other photos of the trained people among strangers, in an order that says nothing.

    Returns photos uint8 (N, 3, S, S), the gallery number of each, and the (private) gallery number of each class.
    """
    faces, splits = setting.faces, setting.splits
    keep = setting.config.data.held_out
    photo_person = faces.labels[splits.gallery_images]
    photos = {p: splits.gallery_images[photo_person == p] for p in splits.train}
    photos |= {p: faces.of([p])[:keep] for p in splits.auxiliary}
    present = [p for p, index in photos.items() if len(index)]
    order = torch.randperm(len(present), generator=generator(setting.config.seed, "gallery")).tolist()
    number = {present[i]: n for n, i in enumerate(order)}
    index = torch.cat([photos[p] for p in sorted(present, key=number.__getitem__)])
    people = torch.tensor([number[int(p)] for p in faces.labels[index]])
    return faces.images[index], people, {c: number[p] for c, p in enumerate(setting.people) if p in number}


def photos_of(setting: Setting, people: Sequence[int], most: int) -> tuple[Tensor, Tensor]:
    """The first photos of each of these people, uint8 (N, 3, S, S), and a number for each person, int64 (N,) from 0 in order."""
    index = [setting.faces.of([p])[:most] for p in people]
    return setting.faces.images[torch.cat(index)], torch.cat([torch.full((len(i),), n) for n, i in enumerate(index)])
