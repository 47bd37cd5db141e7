"""Whose photos were in a step, read from the head's gradient.

For a cosine head the gradient of row w_j is (1/|w_j|)·P_j·Σ_i g_ij ẑ_i, with P_j = I - ŵ_jŵ_jᵀ and g_ij the
derivative of the loss by the cosine c_ij: negative for the class of photo i, positive for all others. The row
of a class that is present therefore points away from those of absent classes, for plain softmax, CosFace and
ArcFace alike. Rules that look at the sign of a row's sum (iDLG, Zhao et al. 2020) or at a bias need
non-negative features or a bias, and a face head has neither.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from attacks.backbone_algebra import recover
from attacks.head_algebra import guess_labels, head_rows
from attacks.updates import Noise, drifted, gradient, source, targets, turned, unreadable
from fedgc import heads
from fedgc.local import load_tensors
from fedgc.models import build_model
from fedgc.types import HEAD, Attack, LocalConstants, Observation, ObservedUpdate, Progress, Reconstruction


def infer_labels(update: ObservedUpdate, constants: LocalConstants) -> Tensor:
    """Rows of the head behind the photos of one step: int64 (B,), indices into ``update.classes``, ascending.

    One photo: the row against the others. It needs three classes: of two, each is as much the opposite of the other.
    Several: `attacks.backbone_algebra.recover` finds their features first, and what each of them pulls names its row; of several
    local steps, whose mean gradient no features explain exactly, and of rows that come turned, the rows' own pulls name them.
    """
    if (drifted(update, constants) or turned(constants)) and (rows := head_rows(update, constants)) is not None:
        return guess_labels(rows, update.images)
    labels = recover(update, constants).labels
    assert labels is not None
    return labels


def likely_rows(update: ObservedUpdate, constants: LocalConstants, face: Tensor, clip: float) -> Tensor:
    """The same where noise hides directions: the rows under which a typical face, float32 (3, H, W), makes the update likeliest.

    Gradients of faces under one label are alike, so that with g_y that of ``face`` under row y, clipped to ``clip`` as the
    defense clips and over B, log-likelihoods are <g̃, g_y> - |g_y|²/2 up to a common factor: all coordinates average the noise,
    not those of one row. A class is named once, however many photos it has.
    """
    seen = gradient(update, constants)
    model = build_model(constants.spec, len(update.before[HEAD])).to(update.before[HEAD].device).eval()
    load_tensors(model, update.before)
    named = [(n, p) for n, p in model.named_parameters() if n in seen]
    cosines = model(face[None].to(update.before[HEAD]))
    scores = []
    for row in range(cosines.shape[1]):
        loss = heads.loss(cosines, torch.tensor([row], device=cosines.device), constants.spec)
        own = torch.autograd.grad(loss, [p for _, p in named], retain_graph=True)
        length = torch.stack([g.square().sum() for g in own]).sum().sqrt()
        factor = (clip / length.clamp_min(1e-12)).clamp(max=1) / update.images
        along = torch.stack([(g * seen[n]).sum() for g, (n, _) in zip(own, named, strict=True)]).sum()
        scores.append(factor * along - (factor * length).square() / 2)
    count = min(update.images, len(scores))
    rows = torch.stack(scores).topk(count).indices
    return torch.cat([rows, rows[:1].repeat(update.images - count)]).sort().values


class LabelInference(Attack):
    """Classes of the photos behind each observed step. Milliseconds, or seconds where labels and features of a batch have to be
    found together."""

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
            noise, faces = Noise.of(update, observation.public_constants), observation.auxiliary_faces
            if noise is not None and faces is not None:
                rows = likely_rows(update, observation.public_constants, faces.mean(0), noise.clip)
            else:
                rows = infer_labels(update, observation.public_constants)
            labels += [update.classes[row] for row in rows.tolist()]
            sources += [source(update)] * len(rows)
            progress(done, len(updates))
        return Reconstruction(tuple(sources), labels=torch.tensor(labels, dtype=torch.long))
