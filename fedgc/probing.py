"""A client that departs from the protocol: it chooses what it uploads as class embeddings, to read those of others.

The server pushes every uploaded row w away from the rows of other clients that lie near it, and returns it. What it returns less
what was sent is therefore minus a mean of strangers' class embeddings, each weighed by how near it lies (less the part along w
itself). A client that follows this answer climbs towards one stranger, as mean shift climbs a density (Cheng 1995). Its
backbone it trains honestly, with class embeddings of its own that it keeps at home, so that the model does not suffer.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc.algorithms import ALGORITHMS, Algorithm
from fedgc.errors import UsageError
from fedgc.rng import generator

WIDEN, NARROW = 0.8, 2.0  # what becomes of `hold` where two answers agree, and where they contradict each other


@dataclass(frozen=True)
class Probing:
    """client: who probes; first: the first round in which it does. A probe's next place is unit(answer + hold · probe).

    hold: how much a probe keeps to its place at first; it grows where a probe has overshot and shrinks where it goes straight on.
    start: from its own class embeddings, or from random directions. restart: rounds after which every probe begins anew at a
    random place (0: never), for more strangers than rows. length: of the rows sent; on a server that takes raw inner products a
    long probe is answered by its nearest stranger alone.
    """

    client: int
    first: int
    hold: float = 2.0
    start: Literal["own", "random"] = "own"
    restart: int = 0
    length: float = 1.0

    def begins(self, round: int) -> bool:
        """Whether the probes of this round take new places."""
        since = round - self.first
        return since == 0 or (self.restart > 0 and since > 0 and since % self.restart == 0)


@dataclass(frozen=True)
class Probes:
    """What the probing client remembers from round to round. own: (n, d) its true class embeddings; sent: (n, d) the rows that
    it uploaded last; answer: (n, d) unit, what it made of the answer before; hold: (n, 1)."""

    own: Tensor
    sent: Tensor
    answer: Tensor
    hold: Tensor

    def after(self, change: Tensor) -> Probes:
        """With what local training made of its own class embeddings, (n, d)."""
        return replace(self, own=self.own + change)

    def to_tensors(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in ("own", "sent", "answer", "hold")}


def answer_of(sent: Tensor, received: Tensor) -> Tensor:
    """(n, d) unit directions towards strangers that the server's answer shows; zero where it did not move a row."""
    return F.normalize(sent - received, dim=1, eps=1e-30)


def next_probes(plan: Probing, round: int, seed: int, received: Tensor, before: Probes | None) -> Probes:
    """The rows that the client uploads in ``round``. received: (n, d), what the server holds for it since its last correction."""
    own = received if before is None else before.own
    if before is None or plan.begins(round):
        if plan.start == "own" and round == plan.first:
            places = own
        else:
            draw = torch.randn(own.shape, generator=generator(seed, "probes", round))
            places = draw.to(own)
        hold = torch.full_like(own[:, :1], plan.hold)
        return Probes(own, plan.length * F.normalize(places, dim=1), torch.zeros_like(own), hold)
    answer = answer_of(before.sent, received)
    agreement = (answer * before.answer).sum(1, keepdim=True)
    hold = torch.where(
        agreement < 0, before.hold * NARROW, torch.where(agreement > 0, before.hold * WIDEN, before.hold)
    )
    hold = hold.clamp_min(plan.hold / 4)
    places = F.normalize(answer + hold * F.normalize(before.sent, dim=1), dim=1)
    return Probes(own, plan.length * places, answer, hold)


def require_answers(algorithm: Algorithm, clients: int) -> None:
    """Raises UsageError where the server answers no uploaded class embedding, or there are no strangers to answer about."""
    if not algorithm.corrects or clients < 2:
        able = ", ".join(a.name for a in ALGORITHMS.values() if a.corrects)
        raise UsageError(
            f"probing.rounds: a server answers class embeddings under {able} with two clients or more; under "
            f"{algorithm.name} with {clients} there is nothing to probe"
        )
