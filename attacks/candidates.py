"""Which of K candidate photos an update was made from: maximum likelihood with the defense inside.

Per-photo clipping and Gaussian noise make one step g̃ = (Σ_i clip_C(g_i) + σC·n) / B (Abadi et al. 2016). Noise is equal and
independent in all coordinates, so the log-likelihood of a set of photos is -|g̃ - Σ_i clip_C(g_i)/B|² / (2(σC/B)²): the plain
distance is the best there is (Balunović et al. 2022, arXiv 2111.04706), and noise added to trial gradients would only blur it.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call

from attacks.subsets import Floats, Value, evidence, nonnegative, projected, summed
from attacks.updates import Noise, gradient, source, targets, without_turned_rows
from fedgc import heads
from fedgc.local import load_tensors
from fedgc.models import FaceModel, build_model
from fedgc.types import BACKBONE, HEAD, Attack, LocalConstants, Observation, ObservedUpdate, Progress, Reconstruction

HELD = 2**26  # numbers of gradients of candidates held at once: 256 MB


class CandidateMatch(Attack):
    """Evidence for each candidate photo in each observed step. Labels are not given.

    candidates: how many photos the victims hide among. labels: head rows tried for each candidate, those that the gradient
    speaks for most.

    What it knows: the candidates, and of the public constants the defense card (clipping norm C, noise multiplier σ) with the
    number of photos. Where the card tells of no noise, the gradient may have been shortened by a factor, which non-negative
    least squares solves for.

    Where no head rows are seen, the gradient is J(x)ᵀδ with δ, the gradient by the embedding, unknown. Of the embedding
    layer, whose gradient is Σ δ_i·h(x_i)ᵀ, every δ is fitted by least squares and projected out; the other layers are not
    used, so that under noise this is a lower bound on what such a seat can find. Without noise it is exact, for fewer photos
    than h has numbers and whatever their labels and factors: batches are then read so even where head rows are seen.
    """

    name: Literal["candidate-match"] = "candidate-match"
    needs: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"client-updates", "candidates"}),
        frozenset({"aggregate", "candidates"}),
    )
    target: ClassVar[Literal["round", "step"]] = "step"
    costly: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "which candidate photos are in a step, by likelihood under the defense's clipping and noise"
    )

    candidates: int = Field(default=100, ge=2)
    labels: int = Field(default=4, ge=1)

    def unsuitable(self, observation: Observation) -> str | None:
        constants, photos = observation.public_constants, observation.candidates
        if constants.steps != 1:
            return (
                f"compares with the gradient of a single step, and this update is the sum of {constants.steps or 'several'}: "
                "record single steps"
            )
        if constants.lr == 0:
            return "the recorded step was taken at a learning rate of 0 and changed nothing; record an earlier round"
        for update in targets(observation):
            if not any(bool(change.any()) for change in update.delta.values()):
                return f"the update of client {source(update)} is all zeros: there is nothing in it to read"
            if photos is not None and len(photos) <= update.images:
                return (
                    f"{len(photos)} candidates for {update.images} photos leave no choice: "
                    "set candidate-match.candidates higher"
                )
        return None

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """scores: float32 (n, K), a row an update: log-likelihood that a candidate adds to the other photos found in it, or,
        where no noise is known, the share of the gradient's squared length. They add up over rounds on the same photos.

        loss: float32 (n,), the same of the whole set that was found, negated.
        """
        photos, updates = observation.candidates, targets(observation)
        assert photos is not None
        found = []
        for done, update in enumerate(updates, 1):
            update = without_turned_rows(update, observation.public_constants)
            value, owners = set_value(update, observation.public_constants, photos, self.labels)
            found.append(evidence(value, owners, update.images))
            progress(done, len(updates))
        return Reconstruction(
            sources=tuple(source(u) for u in updates),
            scores=torch.tensor(np.stack([scores for scores, _ in found]), dtype=torch.float32),
            loss=torch.tensor([-best for _, best in found], dtype=torch.float32),
        )


def set_value(
    update: ObservedUpdate, constants: LocalConstants, photos: Tensor, labels: int
) -> tuple[Value, list[int]]:
    """The log-likelihood of a set of gradients of candidates in one step, up to a constant (without known noise: the share of
    the observed squared length that they explain), and the candidate of each gradient. photos: float32 (K, 3, S, S)."""
    step = Step.of(update, constants)
    labelled = step.sees_head and (step.noise or step.images == 1)
    return step.matched(photos, labels) if labelled else step.projected(photos)


@dataclass(frozen=True)
class Step:
    """One observed step: the model that it started from, and its gradient by name of the trained parameter."""

    model: FaceModel
    observed: dict[str, Tensor]
    constants: LocalConstants
    noise: Noise | None
    images: int

    @classmethod
    def of(cls, update: ObservedUpdate, constants: LocalConstants) -> Step:
        model = build_model(constants.spec, len(update.classes) or 1).to(next(iter(update.delta.values()))).eval()
        load_tensors(model, update.before)
        trained = {name for name, _ in model.named_parameters()}
        observed = {name: g for name, g in gradient(update, constants).items() if name in trained}
        return cls(model, observed, constants, Noise.of(update, constants), update.images)

    @property
    def sees_head(self) -> bool:
        return HEAD in self.observed

    @property
    def device(self) -> torch.device:
        return self.model.head.weight.device

    @cached_property
    def trained(self) -> list[Tensor]:
        parameters = dict(self.model.named_parameters())
        return [parameters[name] for name in self.observed]

    def likelihood(self, value: Value, observed: Tensor) -> Value:
        """A reduction of squared distance as log-likelihood; where no noise is known, as a share of the squared length."""
        unit = 2 * self.noise.deviation**2 if self.noise else float(observed.double().square().sum())
        return lambda chosen: value(chosen) / unit

    def matched(self, photos: Tensor, labels: int) -> tuple[Value, list[int]]:
        """Head rows seen: the distance from the gradients of candidates, each under its likely rows."""
        observed = torch.cat([g.flatten() for g in self.observed.values()])
        rows = [self.likely_rows(x, labels) for x in photos.split(1)]
        along, gram = self.inner_products(photos, rows, observed)
        value = summed(along, gram) if self.noise else nonnegative(along, gram)
        return self.likelihood(value, observed), [k for k, tried in enumerate(rows) for _ in tried]

    def gradients(self, x: Tensor, rows: Sequence[int]) -> Tensor:
        """What a photo (1, 3, S, S) adds to the step under each head row: (len(rows), D), clipped as the card says."""
        cosines = self.model(x.to(self.model.head.weight))
        out = []
        for row in rows:
            loss = heads.loss(cosines, torch.tensor([row], device=self.device), self.constants.spec)
            parts = torch.autograd.grad(loss, self.trained, retain_graph=True)
            out.append(torch.cat([part.flatten() for part in parts]) / self.images)
        trials = torch.stack(out)
        if self.noise:
            limit = self.noise.clip / self.images
            trials *= (limit / trials.norm(dim=1, keepdim=True)).clamp(max=1)
        return trials

    def inner_products(self, photos: Tensor, rows: list[list[int]], observed: Tensor) -> tuple[Floats, Floats]:
        """Of the gradients of all candidates with the observed one (A,), and with each other (A, A).

        Gradients too long to be held all at once are computed again. A single photo has no partner, so that the products
        of different candidates stay zero.
        """
        tried = len(rows[0])
        each = max(1, HELD // (len(observed) * tried))
        spans = [slice(i, i + each) for i in range(0, len(photos), each)]
        blocks = [slice(s.start * tried, s.stop * tried) for s in spans]

        def block(s: slice) -> Tensor:
            return torch.cat([self.gradients(x, r) for x, r in zip(photos[s].split(1), rows[s], strict=True)])

        along, gram = np.empty(len(photos) * tried), np.zeros((len(photos) * tried,) * 2)
        for n, span in enumerate(spans):
            first = block(span)
            along[blocks[n]] = (first @ observed).cpu().numpy()
            for m in range(n, len(spans) if self.images > 1 else n + 1):
                products = (first @ (first if m == n else block(spans[m])).T).cpu().numpy()
                gram[blocks[n], blocks[m]], gram[blocks[m], blocks[n]] = products, products.T
        return along, gram

    def likely_rows(self, x: Tensor, count: int) -> list[int]:
        """The head rows of a photo (1, 3, S, S) whose gradient points most where the observed one points, best first.

        Along the observed gradient the cosines change by ċ (one derivative, in forward mode), and so the loss under row y by
        g_y·ċ, with g_y its derivative by the cosines. Lengths of gradients are compared by those of their embedding's.
        """
        _, u, cosines = self.through_embedding(x, self.model.head.weight.shape[0])
        loss = heads.loss(cosines, torch.arange(len(u), device=self.device), self.constants.spec)
        delta, g = torch.autograd.grad(loss, (u, cosines))
        with warnings.catch_warnings(), forward_ad.dual_level(), torch.no_grad():
            warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # by torch, for forward mode
            pairs = zip(self.trained, self.observed.items(), strict=True)
            moved = {name: forward_ad.make_dual(parameter, along) for parameter, (name, along) in pairs}
            change = forward_ad.unpack_dual(functional_call(self.model, moved, (x.to(g),))).tangent
        match = (g @ change[0]) / delta.norm(dim=1).clamp_min(1e-12)
        return match.topk(min(count, len(match))).indices.tolist()

    # -- no head rows seen

    def projected(self, photos: Tensor) -> tuple[Value, list[int]]:
        """The distance of the embedding layer's gradient from the nearest Σ δ_i h_iᵀ, over all δ."""
        observed = self.embedding_gradient()
        with torch.no_grad():
            inputs = torch.stack([self.through_embedding(x)[0] for x in photos.split(1)])
        along, gram = (part.double().cpu().numpy() for part in (inputs @ observed.T, inputs @ inputs.T))
        return self.likelihood(projected(along, gram), observed), list(range(len(photos)))

    # -- the embedding layer: the last linear one, before whatever norm follows

    def through_embedding(self, x: Tensor, copies: int = 1) -> tuple[Tensor, Tensor, Tensor]:
        """Its input for a photo (1, 3, S, S), with a one where it has a bias: (n,); ``copies`` of its output, from where
        gradients start; and the cosines that come of them."""
        layer, kept = self._embedding[1], []

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            one = [] if layer.bias is None else [output.new_ones(1)]
            kept.append(torch.cat([inputs[0].detach()[0], *one]))
            kept.append(output.detach().repeat(copies, 1).requires_grad_())
            return kept[1]

        handle = layer.register_forward_hook(keep)
        try:
            cosines = self.model(x.to(self.model.head.weight))
        finally:
            handle.remove()
        return kept[0], kept[1], cosines

    def embedding_gradient(self) -> Tensor:
        """(d, n): the gradient of its weight, with that of its bias as a last column."""
        name, layer = self._embedding
        weight = self.observed[f"{name}.weight"]
        return weight if layer.bias is None else torch.cat([weight, self.observed[f"{name}.bias"][:, None]], dim=1)

    @cached_property
    def _embedding(self) -> tuple[str, nn.Linear]:
        return [(n, m) for n, m in self.model.backbone.named_modules(prefix=BACKBONE[:-1]) if isinstance(m, nn.Linear)][
            -1
        ]
