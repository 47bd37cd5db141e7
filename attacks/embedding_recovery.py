"""The unit feature of every photo of a step, without a single image being searched for.

A feature is all that a face recogniser knows of a face: whoever holds it can name the person. One photo's follows from the
gradients of the last layers or of the head's rows, a batch's from the zeros of a ReLU or by row matching; see
`attacks.backbone_algebra`. Clipping and an unknown head change nothing in it.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.backbone_algebra import recover, separable
from attacks.updates import illegible, source, targets, turned
from fedgc.types import HEAD, Attack, Observation, Progress, Reconstruction


class EmbeddingRecovery(Attack):
    """Unit features of the photos behind each observed step, from its backbone alone or with the head's rows."""

    name: Literal["embedding-recovery"] = "embedding-recovery"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"client-updates"}), frozenset({"aggregate"}))
    target: ClassVar[Literal["round", "step"]] = "step"
    summary: ClassVar[str] = "features of the photos in a step, from the gradients of the last layers"

    def unsuitable(self, observation: Observation) -> str | None:
        steps = observation.public_constants.steps
        if steps != 1:
            return f"reads the gradient of a single step, and this update is the sum of {steps or 'several'}"
        for update in targets(observation) if illegible(observation) is None else ():
            constants, seen = observation.public_constants, HEAD in update.delta
            if (not seen or turned(constants)) and update.images > 1 and not separable(update, constants):
                rows = f"class embeddings ({HEAD}) come turned" if seen else f"no class embedding ({HEAD}) reaches"
                return (
                    f"{update.images} photos are mixed in this update, {rows}{' to' if seen else ''} the seat "
                    f"'{observation.threat}' under {observation.algorithm}, and the last layer of "
                    f"{observation.public_constants.spec.backbone} gets no zeros by which to tell them apart: "
                    "record.batch_sizes = [1] shows what a single photo gives away"
                )
        return illegible(observation)

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """embeddings: float32 (n, d), n the photos behind all updates in order of the updates, unit length, or zero where a
        photo could not be told apart (counted in ``failed``). Which photo of a batch is which entry is not known to an attacker.
        """
        found: list[Tensor] = []
        sources: list[int] = []
        updates = targets(observation)
        for done, update in enumerate(updates, 1):
            units = recover(update, observation.public_constants).unit_embeddings
            if units is None:
                units = torch.zeros(0, observation.public_constants.spec.embedding_size)
            found.append(F.pad(units.float().cpu(), (0, 0, 0, update.images - len(units))))
            sources += [source(update)] * update.images
            progress(done, len(updates))
        embeddings = torch.cat(found)
        return Reconstruction(tuple(sources), embeddings=embeddings, failed=int((embeddings == 0).all(dim=1).sum()))
