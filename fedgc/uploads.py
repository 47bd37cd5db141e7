"""What goes to a client in a round and what comes back: every door of the defense on the client's side of the wire."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fedgc.algorithms import Algorithm, backbone_part
from fedgc.doors import Defense
from fedgc.local import LocalResult
from fedgc.probing import Probes
from fedgc.rng import generator
from fedgc.schedule import Party
from fedgc.types import HEAD, ClientUpdate, LocalConstants, Tensors

Where = tuple[int | str, ...]  # names a round or a recorded step among the random streams


@dataclass(frozen=True)
class Order:
    """What the server sends one client in a round. rows: class embeddings (n, d), all of them or the client's own, as the
    algorithm has it, and none where they are private; examples: photos of each client of the round."""

    where: Where
    constants: LocalConstants
    backbone: Tensors
    rows: Tensor | None
    examples: Mapping[int, int]

    @property
    def recorded(self) -> bool:
        """Whether this is a recorded step, which trains nobody."""
        return self.where[0] == "step"


@dataclass(frozen=True)
class Home:
    """What a client keeps from round to round. rows: its own class embeddings (n, d), where it trains from others than those that
    the server sends; probes: of a client that probes, which then trains from ``probes.own``."""

    rows: Tensor | None = None
    probes: Probes | None = None


@dataclass(frozen=True)
class Upload:
    """What one client's round leaves. sent: changes of tensors, as they go to the server; masked: int64, in place of all of
    them that are averaged, where the defense masks; the rest goes with it: mean loss (nan where no step had a photo), steps,
    photos, and gradients of single photos that were not finite. home: what stays, as training left it."""

    client: int
    sent: Tensors
    loss: float
    steps: int
    images: int
    dropped: int = 0
    masked: Tensors = field(default_factory=dict)
    home: Home = Home()


@dataclass(frozen=True)
class Packing:
    """How a client packs what it trained. constant: names of tensors that no client trains, or sends."""

    algorithm: Algorithm
    defense: Defense
    noise_key: int
    constant: frozenset[str] = frozenset()

    def __call__(self, party: Party, result: LocalResult, order: Order, home: Home) -> Upload:
        k, head = party.client, self.algorithm.head
        delta = {name: tensor for name, tensor in result.delta.items() if name not in self.constant}
        update = ClientUpdate(k, backbone_part(delta) if head == "private" else delta, order.examples[k])
        sent = dict(self.defense.outgoing(update, self._stream(order, "outgoing", k)).tensors)
        if head == "private" and home.rows is not None:
            home = Home(home.rows + result.delta[HEAD])
        elif head == "stacked":
            sent[HEAD], home = self._rows(k, sent[HEAD], result.delta[HEAD], order, home)
        masked = self._masked(k, self.algorithm.averaged(sent), order) if self.defense.masks else {}
        return Upload(k, sent, result.loss, result.steps, result.images, result.dropped, masked, home)

    def _rows(self, k: int, change: Tensor, trained: Tensor, order: Order, home: Home) -> tuple[Tensor, Home]:
        """The change (n, d) that is uploaded of the class embeddings that the server holds, and what stays at home.

        change: as the defense lets it out; trained: as local training made it.
        """
        assert order.rows is not None
        if home.probes is not None and not order.recorded:
            return home.probes.sent - order.rows, Home(home.rows, home.probes.after(trained))
        if home.rows is None:
            return change, home
        own = home.rows + change
        same = generator(self.noise_key, "uploading", k)  # in every round
        return self.defense.uploading(k, own, same) - order.rows, Home(own, home.probes)

    def _masked(self, k: int, averaged: Tensors, order: Order) -> Tensors:
        share = order.examples[k] / sum(order.examples.values())
        weighted = {name: share * tensor for name, tensor in averaged.items()}
        pair = lambda other: self._stream(order, "mask", min(k, other), max(k, other))  # noqa: E731
        return self.defense.masked(k, weighted, tuple(order.examples), pair)

    def _stream(self, order: Order, door: str, *more: int) -> torch.Generator:
        return generator(self.noise_key, door, *order.where, *more)


@dataclass(frozen=True)
class Absence:
    """A client without an upload, and why. asked: whether it may have sent something nevertheless."""

    why: str
    asked: bool = True


Asked = Iterable[tuple[Party, Order, Home]]
Answers = Iterator[tuple[Party, Upload | Absence]]
Ask = Callable[[Asked], Answers]
