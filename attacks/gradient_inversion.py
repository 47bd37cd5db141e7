"""Photos from the update of one step or a few: one attack, its methods named after the papers that they come from."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from attacks.backbone_algebra import recover, separable
from attacks.channel_statistics import WithStatistics, distance_from
from attacks.denoising import Polish, auxiliary_denoiser, changed
from attacks.fast_step import distance_of
from attacks.gradient_matching import Schedule, Solution, counted, match, nothing_found, offset
from attacks.label_inference import infer_labels, likely_rows
from attacks.local_update import LocalUpdate, UnrolledMatching, not_unrolled, single_steps
from attacks.methods import METHODS, Method
from attacks.objectives import HeadMatching, NoisyMatching, Objective, PullMatching
from attacks.priors import Eigenfaces, Joint, Pixels, Prior, Shape, auxiliary_basis, mean_face
from attacks.updates import Noise, drifted, gradient, illegible, reads_rows, source, targets, turned, unreadable
from fedgc.errors import RefusedError
from fedgc.types import (
    HEAD,
    Attack,
    LocalConstants,
    Observation,
    ObservedUpdate,
    Progress,
    Reconstruction,
)

Problem = tuple[
    Objective, Tensor | None, int
]  # what is minimised, the head row of each photo where known, how many photos
PAYS = 40_000  # iterations of a job from which compiling a graph is repaid
POLISH_STEP = 0.015
POLISHED = 400  # iterations of a search from which it is polished: learning a denoiser takes as long


class GradientInversion(Attack):
    """Images whose gradient has the direction of the observed one; labels are inferred, never given.

    method "cascade" (ours): the gradient δ of the loss by each photo's feature is read off the last layers in closed form, and
    images = mean + eigenfaces of the auxiliary faces x coordinates are searched until Σ∂<δ,z>/∂θ is the observed gradient of
    the backbone; no head and no label is needed. Where a defense card tells of noise, it is a maximum a posteriori instead,
    with the clipping inside and the noise as wide as the card says (``noise_aware``). The others are as published but for
    labels, which heads without a bias do not give by the published rules: "inverting-gradients" (Geiping et al. 2020),
    "gradinversion" (Yin et al. 2021; its BatchNorm term is ``statistics``), "idlg" (Zhao et al. 2020), "dlg" (Zhu et al. 2019).

    An update of several steps on the same photos is matched as ``local_update`` says (`attacks.local_update`): "surrogate" tries
    a few places on the way from start to end, each for all iterations, and keeps what ends with the least loss.

    What the cascade finds is polished: a search of all pixels goes on from there, for ``polish`` iterations (three eighths of the
    search's where not set, none after a short one), held by ``denoiser`` times the mean squared change that a denoiser makes
    (`attacks.denoising`), which learns from the auxiliary faces in so many ``lessons``. Not under noise.

    iterations, restarts, step_size, prior, total_variation: the method's own where they are not set. components, gaussian,
    copies: how many eigenfaces, how strongly they are held, and how many altered copies of each face they are made from.
    statistics: weight of the distance from the model's BatchNorm statistics (`attacks.channel_statistics`), where it has them.
    compiled: the step as a compiled graph; where not set, for jobs that repay compiling it.
    """

    name: Literal["gradient-inversion"] = "gradient-inversion"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"client-updates"}), frozenset({"aggregate"}))
    target: ClassVar[Literal["round", "step"]] = "step"
    costly: ClassVar[bool] = True
    apart: ClassVar[bool] = True
    summary: ClassVar[str] = "photos from the update of one step or a few, by matching gradients"

    method: Literal["cascade", "inverting-gradients", "gradinversion", "idlg", "dlg"] = "cascade"
    prior: Literal["pixels", "faces"] | None = None
    iterations: int | None = Field(default=None, ge=1)
    restarts: int | None = Field(default=None, ge=1)
    step_size: float | None = Field(default=None, gt=0)
    total_variation: float | None = Field(default=None, ge=0)
    colour_variation: float = Field(default=0.0, ge=0)
    symmetry: float = Field(default=0.0, ge=0)
    statistics: float = Field(default=0.0, ge=0)
    components: int = Field(default=1000, ge=1)
    gaussian: float = Field(default=1e-3, ge=0)
    copies: int = Field(default=8, ge=0, le=100)
    tolerance: float = Field(default=0.0, ge=0, lt=1)
    noise_aware: bool = True
    local_update: LocalUpdate = "surrogate"
    compiled: bool | None = None
    polish: int | None = Field(default=None, ge=0)
    denoiser: float = Field(default=7.0, ge=0)
    lessons: int = Field(default=400, ge=1)

    def unsuitable(self, observation: Observation) -> str | None:
        steps = observation.public_constants.steps
        if steps is None:
            return (
                "matches the gradient of a single step or of a known number on the same photos, and this update is the sum of "
                "several on many: record such steps (record.victims, record.local_steps), or use an attack on whole rounds"
            )
        faces = observation.auxiliary_faces
        if (self._faces or self._polish) and (faces is None or len(faces) < 2):
            what = "prior = 'faces'" if self._faces else "polish"
            return f"{what} needs auxiliary-faces (2 photos or more); without, set prior = 'pixels' and no polish"
        if self.polish and self._method.labels == "searched":
            return f"polish takes labels that are known, and method '{self.method}' searches them too: set polish = 0"
        if self.statistics and observation.normalisation_statistics is None:
            return (
                "statistics needs normalisation-statistics, and there are none: the model's layers are normalised by "
                f"'{observation.public_constants.spec.norm}', and only BatchNorm (model.norm=batch) keeps any. Set statistics = 0"
            )
        if self._unrolls(observation.public_constants) and (why := not_unrolled(observation)) is not None:
            return why
        if self.method != "cascade" or unreadable(observation, forward=True) is None:
            return unreadable(observation, forward=True)
        why = illegible(observation)
        if why is None and not all(separable(u, observation.public_constants) for u in targets(observation)):
            why = unreadable(observation, forward=True)
        return why

    def sized(self, photos: int) -> Self:
        """With ``compiled`` decided."""
        if self.compiled is not None:
            return self
        return self.model_copy(
            update={"compiled": photos * self._schedule.iterations * self._schedule.restarts >= PAYS}
        )

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """images: float32 (n, 3, H, W); labels: int64 (n,), where rows tell them; loss: float32 (n,), the objective of the batch
        that a photo was in; every: float32 (restarts, n, 3, H, W).

        Entries follow the order of the updates; which photo of a batch is which entry is not known to an attacker.
        """
        constants, updates = observation.public_constants, targets(observation)
        schedule, faces, side = self._schedule, observation.auxiliary_faces, constants.spec.image_size
        found: list[Solution] = []
        sources: list[int] = []
        labels: list[int] = []
        for number, update in enumerate(updates):
            try:
                problems = self.problems(update, constants, faces)
            except RefusedError:  # of several photos nothing could be told apart, and no head is seen
                found.append(nothing_found(faces, (update.images, 3, side, side)))
                sources += [source(update)] * update.images
                continue
            total = schedule.iterations * schedule.restarts * len(problems) + self._last
            tick = offset(counted(progress, len(updates) * total), number * total)
            solution, (_, rows, count) = self._searched(problems, update, observation, generator, tick)
            found.append(solution)
            sources += [source(update)] * count
            labels += [] if rows is None else [update.classes[row] for row in rows.tolist()]
        sizes = torch.tensor([len(s.images) for s in found])
        return Reconstruction(
            sources=tuple(sources),
            images=torch.cat([s.images for s in found]).cpu(),
            labels=torch.tensor(labels, dtype=torch.long) if len(labels) == len(sources) else None,
            loss=torch.tensor([s.loss for s in found]).repeat_interleave(sizes),
            every=torch.cat([s.every for s in found], dim=1).cpu() if schedule.restarts > 1 else None,
            iterations=sum(s.iterations for s in found),
            failed=sum(s.failed for s in found),
        )

    def _searched(
        self, problems: list[Problem], update: ObservedUpdate, observation: Observation, generator: torch.Generator,
        tick: Callable[[int], None],
    ) -> tuple[Solution, Problem]:  # fmt: skip
        """What is found behind one update, and by which of its problems."""
        schedule, faces, spec = self._schedule, observation.auxiliary_faces, observation.public_constants.spec
        held = observation.normalisation_statistics if self.statistics else None
        remembered = None if held is None else distance_from(held, update.before, spec)
        each, solved = schedule.iterations * schedule.restarts, []

        def search(objective: Objective, prior: Prior, shape: Shape, schedule: Schedule, before: int) -> Solution:
            prior = prior if remembered is None else WithStatistics(prior, remembered, self.statistics)
            distance = distance_of(objective, bool(self.compiled))
            return match(distance, prior, shape, schedule, generator, offset(tick, before))

        for tried, (objective, _, count) in enumerate(problems):
            shape = (count, 3, spec.image_size, spec.image_size)
            prior = self._prior(faces, shape, objective, len(update.classes))
            solved.append(search(objective, prior, shape, schedule, tried * each))
        best, chosen = min(zip(solved, problems, strict=True), key=lambda pair: pair[0].loss)
        if self._polish and math.isfinite(best.loss) and not isinstance(chosen[0], NoisyMatching):
            last = Schedule(self._polish, step_size=POLISH_STEP)
            prior = self._polishing(faces, best.images, offset(tick, each * len(problems)))
            polished = search(chosen[0], prior, shape, last, each * len(problems) + self.lessons)
            solved.append(polished)
            best = replace(polished, every=best.every) if math.isfinite(polished.loss) else best
        tick(each * len(problems) + self._last)
        return _with_all(best, solved), chosen

    def loss_at(self, observation: Observation, number: int, images: Tensor) -> float | None:
        update, constants = targets(observation)[number], observation.public_constants
        try:
            problems = self.problems(update, constants, observation.auxiliary_faces)
        except RefusedError:
            return None
        if self._method.labels == "searched" or problems[0][2] != len(images):
            return None
        return min(float(objective.value(objective.inputs, images).detach()) for objective, _, _ in problems)

    @property
    def _method(self) -> Method:
        """The method, with steps that suit the parameters that are searched where they are not its own."""
        chosen = METHODS[self.method]
        match self.prior:
            case "faces" if chosen.prior == "pixels":
                return replace(chosen, prior="faces", optimizer="adam", step_size=METHODS["cascade"].step_size)
            case "pixels" if chosen.prior == "faces":
                return replace(
                    chosen, prior="pixels", optimizer="signed-adam", step_size=0.03, total_variation=1.0, polish=False
                )
        return chosen

    @property
    def _models_noise(self) -> bool:
        return self.noise_aware and self.method == "cascade"

    @property
    def _faces(self) -> bool:
        return self._method.prior == "faces"

    @property
    def _polish(self) -> int:
        if self.polish is not None:
            return self.polish
        length = self._schedule.iterations
        return length * 3 // 8 if self._method.polish and length >= POLISHED else 0

    @property
    def _last(self) -> int:
        """How much the last stage counts in progress: lessons, then iterations."""
        return self._polish + self.lessons if self._polish else 0

    @property
    def _schedule(self) -> Schedule:
        m = self._method
        return Schedule(
            self.iterations or m.iterations, self.restarts or m.restarts, self.step_size or m.step_size, m.optimizer,
            self.tolerance, m.group,
        )  # fmt: skip

    def problems(self, update: ObservedUpdate, constants: LocalConstants, faces: Tensor | None = None) -> list[Problem]:
        """One update's matching problems, whose losses can be compared; of one step there is one. faces: auxiliary ones, by which
        labels are told where there is noise. Raises RefusedError where there is no problem."""
        if self._unrolls(constants):
            rows = self._rows(update, constants, gradient(update, constants))
            return [(UnrolledMatching.of(update, constants, rows), rows, update.images)]
        known = reads_rows(update, constants) and drifted(update, constants)
        rows = self._rows(update, constants, gradient(update, constants)) if known else None
        noise = Noise.of(update, constants) if self._models_noise and HEAD in update.delta else None
        if noise is not None and rows is None and faces is not None:
            rows = likely_rows(update, constants, faces.mean(0), noise.clip)
        found = [self.objective(*step, rows) for step in single_steps(update, constants, self.local_update)]
        like, _, count = found[0]
        return [p for p in found if (p[0].key, p[2]) == (like.key, count)]

    def _unrolls(self, constants: LocalConstants) -> bool:
        return self.local_update == "unrolled" and (constants.steps or 1) > 1

    def objective(self, update: ObservedUpdate, constants: LocalConstants, rows: Tensor | None = None) -> Problem:
        """The matching problem of one step. rows: of the head, where they are known and what `recover` says is not to be used."""
        seen = gradient(update, constants)
        noise = Noise.of(update, constants) if self._models_noise else None
        if noise is not None and HEAD in seen:
            rows = infer_labels(update, constants) if rows is None else rows
            return NoisyMatching.of(update.before, seen, rows, constants.spec, *noise), rows, update.images
        if self.method == "cascade" and rows is None:
            known = recover(update, constants)
            if known.feature_gradient is not None:
                pulls = known.feature_gradient
                return PullMatching.of(update.before, seen, pulls, constants.spec), known.labels, len(pulls)
        if HEAD not in seen or turned(constants):
            raise RefusedError("the photos of this update cannot be told apart, and no class embedding is seen")
        labels = self._rows(update, constants, seen) if rows is None else rows
        return HeadMatching.of(update.before, seen, labels, constants.spec, self._method.metric), labels, update.images

    def _rows(self, update: ObservedUpdate, constants: LocalConstants, seen: dict[str, Tensor]) -> Tensor | None:
        match self._method.labels:
            case "searched":
                return None
            case "sums":  # of a row's gradient: the least, which needs features that are not negative
                return seen[HEAD].sum(1).argsort()[: update.images].sort().values
            case "rows":
                return infer_labels(update, constants)

    def _prior(self, faces: Tensor | None, shape: Shape, objective: Objective, classes: int) -> Prior:
        if self._method.labels == "searched":
            return Joint(shape[-1], classes)
        centre = mean_face(faces, (1, *shape[1:]))
        if self._faces:
            assert faces is not None
            basis = auxiliary_basis(faces, self.components, self.copies)
            return Eigenfaces(centre, basis, self._hold(objective, shape[0]), self.symmetry)
        variation = self._method.total_variation if self.total_variation is None else self.total_variation
        known = faces is not None and self._method.start == "mean"
        return Pixels(centre, known, variation, self.colour_variation, self.symmetry)

    def _polishing(self, faces: Tensor | None, found: Tensor, tick: Callable[[int], None]) -> Prior:
        assert faces is not None
        learned = auxiliary_denoiser(faces, self.components, self.copies, self.lessons, tick)
        return Polish(found, partial(changed, learned), self.denoiser)

    def _hold(self, objective: Objective, photos: int) -> float:
        """Weight of the eigenfaces' penalty: as set, or as the noise asks for, where its width is known: |z|²/2 beside a
        negative log-likelihood in units of D/2."""
        if isinstance(objective, NoisyMatching):
            return Eigenfaces.unit(photos) / objective.coordinates
        return self.gaussian


def _with_all(best: Solution, solved: list[Solution]) -> Solution:
    """The best of several, with the work of all."""
    return replace(best, iterations=sum(s.iterations for s in solved), failed=sum(s.failed for s in solved))
