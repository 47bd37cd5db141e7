"""The numbers of a federation, and who takes part in it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fedgc.algorithms import Push
from fedgc.robust import MEAN, Robust


@dataclass(frozen=True)
class Schedule:
    """The numbers of a federation; lr is the peak, warmed up over the first rounds and then lowered along a cosine.

    The server adds server_lr times its momentum, a decayed sum of mean updates (FedAvgM, Hsu et al. 2019); with momentum 0
    and a rate of 1 that is the mean update itself. robust: what stands in place of the mean.
    """

    rounds: int
    local_epochs: int
    batch_size: int
    lr: float
    head_lr_factor: float
    momentum: float
    weight_decay: float
    clip_norm: float | None
    participation: float
    push: Push
    augment: bool
    warmup_rounds: int = 2
    server_lr: float = 1.0
    server_momentum: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    robust: Robust = MEAN

    def lr_at(self, round: int) -> float:
        """Learning rate of round 1..rounds."""
        warm = min(1.0, round / (self.warmup_rounds + 1))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * (round - 1) / self.rounds))


@dataclass(frozen=True)
class Party:
    """One client: its photos (uint8), their classes, and the classes it owns. Classes run from 0 in order of clients."""

    client: int
    photos: Tensor
    labels: Tensor
    classes: tuple[int, ...]
