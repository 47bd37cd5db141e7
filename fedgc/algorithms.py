"""What distinguishes the training schemes: who holds the head, who sees it, and what the server does with it.

| | softmax over | head rows | server |
|---|---|---|---|
| centralized | all people | one party has everything | - |
| local | own people | one client alone, which sends nothing | - |
| fedavg (McMahan et al. 2017) | all people | sent to and averaged over everybody | average |
| fedpe | own people | never leave their client | averages the backbone |
| fedgc (Niu & Deng 2022) | own people | sent by their owner, returned to it alone | average, stack, correct |
| fedcos, fedaws (Yu et al. 2020) | own people | as fedgc | average, stack, spread out |

The last two are FedGC with another push in place of its correction: all strangers alike, or only those who are too near.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from fedgc import correction, spreading
from fedgc.types import BACKBONE, Tensors

T = TypeVar("T")


@dataclass(frozen=True)
class Push:
    """How the server pushes class embeddings apart, once a round, by weight times the learning rate.

    weight: None for as many pushes as centralised training would give: local steps a round over people, times the head's
    share of the learning rate. scale, normalised, all_classes: of FedGC's softmax (see `fedgc.correction`); margin: the
    distance that FedAwS asks for; squared: FedCos with squared cosines. precision of the products; above ``sample_above``
    rows, so many of them are drawn as negatives.
    """

    weight: float | None = None
    scale: float = 8.0
    normalised: bool = True
    all_classes: bool = False
    margin: float = 1.0
    squared: bool = False
    precision: Literal["float32", "bfloat16"] = "float32"
    sample_above: int = 200_000


Gradient = Callable[[Tensor, Tensor, Push, torch.Generator], Tensor]


def _fedgc(W: Tensor, owner: Tensor, push: Push, draw: torch.Generator) -> Tensor:
    return correction.gradient(
        W, owner, push.scale, normalised=push.normalised, own_in_denominator=push.all_classes, precision=push.precision,
        keep=min(1.0, push.sample_above / len(W)), generator=draw,
    )  # fmt: skip


def _fedcos(W: Tensor, owner: Tensor, push: Push, draw: torch.Generator) -> Tensor:
    return spreading.fedcos_gradient(W, owner, squared=push.squared)


def _fedaws(W: Tensor, owner: Tensor, push: Push, draw: torch.Generator) -> Tensor:
    return spreading.fedaws_gradient(W, owner, push.margin)


@dataclass(frozen=True)
class Algorithm:
    """head: "shared" (every row to everybody), "stacked" (a client's rows to the server and back) or "private".

    push: the gradient on all stacked rows (C, d) that the server steps along, from rows, the owner of each, and settings.
    alone: "all" people with one party, or only those of the "first" client.
    """

    name: str
    summary: str
    head: Literal["shared", "stacked", "private"]
    push: Gradient | None = None
    alone: Literal["all", "first"] | None = None

    @property
    def softmax_over_all(self) -> bool:
        return self.head == "shared"

    @property
    def corrects(self) -> bool:
        return self.push is not None

    def averaged(self, tensors: Mapping[str, T]) -> Mapping[str, T]:
        """What of an upload the server averages over clients."""
        return tensors if self.head == "shared" else backbone_part(tensors)

    def next_rows(self, W: Tensor, owner: Tensor, push: Push, step: float, draw: torch.Generator) -> Tensor:
        """The server's half after stacking: W -> W - step · push, W itself where nothing is pushed."""
        if self.push is None or step == 0 or len(owner.unique()) < 2:
            return W
        return W - step * self.push(W, owner, push, draw)


ALGORITHMS = {
    a.name: a
    for a in (
        Algorithm("centralized", "one party holds every photo: the upper end of utility", "shared", alone="all"),
        Algorithm(
            "local", "the first client trains alone, with its own photos: the lower end", "shared", alone="first"
        ),
        Algorithm("fedavg", "backbone and all class embeddings averaged, seen by everybody", "shared"),
        Algorithm("fedpe", "backbone averaged; class embeddings never leave their client", "private"),
        Algorithm("fedgc", "backbone averaged; class embeddings corrected by the server", "stacked", _fedgc),
        Algorithm("fedcos", "as fedgc, all strangers pushed apart alike (ablation)", "stacked", _fedcos),
        Algorithm("fedaws", "as fedgc, strangers nearer than a margin pushed apart (ablation)", "stacked", _fedaws),
    )
}


class RunningMean:
    """Weighted mean of named tensors in one accumulator, so that memory does not grow with the clients."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        if not self.total:
            self.total = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
        torch._foreach_add_([self.total[name] for name in tensors], list(tensors.values()), alpha=weight)


def backbone_part(tensors: Mapping[str, T]) -> dict[str, T]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}


def owner_tensor(owners: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(tuple(owners), dtype=torch.long, device=device)
