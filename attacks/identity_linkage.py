"""Who is behind an embedding: late in training a class embedding points to its person's mean feature, so a photo finds its
owner. So do features that an update gives away, and the change of a class embedding, which points to the photos of a round."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor

from attacks.adapters import adapted
from attacks.alignment import aligned_scores
from attacks.embedding_recovery import EmbeddingRecovery
from attacks.shadows import shadows, too_few
from attacks.updates import targets
from fedgc.models import as_bytes, embed, load_backbone
from fedgc.types import HEAD, Attack, Gallery, Observation, Progress, Reconstruction, Tensors

_GALLERY = frozenset({"global-model", "gallery"})


def person_embeddings(backbone: torch.nn.Module, gallery: Gallery) -> Tensor:
    """Unit mean feature of each person of the gallery: float32 (G, d)."""
    features = embed(backbone, as_bytes(gallery.images))
    sums = torch.zeros(gallery.size, features.shape[1]).index_add_(0, gallery.people.cpu(), features)
    return F.normalize(sums, dim=1)


def person_scores(backbone: torch.nn.Module, gallery: Gallery, embeddings: Tensor) -> Tensor:
    """(n, G) cosine of embeddings (n, d) with the people of the gallery in the features of a backbone."""
    return F.normalize(embeddings, dim=1) @ person_embeddings(backbone, gallery).T


class IdentityLinkage(Attack):
    """Cosine of each embedding with each person of a gallery. No optimisation: one forward pass of the gallery.

    source: "class-embeddings"; "embedding-changes", what a round did to each of them, which the photos of that round did;
    "face-embeddings", what `embedding-recovery` finds in recorded steps. through: "own", the gallery in the attacked model's
    features; "adapter", in those of a recogniser that the attacker trained on strangers for ``epochs``, with a linear map between
    the two: templates against somebody else's database; "alignment", of rows that come turned by an unknown rotation, as
    ``alignment`` says (`attacks.alignment`), from so many ``restarts``. known: of how many class embeddings the attacker knows
    the person beforehand; these are no part of the answer.
    """

    name: Literal["identity-linkage"] = "identity-linkage"
    needs: ClassVar[tuple[frozenset[str], ...]] = (_GALLERY | {"class-embeddings"},)
    target: ClassVar[Literal["round", "step"]] = "round"
    summary: ClassVar[str] = "names the people behind class embeddings by photos of candidates"

    source: Literal["class-embeddings", "embedding-changes", "face-embeddings"] = "class-embeddings"
    through: Literal["own", "adapter", "alignment"] = "own"
    epochs: int = Field(default=30, ge=1)
    alignment: Literal["gram", "wasserstein", "paired"] = "wasserstein"
    restarts: int = Field(default=30, ge=1)
    known: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _alignment_is_of_class_embeddings(self) -> Self:
        if self.through != "alignment":
            if self.known:
                raise ValueError("known people help through = alignment alone")
        elif self.source != "class-embeddings":
            raise ValueError(f"only class embeddings come turned: source = {self.source} is linked through = own")
        elif self.alignment == "paired" and not self.known:
            raise ValueError("alignment = paired needs known, the number of class embeddings whose person is known")
        return self

    @property
    def reads(self) -> Literal["round", "step"]:
        return "step" if self.source == "face-embeddings" else "round"

    def needed(self) -> tuple[frozenset[str], ...]:
        more = {"auxiliary-faces"} if self.through == "adapter" else {"acquaintances"} if self.known else set()
        if self.source == "class-embeddings":
            return tuple(need | more for need in self.needs)
        return tuple(_GALLERY | more | {updates} for updates in ("client-updates", "aggregate"))

    def refusal(self, observation: Observation) -> str | None:
        why = super().refusal(observation)
        if why and self.source == "class-embeddings" and observation.class_embeddings is None:
            why += ": no class embedding of anybody else reaches it, so there is nothing to link"
        return why

    def unsuitable(self, observation: Observation) -> str | None:
        if self.through == "adapter" and (why := too_few(observation, "a recogniser of its own")) is not None:
            return why
        rows, acquaintances = observation.class_embeddings, observation.acquaintances
        if self.known and rows is not None and acquaintances is not None:
            held = len(set(rows.classes) & set(acquaintances))
            if held < self.known or held == len(rows.classes):
                return (
                    f"known = {self.known} leaves nobody to be named, or is more than the {held} people of whom there are photos "
                    f"among the {len(rows.classes)} class embeddings: set identity-linkage.known lower"
                )
        if self.source == "face-embeddings":
            return EmbeddingRecovery().unsuitable(observation)
        if self.source == "embedding-changes" and not any(HEAD in u.delta for u in targets(observation)):
            return (
                f"no change of a class embedding reaches the seat '{observation.threat}' under {observation.algorithm}"
            )
        return None

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """scores: float32 (n, G), row i for the class (or, of recorded steps, the client) ``sources[i]``; embeddings: float32
        (n, d), what was linked, of recorded steps alone. A feature that was not found is at cosine zero with everybody."""
        sources, embeddings, model = self._embeddings(observation, generator)
        scores = self._scores(observation, model, embeddings, generator, progress)
        if self.known:
            acquaintances = observation.acquaintances or {}
            asked = [i for i, c in enumerate(sources) if c not in acquaintances]
            sources, scores = tuple(sources[i] for i in asked), scores[asked]
        progress(1, 1)
        return Reconstruction(sources, scores=scores, embeddings=embeddings if self.reads == "step" else None)

    def _embeddings(
        self, observation: Observation, generator: torch.Generator
    ) -> tuple[tuple[int, ...], Tensor, Tensors]:
        """Whose each embedding is, the embeddings (n, d), and the model to whose features they belong."""
        model, rows = observation.global_model, observation.class_embeddings
        assert model is not None
        match self.source:
            case "class-embeddings":
                assert rows is not None
                return tuple(rows.classes), rows.weight.detach().cpu().float(), model
            case "face-embeddings":
                found = EmbeddingRecovery()(observation, generator)
                assert found.embeddings is not None
                return found.sources, found.embeddings, targets(observation)[0].before
        total: dict[int, Tensor] = {}
        for update in targets(observation):
            for c, change in zip(update.classes, update.delta.get(HEAD, ()), strict=False):
                total[c] = total.get(c, 0) + change.detach().cpu().float()
        return tuple(total), torch.stack(list(total.values())), model

    def _scores(
        self,
        observation: Observation,
        model: Tensors,
        embeddings: Tensor,
        generator: torch.Generator,
        progress: Progress,
    ) -> Tensor:
        backbone, gallery = load_backbone(observation.public_constants.spec, model), observation.gallery
        assert gallery is not None
        if self.through == "own":
            return person_scores(backbone, gallery, embeddings)
        if self.through == "alignment":
            gallery_people, held = person_embeddings(backbone, gallery), observation.class_embeddings
            assert held is not None
            knows = observation.acquaintances or {} if self.known else {}
            pairs = [(i, knows[c]) for i, c in enumerate(held.classes) if c in knows]
            tick = lambda done: progress(done, self.restarts + 1)  # noqa: E731
            return aligned_scores(self.alignment, embeddings, gallery_people, pairs, self.restarts, generator, tick)
        faces, people = observation.auxiliary_faces, observation.auxiliary_people
        assert faces is not None and people is not None  # noqa: PT018
        (own,) = shadows(faces, people, observation.public_constants, 1, self.epochs, progress)
        other = own.backbone
        return person_scores(other, gallery, F.normalize(embeddings, dim=1) @ adapted(backbone, other, faces))
