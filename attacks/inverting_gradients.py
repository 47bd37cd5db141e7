"""Photos from the update of one step (Geiping et al. 2020, "Inverting Gradients"), with face priors."""

from __future__ import annotations

from functools import partial
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.gradient_matching import Matching, Schedule, Solution, match, offset
from attacks.label_inference import infer_labels
from attacks.priors import Eigenfaces, Pixels, Prior, Shape, eigenfaces, mean_face
from attacks.updates import gradient, source, targets, unreadable
from fedgc.models import build_model
from fedgc.types import (
    HEAD,
    Attack,
    LocalConstants,
    Observation,
    ObservedUpdate,
    Progress,
    Reconstruction,
)

STEP_SIZES = {"faces": 0.1, "pixels": 0.03}  # in standard deviations of a component; in the range of a pixel


class GradientInversion(Attack):
    """Images whose gradient has the direction of the observed one; labels are inferred, never given.

    prior "faces": image = mean + eigenfaces of the auxiliary faces x coordinates, which are all that is
    searched; needs auxiliary faces. prior "pixels": every pixel, with total variation, from the mean face
    where there is one. Matches plain cosine under every defense: it does not use what a defense card says, so
    that under noise it understates what an attacker who models the noise would find.
    """

    name: Literal["gradient-inversion"] = "gradient-inversion"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"client-updates"}), frozenset({"aggregate"}))
    target: ClassVar[Literal["round", "step"]] = "step"
    costly: ClassVar[bool] = True
    summary: ClassVar[str] = "photos from the update of one step, by matching gradients"

    prior: Literal["pixels", "faces"] = "faces"
    iterations: int = Field(default=400, ge=1)
    restarts: int = Field(default=1, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    total_variation: float = Field(default=1.0, ge=0)
    components: int = Field(default=600, ge=1)
    gaussian: float = Field(default=1e-3, ge=0)
    tolerance: float = Field(default=0.0, ge=0, lt=1)

    def unsuitable(self, observation: Observation) -> str | None:
        steps = observation.public_constants.steps
        if steps != 1:
            return (
                f"matches the gradient of a single step, and this update is the sum of {steps or 'several'}: "
                "record single steps, or use an attack on whole rounds"
            )
        faces = observation.auxiliary_faces
        if self.prior == "faces" and (faces is None or len(faces) < 2):
            return "prior = 'faces' needs auxiliary-faces (2 photos or more); without, set prior = 'pixels'"
        return unreadable(observation)

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """images: float32 (n, 3, H, W); labels: int64 (n,); loss: float32 (n,), that of the batch a photo was
        in.

        Entries follow the order of the updates; which photo of a batch is which entry is not known to an
        attacker.
        """
        constants, updates = observation.public_constants, targets(observation)
        prior = self._prior(observation)
        schedule = Schedule(self.iterations, self.restarts, self.step_size or STEP_SIZES[self.prior], self.tolerance)
        each = self.iterations * self.restarts
        tick = partial(_report, progress, len(updates) * each)
        found: list[Solution] = []
        labels: list[int] = []
        for number, update in enumerate(updates):
            rows = infer_labels(update, constants)
            labels += [update.classes[row] for row in rows.tolist()]
            distance, shape = matching(update, rows, constants), _shape(update, constants)
            found.append(match(distance, prior, shape, schedule, generator, offset(tick, number * each)))
        return Reconstruction(
            sources=tuple(source(u) for u in updates for _ in range(u.images)),
            images=torch.cat([s.images for s in found]).cpu(),
            labels=torch.tensor(labels, dtype=torch.long),
            loss=torch.tensor([s.loss for s in found]).repeat_interleave(torch.tensor([u.images for u in updates])),
            iterations=sum(s.iterations for s in found),
            failed=sum(s.failed for s in found),
        )

    def _prior(self, observation: Observation) -> Prior:
        faces = observation.auxiliary_faces
        size = observation.public_constants.spec.image_size
        centre = mean_face(faces, (1, 3, size, size))
        if self.prior == "pixels":
            return Pixels(centre, faces is not None, self.total_variation)
        assert faces is not None
        return Eigenfaces(centre, eigenfaces(faces, self.components), self.gaussian)


def matching(update: ObservedUpdate, rows: Tensor, constants: LocalConstants) -> Matching:
    """The matching problem of one observed step, given the head row of each photo."""
    model = build_model(constants.spec, len(update.before[HEAD]))
    return Matching.of(model, update.before, gradient(update, constants), rows, constants.spec)


def _report(progress: Progress, total: int, done: int) -> None:
    progress(done, total)


def _shape(update: ObservedUpdate, constants: LocalConstants) -> Shape:
    return update.images, 3, constants.spec.image_size, constants.spec.image_size
