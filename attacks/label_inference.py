"""Whose photos were in a step, read from the head's gradient in closed form.

For a cosine head the gradient of row w_j is (1/|w_j|)·P_j·Σ_i g_ij ẑ_i, with P_j = I - ŵ_jŵ_jᵀ and g_ij the
derivative of the loss by the cosine c_ij: negative for the class of photo i, positive for all others. The row
of a class that is present therefore points away from those of absent classes, for plain softmax, CosFace and
ArcFace alike. Rules that look at the sign of a row's sum (iDLG, Zhao et al. 2020) or at a bias need
non-negative features or a bias, and a face head has neither.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.updates import gradient, source, targets, unreadable
from fedgc.types import HEAD, Attack, LocalConstants, Observation, ObservedUpdate, Progress, Reconstruction

NEW_CLASS = 0.2  # photos that a class not yet named counts as having, against the next photo of one that is


def infer_labels(update: ObservedUpdate, constants: LocalConstants) -> Tensor:
    """Rows of the head behind the photos of one step: int64 (B,), indices into ``update.classes``, ascending.

    With U_j the unit vector of |w_j|·G_j: one photo has y = argmin_j <U_j, Σ_k U_k>. In a batch, a row's pull
    is -<|w_j|·G_j, m>, with m the mean of the U_j of the half of the rows with the least norm, mostly absent
    classes; places go to the greatest pulls, and a class may take several (see `_seats`). One photo needs
    three classes: of two, each is as much the opposite of the other.
    """
    rows = gradient(update, constants)[HEAD]
    scaled = rows * update.before[HEAD].norm(dim=1, keepdim=True)
    units = F.normalize(scaled, dim=1)
    if update.images == 1:
        return (units @ units.sum(0)).argmin()[None]
    absent = scaled.norm(dim=1).argsort()[: max(1, len(rows) // 2)]
    return _seats(-scaled @ F.normalize(units[absent].mean(0), dim=0), update.images)


def _seats(pull: Tensor, count: int) -> Tensor:
    """Deal ``count`` places among rows by their pull, as seats to parties by votes: the gradients of photos
    of one class add up in its row, so the n-th place of a class costs pull / n. The first is nearly free,
    since photos differ in the length of their gradients more than batches repeat people."""
    photos = torch.zeros(len(pull), dtype=torch.long, device=pull.device)
    for _ in range(count):
        price = torch.where(photos == 0, NEW_CLASS, photos + 1.0)
        photos[(pull / price).argmax()] += 1
    return torch.arange(len(pull), device=pull.device).repeat_interleave(photos)


class LabelInference(Attack):
    """Classes of the photos behind each observed step. No optimisation; milliseconds."""

    name: Literal["label-inference"] = "label-inference"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"client-updates"}), frozenset({"aggregate"}))
    target: ClassVar[Literal["round", "step"]] = "step"
    summary: ClassVar[str] = "classes of the photos in a step, read from the head's gradient"

    def unsuitable(self, observation: Observation) -> str | None:
        return unreadable(observation)

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """labels: int64 (n,), n the photos behind all updates, in order of the updates and ascending within
        one."""
        labels: list[int] = []
        sources: list[int] = []
        updates = targets(observation)
        for done, update in enumerate(updates, 1):
            rows = infer_labels(update, observation.public_constants)
            labels += [update.classes[row] for row in rows.tolist()]
            sources += [source(update)] * len(rows)
            progress(done, len(updates))
        return Reconstruction(tuple(sources), labels=torch.tensor(labels, dtype=torch.long))
