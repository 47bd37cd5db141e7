"""What a client learns of other people's class embeddings from the correction of its own rows.

The server's push on a row w is P Σ_i q_i e_i over the unit class embeddings e_i of other clients, q_i large where e_i is near w,
P the projection across w (see `fedgc.correction`). A client knows the row that it sent and the row that came back, so it knows
this sum up to its length. A curious client gets a blurred stranger from each of its own rows; a probing client
(`fedgc.probing`) sends rows that have climbed to where strangers are.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from attacks.identity_linkage import person_scores
from fedgc.models import load_backbone
from fedgc.probing import answer_of
from fedgc.types import Attack, Observation, Progress, Reconstruction


def strangers_seen(observation: Observation) -> Tensor:
    """(n, d) unit guesses of strangers' class embeddings, one for each row that the client sent; zero where nothing came back.

    Of a probing client the probes themselves, which stand where the answers of earlier rounds led; of a curious one the answers.
    """
    received, correction = observation.own_class_embeddings, observation.correction
    assert received is not None and correction is not None  # noqa: PT018
    if observation.probes is not None:
        return F.normalize(observation.probes.weight, dim=1)
    return answer_of(received.weight - correction.weight, received.weight)


class CorrectionProbe(Attack):
    """Strangers' class embeddings from what the server sends back; with photos of candidates, also who they are."""

    name: Literal["correction-probe"] = "correction-probe"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"correction", "own-class-embeddings"}),)
    target: ClassVar[Literal["round", "step"]] = "round"
    summary: ClassVar[str] = "other clients' class embeddings from the correction of one's own"

    def refusal(self, observation: Observation) -> str | None:
        why = super().refusal(observation)
        if why and observation.class_embeddings is not None:
            why += ": class embeddings of others reach it in the clear, so there is nothing to probe for"
        return why

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        """embeddings: float32 (n, d), entry i from the row of the client's own class ``sources[i]``; scores: (n, G)."""
        assert observation.correction is not None
        guesses = strangers_seen(observation).detach().cpu().float()
        scores = self._scores(observation, guesses)
        progress(1, 1)
        return Reconstruction(tuple(observation.correction.classes), embeddings=guesses, scores=scores)

    @staticmethod
    def _scores(observation: Observation, guesses: Tensor) -> Tensor | None:
        model, gallery = observation.global_model, observation.gallery
        if model is None or gallery is None:
            return None
        return person_scores(load_backbone(observation.public_constants.spec, model), gallery, guesses)
