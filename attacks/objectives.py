"""How far the gradient of candidate images is from the observed one: pure functions of tensors, one graph for all victims.

What differs between victims (parameters, observed gradient, labels) is in ``inputs``; what does not (the network, the metric) is
in the object, and ``key`` tells such objects apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from fedgc import heads
from fedgc.models import FaceModel, build_model
from fedgc.types import BACKBONE, HEAD, ModelSpec, Tensors

Metric = Literal["cosine", "l2"]
Inputs = dict[str, list[Tensor]]
TINY = 1e-24


class Objective(Protocol):
    """value: (inputs, images (B, 3, H, W)) -> a number, twice differentiable in the images, and traceable."""

    @property
    def inputs(self) -> Inputs: ...

    @property
    def key(self) -> tuple[object, ...]: ...

    def value(self, inputs: Inputs, images: Tensor) -> Tensor: ...


def distance(trial: Sequence[Tensor], observed: Sequence[Tensor], metric: Metric) -> Tensor:
    """Of all parameters as one vector: 1 - cosine, in [0, 2], blind to a common factor and so to clipping of the whole; or the
    squared distance over the observed squared length. ``observed`` has length one."""
    along = torch.stack([(t * o).sum() for t, o in zip(trial, observed, strict=True)]).sum()
    square = torch.stack([t.square().sum() for t in trial]).sum()
    return 1 - along / (square + TINY).sqrt() if metric == "cosine" else 1 - 2 * along + square


@dataclass(frozen=True)
class Problem:
    """The tensors that every objective needs: all parameters as they were, and the observed gradient over its own length.

    Parameters whose observed gradient is zero are left out: they say nothing, and a layer may be frozen.
    """

    before: dict[str, Tensor]
    observed: dict[str, Tensor]
    length: float

    @classmethod
    def of(cls, before: Tensors, gradient: Tensors, trained: Sequence[str]) -> Problem:
        seen = {n: gradient[n].detach().float() for n in trained if n in gradient and bool(gradient[n].any())}
        length = sum(float(g.double().square().sum()) for g in seen.values()) ** 0.5
        observed = {name: strided(g / length) for name, g in seen.items()}
        return cls({name: strided(t.detach().float()) for name, t in before.items()}, observed, length)

    def inputs(self, **more: Tensor) -> Inputs:
        tensors = {"before": list(self.before.values()), "observed": list(self.observed.values())}
        return tensors | {name: [tensor] for name, tensor in more.items()}

    def parameters(self, inputs: Inputs) -> tuple[dict[str, Tensor], list[Tensor]]:
        """All tensors by name, and those of them to differentiate by."""
        tensors = {
            name: t.detach().requires_grad_(name in self.observed)
            for name, t in zip(self.before, inputs["before"], strict=True)
        }
        return tensors, [tensors[name] for name in self.observed]


def strided(tensor: Tensor) -> Tensor:
    """In the layout in which convolutions are fastest on a CPU; compiled graphs hold for one layout."""
    layout = torch.channels_last if tensor.dim() == 4 else torch.contiguous_format
    return tensor.contiguous(memory_format=layout)


@dataclass(frozen=True)
class HeadMatching:
    """The gradient of the loss, by the head's rows and labels: int64 (B,), or None where the images come with label logits
    behind their pixels (`attacks.priors.Joint`), as Zhu et al. (2019) search both."""

    model: FaceModel
    problem: Problem
    spec: ModelSpec
    labels: Tensor | None
    metric: Metric = "cosine"

    @classmethod
    def of(
        cls, before: Tensors, gradient: Tensors, labels: Tensor | None, spec: ModelSpec, metric: Metric = "cosine"
    ) -> HeadMatching:
        model = build_model(spec, len(before[HEAD])).to(before[HEAD].device).eval()
        return cls(model, Problem.of(before, gradient, [n for n, _ in model.named_parameters()]), spec, labels, metric)

    @property
    def inputs(self) -> Inputs:
        unit = torch.tensor(1 / self.problem.length, device=self.problem.before[HEAD].device)
        return self.problem.inputs(unit=unit, **({} if self.labels is None else {"labels": self.labels}))

    @property
    def key(self) -> tuple[object, ...]:
        p = self.problem
        return ("head", self.spec, len(p.before[HEAD]), self.labels is None, tuple(p.observed), self.metric)

    def value(self, inputs: Inputs, images: Tensor) -> Tensor:
        tensors, trained = self.problem.parameters(inputs)
        loss = self.loss(tensors, inputs, images) * inputs["unit"][0]  # its gradient in the unit of the observed one
        return distance(torch.autograd.grad(loss, trained, create_graph=True), inputs["observed"], self.metric)

    def loss(self, tensors: dict[str, Tensor], inputs: Inputs, images: Tensor) -> Tensor:
        """The client's, at parameters and buffers by name."""
        if self.labels is None:
            images, logits = unpacked(images, self.spec.image_size)
            return soft_loss(functional_call(self.model, tensors, (images,)), logits, self.spec)
        return heads.loss(functional_call(self.model, tensors, (images,)), inputs["labels"][0], self.spec)


