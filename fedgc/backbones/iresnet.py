"""The residual nets of ArcFace (Deng et al. 2019, arXiv 1801.07698, sec. 3.1): improved units, output E."""

from __future__ import annotations

import math

from torch import Tensor, nn

WIDTHS = (64, 128, 256, 512)
STRIDE = 16  # every stage halves the side; neither stem nor pooling does


class _Unit(nn.Module):
    """BN, conv, BN, PReLU, conv, BN (Han et al. 2017); the second convolution carries the stride."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.residual = nn.Sequential(
            nn.BatchNorm2d(inputs),
            nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.PReLU(outputs),
            nn.Conv2d(outputs, outputs, 3, stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return self.residual(x) + self.shortcut(x)


class IResNet(nn.Module):
    """units: how many of each width. Without the paper's dropout, which draws from the global generator."""

    def __init__(self, units: tuple[int, int, int, int], image_size: int, embedding_size: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.PReLU(64))
        stages, channels = [], 64
        for outputs, count in zip(WIDTHS, units, strict=True):
            stages += [_Unit(channels, outputs, 2), *(_Unit(outputs, outputs, 1) for _ in range(count - 1))]
            channels = outputs
        self.stages = nn.Sequential(*stages)
        self.last = nn.BatchNorm2d(channels)
        side = math.ceil(image_size / STRIDE)
        self.embedding = nn.Linear(channels * side * side, embedding_size)
        self.norm = nn.BatchNorm1d(embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.stages(self.stem((x - 0.5) / 0.5)))
        return self.norm(self.embedding(x.flatten(1)))
