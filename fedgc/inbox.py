"""What the server gathers while the clients of one round report, and every door of the defense between them and it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedgc.algorithms import Algorithm, RunningMean, backbone_part
from fedgc.doors import ClientPlan, Defense
from fedgc.local import LocalResult
from fedgc.probing import Probes
from fedgc.rng import generator
from fedgc.schedule import Party
from fedgc.types import HEAD, Charge, ClientUpdate, State, Tensors

Where = tuple[int | str, ...]  # names a round or a recorded step among the random streams


@dataclass
class Inbox:
    """Updates are added up as they arrive, in one accumulator. constant: names of tensors that no client trains, or sends;
    examples: photos of each client of this round; keep: whose messages are kept for the record.

    rows: (C, d) what the server holds of class embeddings, with those that have arrived; kept: as clients keep them at home, if
    other than those; updates, own: what is kept of messages (see `Transcript`).
    """

    algorithm: Algorithm
    defense: Defense
    noise_key: int
    constant: frozenset[str]
    where: Where
    examples: Mapping[int, int]
    before: State
    keep: Callable[[int], bool]
    mean: RunningMean = field(default_factory=RunningMean)
    updates: dict[int, ClientUpdate] = field(default_factory=dict)
    own: dict[int, Tensors] = field(default_factory=dict)
    charges: tuple[Charge, ...] = ()
    losses: list[float] = field(default_factory=list)
    images: int = 0
    dropped: int = 0
    chosen: tuple[int, ...] = ()  # classes whose rows a probing client chose

    def __post_init__(self) -> None:
        self.rows = self.before.rows.clone()
        self.kept = {name: tensor.clone() for name, tensor in self.before.kept.items()}
        self.probes = self.before.probes

    def take(self, party: Party, result: LocalResult, plan: ClientPlan, probes: Probes | None = None) -> None:
        """What one client uploads; private class embeddings stay at home. probes: of a client that uploads them, in whole rounds,
        in place of its class embeddings."""
        k, head = party.client, self.algorithm.head
        delta = {name: tensor for name, tensor in result.delta.items() if name not in self.constant}
        sent = self._outgoing(k, backbone_part(delta) if head == "private" else delta)
        if head == "private":
            self.rows[list(party.classes)] += result.delta[HEAD]
        elif head == "stacked":
            chosen = probes if self.where[0] == "round" else None
            sent[HEAD] = self._stack(party, sent[HEAD], result.delta[HEAD], chosen)
        self._add(k, sent)
        charge = self.defense.charge(plan, int(self.where[1]), result.steps)
        self.charges += (charge,) if charge is not None else ()
        self.losses += [] if math.isnan(result.loss) else [result.loss]
        self.images += result.images
        self.dropped += result.dropped

    def _stream(self, door: str, *more: int) -> torch.Generator:
        return generator(self.noise_key, door, *self.where, *more)

    def _outgoing(self, k: int, tensors: Tensors) -> dict[str, Tensor]:
        update = ClientUpdate(k, tensors, self.examples[k])
        return dict(self.defense.outgoing(update, self._stream("outgoing", k)).tensors)

    def _stack(self, party: Party, change: Tensor, trained: Tensor, probes: Probes | None) -> Tensor:
        """Put what one client uploads as its class embeddings in their place, and return how far the server lets them move.

        change: (n, d) of those that it holds, as the defense lets it out; trained: as local training made it.
        """
        k, mine = party.client, list(party.classes)
        held = self.rows[mine]
        if probes is not None:
            change = probes.sent - held
        elif self.defense.keeps_rows:
            self.kept[HEAD][mine] += change
            same = generator(self.noise_key, "uploading", k)  # in every round
            change = self.defense.uploading(k, self.kept[HEAD][mine], same) - held
        taken = self.defense.receiving(k, change, held)
        if probes is not None:
            came = probes if taken is change else replace(probes, sent=held + taken)
            self.probes, self.chosen = came.after(trained).to_tensors(), party.classes
        self.rows[mine] += self.defense.aggregated({HEAD: taken}, 1.0, self._stream("stacked", k))[HEAD]
        return taken

    def _add(self, k: int, sent: Tensors) -> None:
        """What of an upload is averaged, added up, and the record of it: of a masked one only what is not."""
        share = self.examples[k] / sum(self.examples.values())
        averaged = sent if self.algorithm.head == "shared" else backbone_part(sent)
        clear = sent
        if self.defense.masks:
            weighted = {name: share * tensor for name, tensor in averaged.items()}
            pair = lambda other: self._stream("mask", min(k, other), max(k, other))  # noqa: E731
            self.mean.add(self.defense.masked(k, weighted, tuple(self.examples), pair), 1)
            clear = {name: tensor for name, tensor in sent.items() if name not in averaged}
        else:
            self.mean.add(averaged, share)
        if self.keep(k):
            self.own |= {k: averaged} if self.defense.masks else {}
            self.updates |= {k: ClientUpdate(k, clear, self.examples[k])} if clear else {}

    @cached_property
    def total(self) -> Tensors:
        """The weighted mean of what all clients sent to be averaged."""
        return self.defense.unmasked(self.mean.total) if self.defense.masks else self.mean.total

    @property
    def complete(self) -> bool:
        """Whether all that went into the mean is kept for the record."""
        return not self.defense.masks and len(self.updates) == len(self.examples)

    def aggregate(self) -> Tensors:
        """The mean as the defense lets it out."""
        largest = max(self.examples.values()) / sum(self.examples.values())
        return self.defense.aggregated(self.total, largest, self._stream("aggregated"))

    def answered(self, W: Tensor) -> dict[str, Tensor]:
        """Class embeddings that clients keep at home, changed as the server, which now holds ``W``, changed those that they
        uploaded. A client that uploaded others keeps its own out of it."""
        if not self.kept:
            return {}
        answer = W - self.rows
        answer[list(self.chosen)] = 0
        return {name: tensor + answer for name, tensor in self.kept.items()}
