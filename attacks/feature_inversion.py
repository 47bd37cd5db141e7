"""A face from what the last layers give away of it, with first derivatives only.

The input h of the embedding layer, or where that is not known the unit feature ẑ, is read off an update in closed form
(`attacks.backbone_algebra`); then images are searched whose own h or ẑ is that one (Mahendran & Vedaldi 2015).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from attacks.backbone_algebra import recover, separable
from attacks.gradient_matching import Schedule, Solution, counted, match, nothing_found, offset
from attacks.priors import Eigenfaces, Pixels, Prior, auxiliary_basis, mean_face
from attacks.updates import illegible, reads_rows, source, targets, unreadable
from fedgc.models import load_backbone
from fedgc.types import Attack, LocalConstants, Observation, ObservedUpdate, Progress, Reconstruction


class FeatureInversion(Attack):
    """Images with the observed features. Each photo is searched on its own: once its feature is known, the batch does not matter.

    prior "faces": eigenfaces of the auxiliary faces (`attacks.priors`), held by ``gaussian``; "pixels": all pixels in their box,
    with total variation, from the mean face. inputs: the embedding layer's input, some thousand numbers, rather than the feature.
    """

    name: Literal["feature-inversion"] = "feature-inversion"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"client-updates"}), frozenset({"aggregate"}))
    target: ClassVar[Literal["round", "step"]] = "step"
    costly: ClassVar[bool] = True
    apart: ClassVar[bool] = True
    summary: ClassVar[str] = "photos from the features that the last layers give away, without second derivatives"

    prior: Literal["pixels", "faces"] = "faces"
    inputs: bool = True
    iterations: int = Field(default=400, ge=1)
    restarts: int = Field(default=1, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    total_variation: float = Field(default=0.1, ge=0)
    components: int = Field(default=1000, ge=1)
    gaussian: float = Field(default=1e-3, ge=0)
    copies: int = Field(default=8, ge=0, le=100)

    def unsuitable(self, observation: Observation) -> str | None:
        constants, faces = observation.public_constants, observation.auxiliary_faces
        if constants.steps != 1:
            return f"reads the gradient of a single step, and this update is the sum of {constants.steps or 'several'}"
        if self.prior == "faces" and (faces is None or len(faces) < 2):
            return "prior = 'faces' needs auxiliary-faces (2 photos or more); without, set prior = 'pixels'"
        why = illegible(observation)
        if why is None and not all(reads_rows(u, constants) or separable(u, constants) for u in targets(observation)):
            return unreadable(observation, forward=True)
        return why

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """images: float32 (n, 3, H, W); loss: float32 (n,), a photo's own. The mean face stands for a photo whose feature
        could not be told apart, which counts as failed."""
        constants, updates = observation.public_constants, targets(observation)
        total = sum(u.images for u in updates) * self.iterations * self.restarts
        prior = self._prior(observation)
        found: list[Solution] = []
        sources: list[int] = []
        for update in updates:
            objectives = self.objectives(update, constants)
            sources += [source(update)] * update.images
            for distance in objectives:
                tick = offset(counted(progress, total), len(found) * self.iterations * self.restarts)
                found.append(match(distance, prior, shape_of(constants), self._schedule, generator, tick))
            lost = update.images - len(objectives)
            found += [nothing_found(observation.auxiliary_faces, shape_of(constants))] * lost
        progress(total, total)
        return Reconstruction(
            tuple(sources),
            images=torch.cat([s.images for s in found]).cpu(),
            loss=torch.tensor([s.loss for s in found]),
            iterations=sum(s.iterations for s in found),
            failed=sum(s.failed for s in found),
        )

    @property
    def _schedule(self) -> Schedule:
        faces = self.prior == "faces"
        step = self.step_size or (0.2 if faces else 0.03)
        return Schedule(self.iterations, self.restarts, step, "adam" if faces else "signed-adam")

    def _prior(self, observation: Observation) -> Prior:
        faces = observation.auxiliary_faces
        centre = mean_face(faces, shape_of(observation.public_constants))
        if self.prior == "pixels":
            return Pixels(centre, faces is not None, self.total_variation)
        assert faces is not None
        return Eigenfaces(centre, auxiliary_basis(faces, self.components, self.copies), self.gaussian)

    def objectives(self, update: ObservedUpdate, constants: LocalConstants) -> list[Callable[[Tensor], Tensor]]:
        """One a photo that could be told apart: images (1, 3, H, W) -> relative squared distance of h, or 1 - cosine of ẑ."""
        known = recover(update, constants)
        backbone = load_backbone(constants.spec, update.before).requires_grad_(False)
        if self.inputs and known.inputs is not None:
            return [partial(_apart, backbone, h.float().cpu()) for h in known.inputs if bool(h.any())]
        units = known.unit_embeddings if known.unit_embeddings is not None else torch.zeros(0, 1)
        return [partial(_angle, backbone, z.float().cpu()) for z in units if bool(z.any())]


def shape_of(constants: LocalConstants) -> tuple[int, int, int, int]:
    return 1, 3, constants.spec.image_size, constants.spec.image_size


def _apart(backbone: nn.Module, target: Tensor, images: Tensor) -> Tensor:
    return (layer_inputs(backbone, images) - target).square().sum() / target.square().sum()


def _angle(backbone: nn.Module, target: Tensor, images: Tensor) -> Tensor:
    return 1 - F.cosine_similarity(backbone(images), target[None]).mean()


def layer_inputs(backbone: nn.Module, images: Tensor) -> Tensor:
    """(B, f) of the last linear layer that a forward pass comes through."""
    kept: list[Tensor] = []
    linears = [m for m in backbone.modules() if isinstance(m, nn.Linear)]
    hooks = [m.register_forward_pre_hook(lambda _, inputs: kept.append(inputs[0])) for m in linears]
    try:
        backbone(images)
    finally:
        for hook in hooks:
            hook.remove()
    return kept[-1]
