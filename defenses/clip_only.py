"""Clipping without noise: the update that leaves a client is shortened to a norm, as client-level DP does before its noise.

It promises nothing. It stands beside `client-dp` to tell what its clipping does from what its noise does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field

from defenses.whole_update import clipped
from fedgc.doors import Defense, Scheme
from fedgc.types import ClientUpdate


class ClipOnly(Defense):
    """max_grad_norm: S, the largest Euclidean norm of an update, over its backbone and class embeddings together."""

    name: Literal["clip-only"] = "clip-only"
    max_grad_norm: float = Field(default=0.5, gt=0)
    summary: ClassVar[str] = "shorten every update to a norm, without noise; no guarantee, the control for client-dp"

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_updates(self.name)

    def outgoing(self, update: ClientUpdate, noise: torch.Generator) -> ClientUpdate:
        return ClientUpdate(update.client, clipped(update.tensors, self.max_grad_norm), update.num_examples)
