"""MobileFaceNet (Chen et al. 2018, arXiv 1804.07573): face verification at a million parameters."""

from __future__ import annotations

import math

from torch import Tensor, nn

# Table 1 of the paper: expansion of a bottleneck, channels it makes, how many, stride of the first
STAGES = ((2, 64, 5, 2), (4, 128, 1, 2), (2, 128, 6, 1), (4, 128, 1, 2), (2, 128, 2, 1))
STRIDE = 16  # of the whole network before its global convolution


def _unit(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.PReLU(outputs))


class _Bottleneck(nn.Module):
    """Inverted residual (Sandler et al. 2018): expand, filter every channel by itself, project without activation."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.expand = _unit(inputs, wide, 1)
        self.depthwise = _unit(wide, wide, 3, stride, groups=wide)
        self.project = nn.Sequential(nn.Conv2d(wide, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.residual else y


class MobileFaceNet(nn.Module):
    """Photos of 112 px give the paper's 7 x 7 map before the global depthwise convolution; other sides, another kernel.

    After that convolution maps are single numbers, so that the paper's last 1 x 1 convolution is a linear layer.
    """

    def __init__(self, image_size: int, embedding_size: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(_unit(3, 64, 3, stride=2), _unit(64, 64, 3, groups=64))
        blocks, channels = [], 64
        for expansion, outputs, count, stride in STAGES:
            for number in range(count):
                blocks.append(_Bottleneck(channels, outputs, stride if number == 0 else 1, expansion))
                channels = outputs
        self.blocks = nn.Sequential(*blocks)
        self.widen = _unit(channels, 512, 1)
        self.pool = nn.Conv2d(512, 512, math.ceil(image_size / STRIDE), groups=512, bias=False)
        self.pool_norm = nn.BatchNorm1d(512)
        self.embedding = nn.Linear(512, embedding_size, bias=False)
        self.norm = nn.BatchNorm1d(embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.widen(self.blocks(self.stem((x - 0.5) / 0.5)))
        return self.norm(self.embedding(self.pool_norm(self.pool(x).flatten(1))))
