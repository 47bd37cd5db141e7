"""The manifest of victims: which photos the recorded single steps are taken on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedgc.rng import generator
from fedgc.schedule import Party


def victims(parties: Sequence[Party], batch: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The manifest of recorded steps: enough batches of every client to hold ``count`` photos, drawn by the seed.

    Returns photos uint8 (K, batch, 3, S, S) and labels (K, batch) for each recorded step. Independent of algorithm and
    defense, so that every cell of a comparison is attacked on the same photos.
    """
    usable = min(len(p.photos) for p in parties)
    steps = min(math.ceil(count / (len(parties) * batch)), usable // batch)
    picks = [
        torch.randperm(len(p.photos), generator=generator(seed, "victims", batch, p.client))[: steps * batch]
        for p in parties
    ]
    out = []
    for n in range(steps):
        index = [pick[n * batch : (n + 1) * batch] for pick in picks]
        photos = torch.stack([p.photos[i.to(p.photos.device)] for p, i in zip(parties, index, strict=True)])
        labels = torch.stack([p.labels[i.to(p.labels.device)] for p, i in zip(parties, index, strict=True)])
        out.append((photos, labels))
    return out


def manifest_hash(recorded: Sequence[tuple[Tensor, Tensor]]) -> str:
    """SHA-256 of the victims' photos and classes, printed beside every attack figure."""
    digest = hashlib.sha256()
    for photos, labels in recorded:
        digest.update(photos.cpu().contiguous().numpy().tobytes())
        digest.update(labels.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
