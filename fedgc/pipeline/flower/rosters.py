"""Training on photos that stay with their nodes: what a server knows of them is how many there are of each person."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from fedgc.config import Config
from fedgc.data.faces import FaceSet
from fedgc.data.splits import Splits, split_identities
from fedgc.errors import UsageError
from fedgc.pipeline.setting import Setting, choose_device, load_config_faces
from fedgc.pipeline.watch import Watch
from fedgc.schedule import Party

Roster = Sequence[Sequence[int]]  # photos of each person, by client
FEWEST_PHOTOS = 2  # of a person, in a folder that a node trains on
NOWHERE = ("record.victims", "audit.canaries")  # need photos at the server


def parties_of(roster: Roster, size: int, mine: FaceSet | None = None, client: int | None = None) -> tuple[Party, ...]:
    """All parties, with photos for ``client`` alone: those of others have the right number, and no memory behind them."""
    parties, first = [], 0
    for k, counts in enumerate(roster):
        people = torch.arange(first, first + len(counts))
        labels = people.repeat_interleave(torch.tensor(list(counts), dtype=torch.int64))
        blank = torch.zeros((), dtype=torch.uint8).expand(len(labels), 3, size, size)
        photos = mine.images[_usable(mine)] if mine is not None and k == client else blank
        parties.append(Party(k, photos, labels, tuple(people.tolist())))
        first += len(counts)
    return tuple(parties)


def counts_of(faces: FaceSet) -> list[int]:
    """Photos of each person that a node trains on."""
    return [n for n in faces.counts().tolist() if n >= FEWEST_PHOTOS]


def _usable(faces: FaceSet) -> torch.Tensor:
    counts = faces.counts()
    return faces.of([person for person in range(len(faces.names)) if counts[person] >= FEWEST_PHOTOS])


def remote_setting(config: Config, roster: Roster, watch: Watch) -> Setting:
    """The server's setting: parties without photos, and the faces of the configuration as people that nobody trains on.

    Raises UsageError where the configuration asks for something that needs the photos.
    """
    if config.record.victims or config.audit.canaries:
        raise UsageError(
            f"the nodes keep their photos: set {' and '.join(NOWHERE)} to 0, or play an experiment (source in place of faces)"
        )
    faces = load_config_faces(config, watch)
    parties = parties_of(roster, config.data.image_size)
    return Setting(config, faces, _public(faces, config), parties, (), choose_device(config.device))


def _public(faces: FaceSet, config: Config) -> Splits:
    """Test and calibration people as in any run; who would have been trained on is one more stranger that attackers own."""
    data = config.data
    splits = split_identities(faces, min_images=data.min_images, held_out=data.held_out, seed=config.seed)
    nobody = torch.empty(0, dtype=torch.int64)
    auxiliary = tuple(sorted((*splits.auxiliary, *splits.train)))
    return replace(splits, train=(), auxiliary=auxiliary, train_images=nobody, gallery_images=nobody)
