"""Secure aggregation, simulated: pairwise masks that cancel in the sum (Bonawitz et al. 2017), in the ring of 64-bit integers.

What is averaged leaves a client as its weighted share in fixed point, plus a uniform mask for each client after it and minus one
for each before it. A single upload is then uniform whatever it hides, and the sum of all is the sum of the shares. It is the
server's view that is simulated: there is no key agreement and nobody drops out. Class embeddings that the server stacks and
corrects (fedgc, fedcos, fedaws) it has to read; those stay in the clear.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedgc.doors import Defense, Pairwise, Scheme
from fedgc.errors import UsageError, WorkFailedError
from fedgc.types import Tensors

RING = 64  # bits of an integer; sums wrap around


class SecureAggregation(Defense):
    """bits: of an entry's fraction in fixed point; the sum of K shares is off by at most K · 2^-(bits + 1)."""

    name: Literal["secure-aggregation"] = "secure-aggregation"
    bits: int = Field(default=40, ge=8, le=50)
    masks: ClassVar[bool] = True
    of_mean: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "the server reads the sum of what it averages alone; stacked class embeddings stay in the clear"
    )

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_updates(self.name)
        if scheme.senders < 2:
            raise UsageError(
                f"{self.name} hides an update among others, and {scheme.senders} client sends in a round: raise "
                "federation.clients or federation.participation"
            )

    def masked(self, client: int, share: Tensors, present: Sequence[int], stream: Pairwise) -> Tensors:
        """share: float tensors; each comes back as int64, uniform where somebody else is present."""
        room = 2.0 ** (RING - 1 - self.bits) / len(present)
        for name, tensor in share.items():
            if not bool((tensor.abs() < room).all()):
                raise WorkFailedError(
                    f"{name} of client {client} is too large for {self.bits} bits of fraction: lower defense.bits"
                )
        out = {name: fixed(tensor, self.bits) for name, tensor in share.items()}
        for other in present:
            if other != client:
                pair = stream(other)
                for tensor in out.values():
                    tensor.add_(mask(tensor, pair), alpha=1 if client < other else -1)
        return out

    def unmasked(self, total: Tensors) -> Tensors:
        return {name: (tensor.double() / 2**self.bits).float() for name, tensor in total.items()}


def fixed(tensor: Tensor, bits: int) -> Tensor:
    """The nearest multiples of 2^-bits, counted in int64."""
    return (tensor.double() * 2**bits).round().to(torch.int64)


def mask(like: Tensor, stream: torch.Generator) -> Tensor:
    """Uniform over all 64-bit integers."""
    return (
        torch.empty(like.shape, dtype=torch.int64).random_(-(2 ** (RING - 1)), None, generator=stream).to(like.device)
    )
