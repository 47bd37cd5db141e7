"""Whether a person was trained on, by other photos of that person: membership inference at the level of people.

A recogniser draws the photos of people whom it knows closer together, and closer to a class embedding, than those of others.
How much of that is membership and how much an easy face, models tell that the attacker trains on strangers (`attacks.shadows`):
the same person's evidence under models which cannot know it is taken for its difficulty (Watson et al. 2022, arXiv 2111.08440).
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from attacks.shadows import Shadow, Strangers, shadows, strangers, too_few
from fedgc.models import load_backbone
from fedgc.types import Attack, Gallery, Observation, Progress, Reconstruction

GENERAL = 2  # pieces of evidence that the backbone alone gives; the class embeddings give one more
TARGET, CONTROL = -1, -2  # sources


@torch.no_grad()
def evidence(backbone: nn.Module, rows: Tensor | None, people: Gallery, batch: int = 256) -> Tensor:
    """(P, 2 or 3) of each person: mean cosine between its photos, mean length of their features, and, where class embeddings
    (C, d) are known, the greatest cosine of its mean feature with one of them. Of one photo, the cosine with its mirror image."""
    z = torch.cat([backbone(x) for x in people.images.split(batch)])
    mirrored = torch.cat([backbone(x.flip(3)) for x in people.images.split(batch)])
    lengths, unit = (z.norm(dim=1) + mirrored.norm(dim=1)) / 2, F.normalize(z, dim=1) + F.normalize(mirrored, dim=1)
    unit = F.normalize(unit, dim=1)
    found = []
    for person in range(people.size):
        mine = people.people == person
        u = unit[mine]
        if len(u) > 1:
            within = (u.sum(0).square().sum() - len(u)) / (len(u) * (len(u) - 1))
        else:
            within = F.cosine_similarity(z[mine], mirrored[mine]).mean()
        row = [within, lengths[mine].mean()]
        if rows is not None:
            row.append((F.normalize(u.mean(0), dim=0) @ F.normalize(rows, dim=1).T).max())
        found.append(torch.stack(row))
    return torch.stack(found)


def standardised(values: Tensor, reference: Tensor) -> Tensor:
    """In standard deviations above people whom the model was not trained on."""
    return (values - reference.mean(dim=0)) / reference.std(dim=0).clamp_min(1e-6)


class MembershipInference(Attack):
    """The probability of membership of each suspect, by a logistic regression that the shadows' own strangers fit."""

    name: Literal["membership-inference"] = "membership-inference"
    models: int = Field(default=4, ge=4, le=64, multiple_of=2)
    epochs: int = Field(default=30, ge=1)
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"global-model", "auxiliary-faces", "suspects"}),)
    target: ClassVar[Literal["round", "step"]] = "round"
    summary: ClassVar[str] = "tells who was trained on, by other photos of them"

    def unsuitable(self, observation: Observation) -> str | None:
        return too_few(observation, "shadow models")

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """scores: float32 (2, P), row 0 of the released model and row 1 of a control, a shadow in its place that knows nobody of
        them: what it finds is how members differ from others as faces."""
        faces, people, suspects = observation.auxiliary_faces, observation.auxiliary_people, observation.suspects
        model, visible = observation.global_model, observation.class_embeddings
        assert faces is not None and people is not None and suspects is not None and model is not None  # noqa: PT018
        own = strangers(faces, people)
        assert own is not None
        made = shadows(faces, people, observation.public_constants, self.models, self.epochs, progress)
        backbone = load_backbone(observation.public_constants.spec, model)
        rows = None if visible is None else visible.weight.detach().cpu().float()
        of_target = standardised(evidence(backbone, rows, suspects), evidence(backbone, rows, own.seen))
        columns = of_target.shape[1]
        of_suspects = torch.stack([_seen_by(s, suspects, own)[:, :columns] for s in made])
        of_strangers = torch.stack([_seen_by(s, own.seen, own)[:, :columns] for s in made])
        judge = _fitted(of_strangers, torch.stack([s.members for s in made]))
        found = judge(of_target, of_suspects.mean(dim=0))
        control = judge(of_suspects[0], of_suspects[1:].mean(dim=0))
        return Reconstruction((TARGET, CONTROL), scores=torch.stack([found, control]))


def _seen_by(shadow: Shadow, people: Gallery, own: Strangers) -> Tensor:
    """(P, 3) evidence in a shadow, in standard deviations of the strangers whom it does not know."""
    reference = evidence(shadow.backbone, shadow.rows, own.seen)[~shadow.members]
    return standardised(evidence(shadow.backbone, shadow.rows, people), reference)


def _fitted(of_strangers: Tensor, members: Tensor):  # type: ignore[no-untyped-def]
    """(evidence (P, f), difficulty (P, f)) -> (P,) probability of membership. of_strangers: (K, P, f), members: (K, P)."""
    from sklearn.linear_model import LogisticRegression

    inputs, answers = [], []
    for k in range(len(members)):
        others = (~members).clone()
        others[k] = False
        weight = others.float()[:, :, None]
        usable = others.any(dim=0)
        difficulty = (of_strangers * weight).sum(dim=0) / weight.sum(dim=0).clamp_min(1)
        inputs.append(_columns(of_strangers[k], difficulty)[usable.numpy()])
        answers.append(members[k][usable].numpy())
    fit = LogisticRegression().fit(np.concatenate(inputs), np.concatenate(answers))

    def judge(found: Tensor, difficulty: Tensor) -> Tensor:
        return torch.from_numpy(fit.predict_proba(_columns(found, difficulty))[:, 1]).float()

    return judge


def _columns(found: Tensor, difficulty: Tensor) -> np.ndarray:
    return torch.cat([found, difficulty[:, :GENERAL]], dim=1).double().numpy()
