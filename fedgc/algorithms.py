"""What distinguishes the training schemes: who holds the head, who sees it, and what the server does with it.

| | softmax over | head rows | server |
|---|---|---|---|
| centralized | all people | one party has everything | - |
| fedavg (McMahan et al. 2017) | all people | sent to and averaged over everybody | average |
| fedpe | own people | never leave their client | averages the backbone |
| fedgc (Niu & Deng 2022) | own people | sent by their owner, returned to it alone | average, stack, correct |
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedgc.correction import corrected
from fedgc.types import BACKBONE, Tensors


@dataclass(frozen=True)
class Algorithm:
    """head: "shared" (every row to everybody), "stacked" (a client's rows to the server and back) or "private"."""

    name: str
    summary: str
    head: Literal["shared", "stacked", "private"]
    corrects: bool = False
    one_party: bool = False

    @property
    def softmax_over_all(self) -> bool:
        return self.head == "shared"

    def next_rows(self, W: Tensor, owner: Tensor, weight: float, scale: float, lr: float) -> Tensor:
        """The server's half after stacking: W -> W - λη∇Reg(W) for FedGC, W otherwise."""
        return corrected(W, owner, scale, weight * lr) if self.corrects else W


ALGORITHMS = {
    a.name: a
    for a in (
        Algorithm("centralized", "one party holds every photo: the upper end of utility", "shared", one_party=True),
        Algorithm("fedavg", "backbone and all class embeddings averaged, seen by everybody", "shared"),
        Algorithm("fedpe", "backbone averaged; class embeddings never leave their client", "private"),
        Algorithm("fedgc", "backbone averaged; class embeddings corrected by the server", "stacked", corrects=True),
    )
}


class RunningMean:
    """Weighted mean of named tensors in one accumulator, so that memory does not grow with the clients."""

    def __init__(self) -> None:
        self.total: dict[str, Tensor] = {}

    def add(self, tensors: Tensors, weight: float) -> None:
        for name, tensor in tensors.items():
            if name in self.total:
                self.total[name].add_(tensor, alpha=weight)
            else:
                self.total[name] = tensor * weight


def backbone_part(tensors: Tensors) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}


def owner_tensor(owners: Iterable[int], device: torch.device | str = "cpu") -> Tensor:
    return torch.tensor(tuple(owners), dtype=torch.long, device=device)
