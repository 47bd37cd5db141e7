"""What a defense is: the doors through which it changes an update before somebody sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from fedgc.errors import UsageError
from fedgc.types import Charge, ClientUpdate, Named, Tensors

Pairwise = Callable[[int], torch.Generator]
Drawn = Mapping[tuple[int, int], tuple[int, int]]  # (round, client) -> (steps, photos in all of them)


@dataclass(frozen=True)
class ClientPlan:
    """What a defense must know about one client before training: photos, expected batch size, steps and rounds in the whole
    run, and the person of each photo, int64 (images,), where a defense may count people."""

    client: int
    images: int
    batch_size: int
    steps: int
    people: Tensor | None = None
    rounds: int = 1

    @property
    def persons(self) -> int:
        return self.images if self.people is None else len(self.people.unique())

    @property
    def most_photos(self) -> int:
        """Of one person."""
        return (
            1 if self.people is None or not len(self.people) else int(self.people.unique(return_counts=True)[1].max())
        )


@dataclass(frozen=True)
class Scheme:
    """What a defense must know about the training scheme. head: who holds class embeddings (`fedgc.algorithms.Algorithm`);
    sends: whether there is a server to send to; corrects: whether it changes class embeddings; senders: clients in a round."""

    algorithm: str
    head: Literal["shared", "stacked", "private"]
    sends: bool
    corrects: bool
    senders: int

    def require_updates(self, defense: str) -> None:
        """Raises UsageError where no client sends anything."""
        self.require(self.sends, defense, "what clients send", "fedavg, fedpe, fedgc, fedcos or fedaws")

    def require_uploaded_rows(self, defense: str) -> None:
        """Raises UsageError unless every client uploads class embeddings that are its own."""
        self.require(
            self.head == "stacked",
            defense,
            "class embeddings that their owner alone uploads",
            "fedgc, fedcos or fedaws",
        )

    def require(self, holds: bool, defense: str, what: str, able: str) -> None:
        """Raises UsageError unless ``holds``: that ``defense`` changes ``what``, which only the algorithms ``able`` have."""
        if not holds:
            raise UsageError(
                f"{defense} changes {what}, and there is none under {self.algorithm}: use it with "
                f"federation.algorithm = {able}, or set defense.name = none"
            )


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
    masks: ClassVar[bool] = False  # the server reads no averaged update but their sum
    blinds: ClassVar[bool] = False  # class embeddings on the wire are other than those of the clients
    of_mean: ClassVar[bool] = False  # its promise, or its sum, is of the weighted mean
    keeps_rows: ClassVar[bool] = False  # clients keep class embeddings of their own, other than those that they upload

    def prepared(self, clients: Sequence[ClientPlan]) -> Defense:
        return self

    def check_module(self, module: torch.nn.Module) -> None:
        """Raise UsageError where the network cannot be trained under this defense."""

    def forms_photo_gradients(self, module: torch.nn.Module) -> bool:
        """Whether training this network holds the gradient of every photo of a batch at once."""
        return False

    def largest_batch(self, plan: ClientPlan) -> int:
        """Photos in the largest batch that this client is to be reckoned with in the whole run."""
        return plan.batch_size

    def check_scheme(self, scheme: Scheme) -> None:
        """Raise UsageError where the training scheme has nothing that this defense could change."""

    def local_training(
        self,
        module: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        batches: Iterator[Tensor],
        plan: ClientPlan,
        sampling: torch.Generator | None,
        noise: torch.Generator | None,
    ) -> AbstractContextManager[LocalSession]:
        """Around local training: may replace the optimiser and, where ``sampling`` is given, how batches are drawn. noise: given
        where ``per_photo``."""
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

    def uploading(self, client: int, rows: Tensor, noise: torch.Generator) -> Tensor:
        """Where ``keeps_rows``: what a client uploads in place of its own class embeddings (n, d). It applies to its own what
        the server's answer changed in those. noise: the same stream in every round."""
        return rows

    def receiving(self, client: int, change: Tensor, held: Tensor) -> Tensor:
        """On how far the server lets a client's class embeddings move from those that it last returned, ``held`` (n, d). A
        public rule without chance, so that clients know what is taken of their ``change`` (n, d) and send no more."""
        return change

    def masked(self, client: int, share: Tensors, present: Sequence[int], stream: Pairwise) -> Tensors:
        """Where ``masks``: what a client sends in place of its weighted share of the mean, int64, to be added up. present:
        all who send in this round; stream(k): the randomness that it shares with client k and with nobody else."""
        raise NotImplementedError

    def unmasked(self, total: Tensors) -> Tensors:
        """Where ``masks``: the sum of all shares, of the sum of what arrived."""
        raise NotImplementedError

    def aggregated(self, delta: Tensors, share: float, noise: torch.Generator) -> Tensors:
        """On a weighted sum of updates, at the server. share: the largest weight of one client in it, which is 1 for class
        embeddings that are stacked and not averaged."""
        return delta

    def returning(self, client: int, rows: Tensor, uploaded: Tensor, noise: torch.Generator) -> Tensor:
        """On the class embeddings (n, d) that the server sends back to one client. uploaded: before they were corrected."""
        return rows

    def charge(self, plan: ClientPlan, round: int, steps: int) -> Charge | None:
        """What these steps cost; None where the defense makes no promise."""
        return None

    def spent(self, ledger: Sequence[Charge], quick: bool = False) -> Mapping[str, Any] | None:
        """The privacy spent so far, with its unit; None where the defense makes no promise. quick: a looser bound will do."""
        return None

    def contradicted(self, plans: Sequence[ClientPlan], ledger: Sequence[Charge], drawn: Drawn) -> str | None:
        """Why what ran is not what the ledger was charged for, so that no epsilon holds; None where nothing speaks against it."""
        return None

    def card(self) -> dict[str, Any]:
        """Public parameters, known to every attacker; a seed of the noise is not one."""
        return {k: v for k, v in self.model_dump(mode="json", exclude={"noise_seed"}).items() if v is not None}
