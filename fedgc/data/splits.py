"""Who is trained on, who sets the thresholds, who tests, and whose faces the attacker may know.

The four sets of people are disjoint. People with few images cannot be trained on, so they are the first to
serve the other three sets; only when they are too few are people taken from training.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedgc.data.faces import FaceSet
from fedgc.errors import DataError

FAIR_POOL = 100  # people for a fair test: 30 to calibrate on, 40 to test on, 30 for the attacker
SMALLEST_POOL = 5  # 2 + 2 + 1: an impostor pair needs two people
FEWEST_PEOPLE = 8
FEWEST_TRAINED = 2

_MOVE, _DEAL, _GALLERY, _CLIENTS, _SIZES = 1, 2, 3, 4, 5  # each use of a seed has a stream of its own

_IDENTITIES = ("train", "calibration", "test", "auxiliary")
_IMAGES = ("train_images", "gallery_images")


@dataclass(frozen=True, eq=False)
class Splits:
    """Disjoint sets of people (indices into ``FaceSet.names``, ascending) and the photos of the trained ones.

    train_images, gallery_images: int64 indices into ``FaceSet.images``; together all photos of ``train``.
    Gallery photos are never trained on.
    """

    train: tuple[int, ...]
    calibration: tuple[int, ...]
    test: tuple[int, ...]
    auxiliary: tuple[int, ...]
    train_images: Tensor
    gallery_images: Tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Splits) and self.to_json() == other.to_json()

    __hash__ = None  # type: ignore[assignment]

    def to_json(self) -> dict[str, list[int]]:
        """A dictionary of lists, for ``json.dumps``."""
        people = {key: list(getattr(self, key)) for key in _IDENTITIES}
        return people | {key: getattr(self, key).tolist() for key in _IMAGES}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Splits:
        """The inverse of :meth:`to_json`.

        Raises:
            DataError: a list is missing, holds something else than indices, or the sets overlap.
        """
        lists = {key: _indices(stored, key) for key in (*_IDENTITIES, *_IMAGES)}
        for kind, keys in (("people", _IDENTITIES), ("images", _IMAGES)):
            together = [index for key in keys for index in lists[key]]
            if len(set(together)) < len(together):
                raise DataError(f"the stored splits share {kind} between {', '.join(keys)}; split the data again")
        train, calibration, test, auxiliary = (tuple(lists[key]) for key in _IDENTITIES)
        train_images, gallery_images = (torch.tensor(lists[key], dtype=torch.int64) for key in _IMAGES)
        return cls(train, calibration, test, auxiliary, train_images, gallery_images)

    def hashes(self, faces: FaceSet) -> dict[str, str]:
        """SHA-256 (hex) of each set, over the names of its people and the files of its photos."""
        photos = {key: faces.of(getattr(self, key)) for key in _IDENTITIES[1:]}
        photos |= {"train": self.train_images, "gallery": self.gallery_images}
        people = {key: getattr(self, key) for key in _IDENTITIES} | {"gallery": self.train}
        return {
            key: _digest([faces.names[i] for i in people[key]], [faces.files[i] for i in photos[key].tolist()])
            for key in (*_IDENTITIES, "gallery")
        }


def split_identities(faces: FaceSet, *, min_images: int, held_out: int = 3, seed: int) -> Splits:
    """Split people into training, calibration, test and auxiliary sets; hold photos of the trained ones out.

    A person is trained on with at least ``min_images`` images. The others (with at least two) are dealt to
    calibration, test and auxiliary in the shares 0.30 / 0.40 / 0.30; should they be fewer than 100 (or half
    of all people, if that is less), people drawn from the training set join them first. ``held_out`` photos
    of each trained person are kept out of training, but never more than a third of the person's photos.

    Raises:
        DataError: too few people, or an argument is out of range.
    """
    if min_images < 2 or held_out < 0 or seed < 0:
        raise DataError(
            f"data.min_images={min_images}, {held_out} held-out images, seed={seed}: "
            "choose min_images of at least 2, and no negative number"
        )
    counts = faces.counts().tolist()
    many = [person for person, count in enumerate(counts) if count >= min_images]
    few = [person for person, count in enumerate(counts) if 2 <= count < min_images]
    problem = too_few(counts, min_images)
    if problem is not None:
        raise DataError(f"{faces.source!r}: {problem}")
    moved = many_to_move(len(many), len(few))
    drawn = _rng(seed, _MOVE).permutation(many).tolist()
    train, pool = sorted(drawn[moved:]), sorted(few + drawn[:moved])
    calibration, test, auxiliary = _deal(pool, seed)
    train_images, gallery_images = _hold_out(faces, train, held_out, seed)
    return Splits(tuple(train), calibration, test, auxiliary, train_images, gallery_images)


def many_to_move(many: int, few: int) -> int:
    """How many trainable people must join ``few`` others for a fair test, up to half of all people.

    Eight or nine people give five, since calibration and test need two people each and the attacker one.
    """
    target = min(FAIR_POOL, max((many + few) // 2, SMALLEST_POOL))
    return max(0, target - few)


def too_few(counts: Sequence[int], min_images: int) -> str | None:
    """Why people with these numbers of images cannot be split, and what to change; None if they can."""
    usable = sorted(count for count in counts if count >= 2)
    many = sum(count >= min_images for count in usable)
    if len(usable) < FEWEST_PEOPLE:
        return f"{len(usable)} people have two images or more, and {FEWEST_PEOPLE} are needed; add people"
    if many < FEWEST_TRAINED:
        return (
            f"{many} of {len(usable)} people have data.min_images={min_images} images or more, "
            f"and {FEWEST_TRAINED} are needed; lower data.min_images to {usable[-FEWEST_TRAINED]} or less, "
            "or add images"
        )
    if len(usable) - many + many_to_move(many, len(usable) - many) > len(usable) - FEWEST_TRAINED:
        return f"{len(usable)} people are too few to train on some and test on others; add people"
    return None


def partition(train: Sequence[int], clients: int, seed: int, unevenness: float = 0.0) -> tuple[tuple[int, ...], ...]:
    """Deal people to clients by a seeded shuffle; each person has one client, each client at least one person.

    Sizes differ by at most one; with ``unevenness`` u > 0 they are near a log-normal draw, exp(u N(0, 1)) to scale.

    Raises:
        DataError: there are fewer people than clients.
    """
    people = sorted(train)
    if seed < 0:
        raise DataError(f"seed={seed}: choose 0 or more")
    if not 1 <= clients <= len(people):
        raise DataError(
            f"federation.clients={clients}, but {len(people)} people are trained on and each client "
            f"needs one: choose 1 to {len(people)} clients, or lower data.min_images to train on more people"
        )
    drawn = _rng(seed, _CLIENTS).permutation(people).tolist()
    if not unevenness:
        return tuple(tuple(sorted(drawn[client::clients])) for client in range(clients))
    share = np.exp(unevenness * _rng(seed, _SIZES).standard_normal(clients))
    sizes = 1 + _rng(seed, _SIZES, 1).multinomial(len(people) - clients, share / share.sum())
    stops = np.cumsum(sizes)
    return tuple(tuple(sorted(drawn[stop - size : stop])) for size, stop in zip(sizes, stops, strict=True))


def _deal(pool: Sequence[int], seed: int) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Calibration, test and auxiliary people in the shares 0.30 / 0.40 / 0.30."""
    drawn = _rng(seed, _DEAL).permutation(pool).tolist()
    calibration, auxiliary = (3 * len(pool) + 5) // 10, 3 * len(pool) // 10
    test = len(pool) - calibration - auxiliary
    parts = drawn[:calibration], drawn[calibration : calibration + test], drawn[calibration + test :]
    return tuple(sorted(parts[0])), tuple(sorted(parts[1])), tuple(sorted(parts[2]))


def _hold_out(faces: FaceSet, train: Sequence[int], held_out: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of the photos to train on and of those kept for galleries, both ascending."""
    kept: list[int] = []
    gallery: list[int] = []
    for person in train:
        photos = faces.of([person]).numpy()
        drawn = _rng(seed, _GALLERY, person).permutation(photos).tolist()
        out = min(held_out, len(photos) // 3)
        gallery += sorted(drawn[:out])
        kept += sorted(drawn[out:])
    return torch.tensor(kept, dtype=torch.int64), torch.tensor(gallery, dtype=torch.int64)


def _rng(*entropy: int) -> np.random.Generator:
    return np.random.default_rng(list(entropy))


def _digest(names: Sequence[str], files: Sequence[str]) -> str:
    return hashlib.sha256(repr((list(names), list(files))).encode()).hexdigest()


def _indices(stored: Mapping[str, Any], key: str) -> list[int]:
    values = stored.get(key)
    if not isinstance(values, list) or any(type(value) is not int or value < 0 for value in values):
        raise DataError(f"the stored splits have no list of indices {key!r}; split the data again")
    return values
