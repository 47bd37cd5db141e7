"""The default backbone: small enough to train a federation on a laptop."""

from __future__ import annotations

import math
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class _Residual(nn.Module):
    """Pre-activation block (He et al. 2016) that halves the side; the shortcut is pooled and projected to match."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return y + self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True))


class SmallFaceNet(nn.Module):
    """A stem and three residual stages; 0.45 M parameters at 48 px and 128 features."""

    def __init__(self, image_size: int, embedding_size: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.stages = nn.Sequential(*(_Residual(a, b) for a, b in pairwise(widths)))
        self.norm = nn.BatchNorm2d(widths[-1])
        side = math.ceil(image_size / 2 ** len(widths))
        self.embedding = nn.Linear(widths[-1] * side * side, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem((x - 0.5) / 0.25))
        return self.embedding(F.relu(self.norm(x)).flatten(1))
