"""Which canaries a model was trained on: the strong, informed attacker that an audit of privacy needs.

The auditor (Steinke, Nasr, Jagielski 2023, arXiv 2305.08846) knows every candidate image, its class and its client, and reads the
update of each round. Divided by the learning rate, an update is a sum of gradients and, under dp-sgd, of noise that is equal and
independent in all coordinates and, so divided, equally strong in all rounds. A candidate that took part left its clipped gradient
there. A ridge regression on the update fits all that may be in it at once: the gradients of the candidates and, so that they
are not taken for those, the mean gradient of faces under each class, with strangers' faces for the client's own.

Beside each candidate an image that is certainly not there is fitted in its place: a candidate of another client, under the class
of this one. What is fitted of those says what absence looks like; in units of their spread, evidence of rounds adds up.
"""

from __future__ import annotations

from itertools import chain
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from attacks.photo_gradients import PhotoGradients, products
from attacks.updates import Noise, illegible, reads_rows, targets
from fedgc.types import Attack, Canaries, LocalConstants, Observation, ObservedUpdate, Progress, Reconstruction

TARGET, CONTROL = -1, -2  # sources


class CanaryInference(Attack):
    """Evidence that each candidate was trained on. ridge: of the regression, in squared lengths of a gradient; faces: strangers'
    photos whose mean gradient under each class is fitted too."""

    name: Literal["canary-inference"] = "canary-inference"
    ridge: float = Field(default=0.1, gt=0)
    faces: int = Field(default=4, ge=1)
    needs: ClassVar[tuple[frozenset[str], ...]] = (
        frozenset({"client-updates", "canaries", "auxiliary-faces"}),
        frozenset({"aggregate", "canaries", "auxiliary-faces"}),
    )
    target: ClassVar[Literal["round", "step"]] = "round"
    summary: ClassVar[str] = (
        "which canaries were trained on, from the updates of whole rounds: a lower bound on epsilon"
    )

    def unsuitable(self, observation: Observation) -> str | None:
        for update in targets(observation):
            if not reads_rows(update, observation.public_constants):
                return (
                    "computes the gradient of a canary under its class, and under "
                    f"{observation.algorithm} the class embeddings for it do not reach the seat '{observation.threat}'"
                )
        return illegible(observation)

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """scores: float32 (2, m), row 0 of each candidate and row 1 of the image in its place; zero where the update of the
        candidate's client is not seen. They add up over rounds."""
        canaries, faces = observation.canaries, observation.auxiliary_faces
        assert canaries is not None and faces is not None  # noqa: PT018
        drawn = faces[torch.randperm(len(faces), generator=generator)[: self.faces]]
        fitted = torch.zeros(2, len(canaries.images), dtype=torch.float64)
        share = torch.zeros_like(fitted)
        updates = targets(observation)
        for done, update in enumerate(updates, 1):
            mine = torch.isin(canaries.clients, torch.tensor(update.clients)).nonzero()[:, 0]
            if len(mine):
                read = self._read(update, observation.public_constants, canaries, mine, drawn, generator)
                fitted[:, mine], share[:, mine] = read
            progress(done, len(updates))
        seen = share[1] > 0
        absent = fitted[1, seen]
        scores = share * (fitted - absent.mean()) / absent.std(correction=0).clamp_min(1e-12)
        return Reconstruction((TARGET, CONTROL), scores=torch.where(seen, scores, 0.0).float())

    def _read(
        self, update: ObservedUpdate, constants: LocalConstants, canaries: Canaries, mine: Tensor, faces: Tensor,
        generator: torch.Generator,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Of n candidates in one update (2, n) coefficients of them and of those in their place, and what share of the clipping
        norm each gradient has (1 where nothing is clipped)."""
        place = {c: i for i, c in enumerate(update.classes)}
        labels = torch.tensor([place[c] for c in canaries.classes[mine].tolist()])
        images = torch.cat([canaries.images[mine], canaries.images[elsewhere(canaries.clients)[mine]]])
        photo = PhotoGradients(update, constants)
        of_faces = (photo.mean(faces, c) for c in labels.unique().tolist())
        count = len(images) + len(labels.unique())
        every = chain(photo.each(images, labels.repeat(2)), of_faces)
        along, gram, lengths = products(every, count, photo.observed, generator)
        gram.diagonal().add_(self.ridge)
        fitted = torch.linalg.solve(gram, along)[: len(images)].view(2, -1)
        noise, own = Noise.of(update, constants), lengths[: len(images)].view(2, -1)
        return fitted, torch.ones_like(own) if noise is None else (own / noise.clip).clamp(max=1)


def elsewhere(clients: Tensor) -> Tensor:
    """For each of m candidates, with the client (m,) of each, the next in a circle that is another client's; itself where all
    are one client's."""
    m = len(clients)
    found = torch.arange(m)
    for step in range(m - 1, 0, -1):
        other = (torch.arange(m) + step) % m
        found = torch.where(clients[other] != clients, other, found)
    return found
