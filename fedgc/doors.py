"""What a defense is: the doors through which it changes an update before somebody sees it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedgc.types import Charge, ClientUpdate, Named, Tensors


@dataclass(frozen=True)
class ClientPlan:
    """What a defense must know about one client before training: photos, expected batch size, steps in the whole run."""

    client: int
    images: int
    batch_size: int
    steps: int


@dataclass
class LocalSession:
    """What local training runs with: the optimiser to step, the batches (photo indices) to step on, and whether the
    optimiser bounds gradients itself."""

    optimizer: Any
    batches: Iterator[Tensor]
    bounded: bool = False


class Defense(Named):
    """What changes an update before somebody sees it. Every door is a no-op here.

    `prepared` is called once before round 0 and returns the defense with all its parameters fixed.
    """

    summary: ClassVar[str] = ""
    per_photo: ClassVar[bool] = False  # needs the gradient of each photo, in full precision

    def prepared(self, clients: Sequence[ClientPlan]) -> Defense:
        return self

    def check_module(self, module: torch.nn.Module) -> None:
        """Raise UsageError where the network cannot be trained under this defense."""

    def check_algorithm(self, name: str, head: str) -> None:
        """Raise UsageError where the algorithm of that name and kind of head (`fedgc.algorithms.Algorithm`) leaves this defense
        nothing to do."""

    def local_training(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Tensor],
        plan: ClientPlan,
        sampling: torch.Generator | None,
        noise: torch.Generator,
    ) -> AbstractContextManager[LocalSession]:
        """Around local training: may replace the optimiser and, where ``sampling`` is given, how batches are drawn."""
        return nullcontext(LocalSession(optimizer, batches))

    def blinded(self, rows: Tensor, secret: torch.Generator) -> Tensor:
        """Class embeddings (n, d), or changes of them, as the server is to hold them. Linear. secret: the same stream at every
        call, which all clients share and the server does not know."""
        return rows

    def unblinded(self, rows: Tensor, secret: torch.Generator) -> Tensor:
        """The inverse of `blinded`, at the clients."""
        return rows

    def outgoing(self, update: ClientUpdate, noise: torch.Generator) -> ClientUpdate:
        """On the update that leaves a client."""
        return update

    def aggregated(self, delta: Tensors, noise: torch.Generator) -> Tensors:
        """On the aggregate, at the server."""
        return delta

    def returning(self, client: int, rows: Tensor, noise: torch.Generator) -> Tensor:
        """On the class embeddings that the server sends back to one client."""
        return rows

    def charge(self, plan: ClientPlan, round: int, steps: int) -> Charge | None:
        """What these steps cost; None where the defense makes no promise."""
        return None

    def spent(self, ledger: Sequence[Charge], quick: bool = False) -> Mapping[str, Any] | None:
        """The privacy spent so far, with its unit; None where the defense makes no promise. quick: a looser bound will do."""
        return None

    def card(self) -> dict[str, Any]:
        """Public parameters, known to every attacker; a seed of the noise is not one."""
        return {k: v for k, v in self.model_dump(mode="json", exclude={"noise_seed"}).items() if v is not None}
