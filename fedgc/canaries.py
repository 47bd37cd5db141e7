"""Canaries: images that are put into training or left out by a coin each, so that one run can be audited.

They are the trials of an audit in one training run (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846). Each is a picture of
nobody, so that no set of people lends a photo: blots of colour, symmetric and without detail, which mirroring, shifts and turns
of training leave much as they were, and unlike every face, so that their gradients are their own. It stands under the class of a
person whom it does not show, which only a model that saw it has a reason to learn. Painted faces, stripes, white noise and finer
blots were tried in a round of DP-SGD, and gave the attack less.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc.rng import generator
from fedgc.schedule import Party

GRID, CONTRAST = 4, 0.8  # blots along a side; standard deviation of their colours, much of which saturates


@dataclass(frozen=True)
class Planting:
    """photos: uint8 (m, 3, S, S); classes, clients: int64 (m,), where each candidate goes if its coin says so; inside: bool (m,),
    what the coins said."""

    photos: Tensor
    classes: Tensor
    clients: Tensor
    inside: Tensor


def plan_planting(parties: Sequence[Party], count: int, size: int, seed: int) -> Planting:
    """``count`` candidates dealt evenly over clients, each with a class of its client by chance and a fair coin of its own."""
    clients = torch.tensor([parties[i % len(parties)].client for i in range(count)], dtype=torch.long)
    draw = generator(seed, "canaries", "classes")
    held = {p.client: p.classes for p in parties}
    classes = [held[k][int(torch.randint(len(held[k]), (1,), generator=draw))] for k in clients.tolist()]
    inside = torch.rand(count, generator=generator(seed, "canaries", "coins")) < 0.5
    photos = blots(count, size, generator(seed, "canaries", "photos"))
    return Planting(photos, torch.tensor(classes, dtype=torch.long), clients, inside)


def blots(count: int, size: int, draw: torch.Generator) -> Tensor:
    """uint8 (count, 3, size, size): smooth colours by chance, the right half a mirror image of the left."""
    coarse = torch.randn(count, 3, GRID, GRID, generator=draw)
    coarse = (coarse + coarse.flip(3)) / 2**0.5
    smooth = F.interpolate(coarse, (size, size), mode="bicubic", align_corners=False)
    return ((0.5 + CONTRAST * smooth).clamp(0, 1) * 255).round().to(torch.uint8)


def planted(parties: Sequence[Party], planting: Planting | None) -> tuple[Party, ...]:
    """The parties with the candidates whose coin said so among their photos, after those of people."""
    if planting is None:
        return tuple(parties)
    found = []
    for party in parties:
        mine = planting.inside & (planting.clients == party.client)
        photos, labels = planting.photos[mine].to(party.photos), planting.classes[mine].to(party.labels)
        found.append(replace(party, photos=torch.cat([party.photos, photos]), labels=torch.cat([party.labels, labels])))
    return tuple(found)