def unpacked(joint: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """(B, 3·S·S + C) -> images (B, 3, S, S) and label logits (B, C)."""
    pixels = 3 * size * size
    return joint[:, :pixels].unflatten(1, (3, size, size)), joint[:, pixels:]


def soft_loss(cosines: Tensor, logits: Tensor, spec: ModelSpec) -> Tensor:
    """Cross entropy with label probabilities that are searched too; margins, which need a label, on the probable share."""
    share = F.softmax(logits, dim=1)
    margin = 0.0 if spec.margin == "none" else spec.margin_size
    return F.cross_entropy(spec.scale * (cosines - margin * share), share)


@dataclass(frozen=True)
class PullMatching:
    """The gradient Σ_i ∂<δ_i, z(x_i)>/∂θ of the backbone, δ_i = dL/dz_i being known in closed form (`attacks.backbone_algebra`).

    No head, label, or loss is left in the problem: linear in J(x), it has none of the flat places where a candidate's own
    softmax is saturated. pulls: (B, d).
    """

    backbone: nn.Module
    problem: Problem
    spec: ModelSpec
    pulls: Tensor
    metric: Metric = "cosine"

    @classmethod
    def of(
        cls, before: Tensors, gradient: Tensors, pulls: Tensor, spec: ModelSpec, metric: Metric = "cosine"
    ) -> PullMatching:
        backbone = build_model(spec, 1).backbone.to(pulls.device).eval()
        inner = {n.removeprefix(BACKBONE): t for n, t in before.items() if n.startswith(BACKBONE)}
        change = {n.removeprefix(BACKBONE): g for n, g in gradient.items() if n.startswith(BACKBONE)}
        problem = Problem.of(inner, change, [n for n, _ in backbone.named_parameters()])
        return cls(backbone, problem, spec, (pulls / problem.length).float().contiguous(), metric)

    @property
    def inputs(self) -> Inputs:
        return self.problem.inputs(pulls=self.pulls)

    @property
    def key(self) -> tuple[object, ...]:
        return ("pull", self.spec, tuple(self.problem.observed), self.metric)

    def value(self, inputs: Inputs, images: Tensor) -> Tensor:
        tensors, trained = self.problem.parameters(inputs)
        driven = (functional_call(self.backbone, tensors, (images,)) * inputs["pulls"][0]).sum()
        trial = torch.autograd.grad(driven, trained, create_graph=True)
        return distance(trial, inputs["observed"], self.metric)


@dataclass(frozen=True)
class NoisyMatching:
    """Negative log-likelihood of the images under a defense that clips the gradient of each photo and adds Gaussian noise.

    g̃ = (Σ_i clip_C(g_i) + σC·n)/B gives |g̃ - Σ_i clip_C(g(x_i))/B|² / (2·deviation²), deviation = σC/B that of a coordinate
    (Balunović et al. 2022, arXiv 2111.04706). In units of D/2, D coordinates, so that the value is about one at the truth.
    Trial gradients get no noise of their own: that would only add variance. labels: int64 (B,); clip: C.
    """

    model: FaceModel
    problem: Problem
    spec: ModelSpec
    labels: Tensor
    clip: float
    deviation: float

    @classmethod
    def of(
        cls, before: Tensors, gradient: Tensors, labels: Tensor, spec: ModelSpec, clip: float, deviation: float
    ) -> NoisyMatching:
        model = build_model(spec, len(before[HEAD])).to(before[HEAD].device).eval()
        problem = Problem.of(before, gradient, [n for n, _ in model.named_parameters()])
        return cls(model, problem, spec, labels, clip, deviation)

    @property
    def coordinates(self) -> int:
        """D: how many numbers of gradient were seen."""
        return sum(o.numel() for o in self.problem.observed.values())

    @property
    def inputs(self) -> Inputs:
        p = self.problem
        expected = self.coordinates * (self.deviation / p.length) ** 2
        scale = torch.tensor([self.clip, 1 / (p.length * len(self.labels)), expected])
        return p.inputs(labels=self.labels, scale=scale.to(self.labels.device))

    @property
    def key(self) -> tuple[object, ...]:
        return ("noisy", self.spec, len(self.problem.before[HEAD]), tuple(self.problem.observed))

    def value(self, inputs: Inputs, images: Tensor) -> Tensor:
        tensors, trained = self.problem.parameters(inputs)
        labels, (clip, unit, expected) = inputs["labels"][0], inputs["scale"][0].unbind()
        total = [torch.zeros_like(o) for o in inputs["observed"]]
        for i in range(len(images)):
            cosines = functional_call(self.model, tensors, (images[i : i + 1],))
            own = torch.autograd.grad(heads.loss(cosines, labels[i : i + 1], self.spec), trained, create_graph=True)
            length = (torch.stack([g.square().sum() for g in own]).sum() + TINY).sqrt()
            factor = unit * torch.clamp(clip / length, max=1.0)
            total = [t + factor * g for t, g in zip(total, own, strict=True)]
        return distance(total, inputs["observed"], "l2") / expected
