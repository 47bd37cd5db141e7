"""An objective and its gradient by the images as one graph: traced with its double backward, compiled, and used for every victim.

Eager autograd builds and frees some two thousand small operations a step; one compiled graph takes about a third of the time on
a CPU. Compiling costs a minute or two, once for each network and number of photos: compiled code is kept on disk between runs.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attacks.objectives import Inputs, Objective, strided
from fedgc.limits import raise_if_short

# called from C++ rather than from Python, which costs as much as the smaller kernels; products and sums contracted
OPTIONS: dict[str, Any] = {"cpp_wrapper": True, "cpp.enable_floating_point_contract_flag": "fast"}
Step = Callable[[Inputs, Tensor], tuple[Tensor, Tensor]]
_graphs: dict[tuple[object, ...], Step] = {}


def distance_of(objective: Objective, compiled: bool) -> Callable[[Tensor], Tensor]:
    """images -> the objective there, differentiable once; by a compiled graph, or by plain autograd, which is the oracle."""
    inputs = objective.inputs
    if not compiled:
        return lambda images: objective.value(inputs, images)
    return lambda images: _Graph.apply(images, inputs, graph(objective, inputs, images))


class _Graph(torch.autograd.Function):
    """The graph made value and gradient in one go; backward hands the gradient on."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, images: Tensor, inputs: Inputs, step: Step) -> Tensor:
        value, slope = step(inputs, strided(images.detach()))
        ctx.save_for_backward(slope)
        return value

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *above: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors  # type: ignore[attr-defined]
        return above[0] * slope, None, None


def graph(objective: Objective, inputs: Inputs, images: Tensor) -> Step:
    """The compiled step of all objectives with this key and photos of this shape; eager where compiling fails."""
    key = (objective.key, tuple(images.shape), images.device.type)
    if key not in _graphs:
        _graphs[key] = _compiled(objective, inputs, strided(images.detach()))
    return _graphs[key]


def eager(objective: Objective) -> Step:
    def step(inputs: Inputs, images: Tensor) -> tuple[Tensor, Tensor]:
        with torch.enable_grad():
            x = images.detach().requires_grad_()
            value = objective.value(inputs, x)
            (slope,) = torch.autograd.grad(value, x)
        return value.detach(), slope.detach()

    return step


def _compiled(objective: Objective, inputs: Inputs, images: Tensor) -> Step:
    from torch.fx.experimental.proxy_tensor import make_fx

    plain = eager(objective)
    try:
        traced = make_fx(plain)(inputs, images)
        step: Step = torch.compile(traced, fullgraph=True, dynamic=False, options=OPTIONS)
        step(inputs, images)  # compiles
    except Exception as error:  # no C++ compiler, an operator that has no rule: both have an answer that is only slower
        raise_if_short(error)  # the plain step takes as much, and rounds otherwise
        warnings.warn(f"a step could not be compiled and runs at a third of the speed: {error}", stacklevel=2)
        return plain
    return step
