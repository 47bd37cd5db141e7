"""Who is behind a class embedding: late in training it points to its person's mean feature, so a photo finds
its owner."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc.models import embed, load_backbone
from fedgc.types import Attack, Gallery, Observation, Progress, Reconstruction


def person_embeddings(backbone: torch.nn.Module, gallery: Gallery) -> Tensor:
    """Unit mean feature of each person of the gallery: float32 (G, d)."""
    features = embed(backbone, (gallery.images * 255).round().clamp(0, 255).to(torch.uint8))
    sums = torch.zeros(gallery.size, features.shape[1]).index_add_(0, gallery.people.cpu(), features)
    return F.normalize(sums, dim=1)


class IdentityLinkage(Attack):
    """Cosine of each class embedding with each person of a gallery. No optimisation: one forward pass of the
    gallery."""

    name: Literal["identity-linkage"] = "identity-linkage"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"class-embeddings", "global-model", "gallery"}),)
    target: ClassVar[Literal["round", "step"]] = "round"
    summary: ClassVar[str] = "names the people behind class embeddings by photos of candidates"

    def refusal(self, observation: Observation) -> str | None:
        why = super().refusal(observation)
        if why and observation.class_embeddings is None:
            why += ": no class embedding of anybody else reaches it, so there is nothing to link"
        return why

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """scores: float32 (n, G), row i for the class ``sources[i]``."""
        model, rows, gallery = observation.global_model, observation.class_embeddings, observation.gallery
        assert model is not None and rows is not None and gallery is not None  # noqa: PT018
        backbone = load_backbone(observation.public_constants.spec, model)
        people = person_embeddings(backbone, gallery)
        scores = F.normalize(rows.weight.detach().cpu().float(), dim=1) @ people.T
        progress(1, 1)
        return Reconstruction(tuple(rows.classes), scores=scores)
