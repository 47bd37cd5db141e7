"""Quantization: every entry of an update leaves the client as one of a few levels, rounded by chance so that its mean is kept
(QSGD, Alistarh et al. 2017; at one bit the stochastic sign, at two TernGrad, Wen et al. 2017)."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from defenses.whole_update import refuse_running_statistics
from fedgc.doors import Defense, Scheme
from fedgc.types import ClientUpdate


class Quantization(Defense):
    """bits: of one entry. Each tensor is sent with one scale, its largest magnitude s: one bit tells -s from s, b bits tell
    2^b - 1 levels from -s over 0 to s. noise_seed: of the rounding; it is no secret that anything rests on."""

    name: Literal["quantization"] = "quantization"
    bits: int = Field(default=4, ge=1, le=8)
    noise_seed: int | None = None
    summary: ClassVar[str] = "round every entry of an update by chance to 1 to 8 bits, without bias; no guarantee"

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_updates(self.name)

    def check_module(self, module: nn.Module) -> None:
        refuse_running_statistics(module, self.name)

    def outgoing(self, update: ClientUpdate, noise: torch.Generator) -> ClientUpdate:
        tensors = {name: quantized(t, self.bits, noise) for name, t in update.tensors.items()}
        return ClientUpdate(update.client, tensors, update.num_examples)


def quantized(tensor: Tensor, bits: int, noise: torch.Generator) -> Tensor:
    """Unbiased: the expectation is the tensor. The error of an entry is below the distance of two levels."""
    scale = tensor.abs().max()
    most = 1 if bits == 1 else 2 ** (bits - 1) - 1
    base, step, least = (-scale, 2 * scale, 0) if bits == 1 else (torch.zeros_like(scale), scale / most, -most)
    if float(step) == 0:
        return tensor
    chance = torch.rand(tensor.shape, generator=noise, dtype=tensor.dtype).to(tensor.device)
    return base + step * ((tensor - base) / step + chance).floor().clamp_(least, most)
