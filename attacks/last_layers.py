"""The last linear layer of a backbone with the norms around it, and what an update shows of their gradients."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from attacks.updates import gradient
from fedgc.backbones.norms import FrozenBatchNorm
from fedgc.models import load_backbone
from fedgc.rng import generator
from fedgc.types import BACKBONE, LocalConstants, ObservedUpdate


@dataclass(frozen=True)
class Tail:
    """The last linear layer of a backbone, the flat norm on its output and the one on its input, if any, in float64 and at the
    parameters that the update started from; gradients: what the update shows of each parameter.

    Found by what a layer is and what it was given in a forward pass. rectified: whether the layer's input is that of a ReLU.
    """

    linear: nn.Linear
    norm: nn.Module | None
    feeding: nn.Module | None
    rectified: bool
    gradients: Mapping[nn.Module, Mapping[str, Tensor]]

    def features(self, inputs: Tensor) -> Tensor:
        """(n, f) -> (n, d), the backbone's features but for their length where it ends in a normalisation."""
        with torch.no_grad():
            y = self.linear(inputs)
            return y if self.norm is None else cast(Tensor, self.norm(y))

    def output_of(self, norm: nn.Module | None) -> tuple[Tensor, Tensor] | None:
        """(d,) γ dγ/dβ + β of one photo, and dβ, the square of which says how far each number can be trusted."""
        seen = self.gradients.get(norm, {}) if norm is not None else {}
        if norm is None or not {"weight", "bias"} <= set(seen) or not bool(seen["bias"].any()):
            return None
        dgamma, dbeta = seen["weight"], seen["bias"]
        gamma, beta = map_of(norm)
        return gamma * dgamma / torch.where(dbeta == 0, torch.ones_like(dbeta), dbeta) + beta, dbeta


def tail(update: ObservedUpdate, constants: LocalConstants) -> Tail | None:
    """The last layers behind an update, or None where their gradient does not reach the observer."""
    like = next((t for n, t in update.before.items() if n.startswith(BACKBONE)), None)
    if like is None:
        return None
    backbone = load_backbone(constants.spec, update.before)
    calls = _calls(backbone, constants.spec.image_size)
    names = {module: name for name, module in backbone.named_modules()}
    linears = [c for c in calls if isinstance(c[0], nn.Linear)]
    if not linears or f"{BACKBONE}{names[linears[-1][0]]}.weight" not in update.delta:
        return None
    linear, given, made = linears[-1]
    norm = next((m for m, x, _ in calls if x is made and _flat_norm(m)), None)
    feeding = next((m for m, _, y in calls if y is given and _flat_norm(m)), None)
    observed = gradient(update, constants)
    gradients = {
        module: {
            name: observed[key].double()
            for name, _ in module.named_parameters(recurse=False)
            if (key := f"{BACKBONE}{names[module]}.{name}") in observed
        }
        for module in (linear, norm, feeding)
        if module is not None
    }
    for module in gradients:
        module.to(like.device).double()
    rectified = bool((given >= 0).all()) and bool((given == 0).any())
    return Tail(cast(nn.Linear, linear), norm, feeding, rectified, gradients)


def _calls(backbone: nn.Module, size: int) -> list[tuple[nn.Module, Tensor, Tensor]]:
    """(layer, input, output) of linear layers and norms in the order of their calls, on two photos of noise."""
    calls: list[tuple[nn.Module, Tensor, Tensor]] = []
    watched = [m for m in backbone.modules() if isinstance(m, nn.Linear) or _flat_norm(m)]
    hooks = [m.register_forward_hook(lambda m, x, y: calls.append((m, x[0], y))) for m in watched]
    with torch.no_grad():
        noise = torch.rand((2, 3, size, size), generator=generator("probe"))
        backbone(noise.to(next(backbone.parameters()).dtype))
    for hook in hooks:
        hook.remove()
    return calls


def _flat_norm(module: nn.Module) -> bool:
    """Whether a layer can be a norm of flat features (one that is given maps is not found by what it was given)."""
    one_group = isinstance(module, nn.GroupNorm) and module.num_groups == 1
    return one_group or isinstance(module, nn.LayerNorm | nn.BatchNorm1d | FrozenBatchNorm)


def is_affine(norm: nn.Module) -> bool:
    return isinstance(norm, nn.BatchNorm1d | FrozenBatchNorm)  # with fixed statistics, as in a recorded step


def affine(norm: nn.Module, like: Tensor) -> tuple[Tensor, Tensor]:
    """A, c of an elementwise z = A·y + c."""
    with torch.no_grad():
        shift = norm(torch.zeros_like(like)[None])[0]
        return norm(torch.ones_like(like)[None])[0] - shift, shift


def map_of(norm: nn.Module) -> tuple[Tensor, Tensor]:
    """γ and β of a norm."""
    return cast(Tensor, norm.weight).detach(), cast(Tensor, norm.bias).detach()


def onto(norm: nn.Module, directions: Tensor) -> Tensor:
    """(n, d) lengthened so that they can be outputs of a norm over all features: |(s·v - β)/γ|² = d, its positive root."""
    gamma, beta = map_of(norm)
    a = (directions / gamma).square().sum(1)
    b = -2 * (directions * beta / gamma**2).sum(1)
    c = (beta / gamma).square().sum() - directions.shape[1]
    return directions * ((-b + (b * b - 4 * a * c).clamp_min(0).sqrt()) / (2 * a))[:, None]
