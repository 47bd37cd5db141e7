"""Pruning: of every update only its largest entries leave the client (the idea of deep gradient compression, Lin et al. 2018).

There is no error feedback: what was cut is lost. A residual would be private state of each client that grows with the backbone.
"""

from __future__ import annotations

import math
from typing import ClassVar, Literal

import torch
from pydantic import Field

from fedgc.doors import Defense, Scheme
from fedgc.types import ClientUpdate, Tensors


class Pruning(Defense):
    """keep: share of the entries of an update, over its backbone and class embeddings together, that are sent; the largest."""

    name: Literal["pruning"] = "pruning"
    keep: float = Field(default=0.1, gt=0, le=1)
    summary: ClassVar[str] = "send the largest entries of every update alone; no guarantee"

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_updates(self.name)

    def outgoing(self, update: ClientUpdate, noise: torch.Generator) -> ClientUpdate:
        return ClientUpdate(update.client, largest(update.tensors, self.keep), update.num_examples)


def largest(tensors: Tensors, share: float) -> Tensors:
    """The tensors with the ceil(share · entries) entries of largest magnitude, over all of them, and zeros elsewhere."""
    sizes = torch.cat([t.abs().flatten() for t in tensors.values()])
    count = math.ceil(share * len(sizes))
    if count == len(sizes):
        return tensors
    kept = torch.zeros(len(sizes), dtype=torch.bool, device=sizes.device)
    kept[sizes.topk(count).indices] = True
    parts = kept.split([t.numel() for t in tensors.values()])
    return {name: t * mask.view_as(t) for (name, t), mask in zip(tensors.items(), parts, strict=True)}
