"""Two worlds for an audit: the real code of a defense, run with a worst-case canary and without it, and what it let out.

Everything but the canary is public here, as differential privacy has it: the other photos, the weights that the server sends
(another choice in every round, a server's right), counts and rates. Noise and sampling are fresh in every run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from defenses.client_dp import ClientDP
from defenses.dp_sgd import DPSGD
from fedgc import heads
from fedgc.algorithms import Algorithm
from fedgc.doors import ClientPlan, Defense
from fedgc.errors import WorkFailedError
from fedgc.heads import CosineHead
from fedgc.inbox import Inbox
from fedgc.local import LocalResult, load_tensors, train_locally
from fedgc.models import FaceModel, state_tensors
from fedgc.rng import generator
from fedgc.schedule import Party
from fedgc.types import BACKBONE, HEAD, Charge, LocalConstants, ModelSpec, State, Tensors
from fedgc.uploads import Home, Order, Packing

Floats = NDArray[np.float64]
Canary = Literal["long", "not finite"]
Released = list[Floats | None]  # (D,) in each round; None where a round failed, which everybody sees
SPEC = ModelSpec("small", "group", 8, 32, "cosface", 0.2, 8.0)
NOTHING_TRAINED = LocalConstants(SPEC, 0.0, 1.0, 0.0, 0.0, None, 1, None, False)
UNITS = 8  # photos or people of the audited client
PHOTOS = 2  # of each person, at most
SPARE = 2.0  # a canary's gradient is this many clipping norms long or longer
SHORT = 0.02  # of its feature, and of the class embedding of its person
HALVINGS = 60  # of weights, until it is
BIAS = BACKBONE + "embedding.bias"
LENGTH = 10.0  # of a client's whole update, in clipping norms


class Worlds(Protocol):
    """charges: what every run costs. canaries: which there are. blocks: the parts of what is released. directions: (R, D) what
    the long canary adds in each round. All in clipping norms."""

    charges: tuple[Charge, ...]
    canaries: tuple[Canary, ...]
    blocks: Mapping[str, slice]
    directions: Floats

    @property
    def defense(self) -> Defense: ...

    def play(self, canary: Canary | None, key: int) -> Released:
        """One run. key: of all its noise and sampling."""
        ...


# -- photos and people


class Absentable(nn.Module):
    """A backbone under which a black photo is none: features are multiplied by the photo's mean brightness, which a cosine
    head does not see unless it is zero, and then every parameter's gradient is zero too. So a photo can be taken away
    while the public counts, rates and batch sizes stay."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 8, stride=8)
        self.norm = nn.GroupNorm(1, 4)
        self.embedding = nn.Linear(64, SPEC.embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        z = self.embedding(torch.relu(self.norm(self.convolution(x))).flatten(1))
        return z * x.mean(dim=(1, 2, 3))[:, None]


class LocalTraining:
    """dp-sgd around a client's training. A round is one step, so that the server sees every step. defense: as prepared for what
    is played here; rate: the share of photos (or people) in a batch."""

    def __init__(self, defense: DPSGD, rounds: int, rate: float, seed: int) -> None:
        people = defense.unit == "identity"
        self.each = min(defense.photos_per_person, PHOTOS) if people else 1
        expected = max(1, round(rate * UNITS))
        batch = expected * (defense.photos_per_person if people else 1)
        self.labels = torch.arange(UNITS).repeat_interleave(self.each)
        self.plan = ClientPlan(0, len(self.labels), batch, rounds, self.labels, rounds)
        self.defense = defense.prepared([self.plan])
        draw = generator(seed, "audit", "photos")
        self.photos = torch.randint(0, 256, (len(self.labels), 3, 32, 32), dtype=torch.uint8, generator=draw)
        self.photos[-self.each :] = self.photos[-1]  # all photos of the canary's person are one
        self.model = FaceModel(Absentable(), CosineHead(UNITS, SPEC.embedding_size))
        self.defense.check_module(self.model)
        bound = self.defense.max_grad_norm
        self.starts = [self._weights(generator(seed, "audit", "weights", r), bound) for r in range(rounds)]
        # so that updates are about as long as weights, and not lost in their rounding
        lr = expected / (bound * max(1.0, self.defense.noise_multiplier or 0.0))
        self.constants = LocalConstants(SPEC, lr, 1.0, 0.0, 0.0, None, batch, None, False, self.defense.card())
        self.unit_step = -expected / (lr * bound)
        self.canaries: tuple[Canary, ...] = ("long", "not finite")
        self.blocks: Mapping[str, slice] = _blocks(self.model.head.weight.numel())
        self.directions = np.stack([self._direction(start, bound, expected == UNITS) for start in self.starts])
        found = [self.defense.charge(self.plan, r + 1, 1) for r in range(rounds)]
        self.charges = tuple(charge for charge in found if charge is not None)

    def play(self, canary: Canary | None, key: int) -> Released:
        photos, everybody = self._photos(canary), torch.arange(len(self.photos))
        released: Released = []
        for r, start in enumerate(self.starts, 1):
            load_tensors(self.model, start)
            try:
                result = train_locally(
                    self.model, photos, self.labels, iter([everybody]), self.constants, self.defense, self.plan,
                    sampling=generator(key, "sampling", r, 0), augmenting=None, noise=generator(key, "noise", r, 0),
                )  # fmt: skip
            except WorkFailedError:
                released.append(None)
                continue
            released.append(_flat(result.delta) * self.unit_step)
        return released

    def _photos(self, canary: Canary | None) -> Tensor:
        """The last photo, or the photos of the last person, are the canary: black where there is none, and with a gradient that
        is not finite where the pixels are not (of 8-bit photos, where an unlucky network overflows)."""
        if canary == "long":
            return self.photos
        photos = self.photos.float()
        photos[-self.each :] = 0.0 if canary is None else torch.nan
        return photos

    def _weights(self, draw: torch.Generator, bound: float) -> dict[str, Tensor]:
        """Weights under which the canary's gradient is longer than the clipping norm, and much longer than everybody else's: its
        feature, and the class embedding of its person, are all but zero, and the cosine's gradient goes with one over both."""
        start = {}
        for name, tensor in state_tensors(self.model).items():
            random = torch.randn(tensor.shape, generator=draw)
            start[name] = 1 + 0.1 * random if name.endswith("norm.weight") else random / tensor[0].numel() ** 0.5
        start[HEAD][-1] *= SHORT
        load_tensors(self.model, start)
        with torch.no_grad():
            x = self.photos[-1:].float() / 255
            start[BIAS] = SHORT * start[BIAS] - (self.model.backbone(x)[0] / x.mean() - start[BIAS])
        for _ in range(HALVINGS):
            load_tensors(self.model, start)
            if float(np.linalg.norm(self._gradient(UNITS - 1))) >= SPARE * bound:
                break
            for name in (HEAD, BACKBONE + "embedding.weight", BIAS):
                start[name] = start[name] / 2
        return start

    def _gradient(self, unit: int) -> Floats:
        """Of the loss of one photo, or of the mean over a person's, by plain differentiation: (D,)."""
        mine = slice(unit * self.each, (unit + 1) * self.each)
        value = heads.loss(self.model(self.photos[mine].float() / 255), self.labels[mine], SPEC)
        named = dict(self.model.named_parameters())
        return _flat(dict(zip(named, torch.autograd.grad(value, list(named.values())), strict=True)))

    def _direction(self, start: Tensors, bound: float, everybody: bool) -> Floats:
        """The canary's clipped gradient over the clipping norm; where it is by chance who else is in the batch, what of it is
        orthogonal to everybody else's."""
        load_tensors(self.model, start)
        own = self._gradient(UNITS - 1)
        own /= max(bound, float(np.linalg.norm(own)))
        if everybody:
            return own
        others = np.stack([self._gradient(unit) for unit in range(UNITS - 1)], axis=1)
        return own - others @ np.linalg.lstsq(others, own, rcond=None)[0]


# -- whole clients


@dataclass(frozen=True)
class _Sender:
    party: Party
    plan: ClientPlan
    deltas: tuple[Tensors, ...]  # one a round


class WholeUpdates:
    """client-dp at the doors that a client's update goes through. Of two clients the one with more photos is the canary; where it
    is absent it sends zeros, its weight being public. Seen: each update with local noise, else what the server lets out."""

    def __init__(self, defense: ClientDP, rounds: int, algorithm: Algorithm, seed: int) -> None:
        self.algorithm, self.seen = algorithm, defense.noise
        photos, bound = (2 * UNITS, UNITS), defense.max_grad_norm
        plans = [ClientPlan(k, n, n, rounds, rounds=rounds) for k, n in enumerate(photos)]
        self.defense = defense.prepared(plans)
        self.share = photos[0] / sum(photos)
        model = FaceModel(Absentable(), CosineHead(2 * UNITS, SPEC.embedding_size))
        shapes = {name: tensor.shape for name, tensor in state_tensors(model).items()}
        self.start = {name: torch.zeros(shape) for name, shape in shapes.items()}
        own = {**shapes, HEAD: torch.Size((UNITS, SPEC.embedding_size))} if algorithm.head != "shared" else shapes
        self.sent = [name for name in own if name != HEAD or algorithm.head != "private"]
        self.senders = []
        for k, plan in enumerate(plans):
            draw = generator(seed, "audit", "update", k)
            nothing = torch.zeros(plan.images)
            party = Party(k, nothing, nothing, tuple(range(k * UNITS, (k + 1) * UNITS)))
            random = [{n: torch.randn(s, generator=draw) for n, s in own.items()} for _ in range(rounds)]
            deltas = tuple(_long(tensors, self.sent, LENGTH * bound) for tensors in random)
            self.senders.append(_Sender(party, plan, deltas))
        self.canaries: tuple[Canary, ...] = ("long",)
        self.blocks: Mapping[str, slice] = _blocks(self.senders[0].deltas[0][HEAD].numel() if HEAD in self.sent else 0)
        self.directions = np.stack([self._flat(delta) / (LENGTH * bound) for delta in self.senders[0].deltas])
        found = [self.defense.charge(plans[0], r + 1, 1) for r in range(rounds)]
        self.charges = tuple(charge for charge in found if charge is not None)

    def play(self, canary: Canary | None, key: int) -> Released:
        released: Released = []
        state = State(0, {n: t for n, t in self.start.items() if n != HEAD}, self.start[HEAD])
        examples = {s.party.client: s.plan.images for s in self.senders}
        for r in range(len(self.directions)):
            where = ("round", r + 1)
            got = Inbox(self.algorithm, self.defense, key, where, examples, state, lambda client: True)
            pack, stacked = Packing(self.algorithm, self.defense, key), self.algorithm.head == "stacked"
            for sender in self.senders:
                absent = canary is None and sender is self.senders[0]
                delta = {n: torch.zeros_like(t) if absent else t for n, t in sender.deltas[r].items()}
                held = state.rows[list(sender.party.classes)] if stacked else None
                order = Order(where, NOTHING_TRAINED, state.backbone, held, examples)
                result = LocalResult(delta, float("nan"), 1, sender.plan.images)
                got.take(sender.party, pack(sender.party, result, order, Home()), sender.plan)
            seen = self._flat(self._view(got)) / self.defense.max_grad_norm
            released.append(seen if np.isfinite(seen).all() else None)
        return released

    def _view(self, got: Inbox) -> Tensors:
        """What is seen of the canary's client, as long as that client sent it."""
        if self.seen == "local":
            return got.updates[0].tensors
        mean = {name: tensor / self.share for name, tensor in got.aggregate().items()}
        mine = list(self.senders[0].party.classes)
        return {**mean, HEAD: (got.rows - got.before.rows)[mine]} if self.algorithm.head == "stacked" else mean

    def _flat(self, tensors: Tensors) -> Floats:
        return _flat({name: tensors[name] for name in self.sent})


def _flat(tensors: Tensors) -> Floats:
    """The backbone first, the class embeddings last: (D,)."""
    names = sorted(tensors, key=lambda name: name == HEAD)
    return torch.cat([tensors[name].detach().flatten() for name in names]).double().numpy()


def _blocks(head: int) -> dict[str, slice]:
    """The parts of such a vector, of which the last ``head`` numbers are class embeddings."""
    if not head:
        return {"backbone": slice(None)}
    return {"backbone": slice(0, -head), "class embeddings": slice(-head, None)}


def _long(tensors: Tensors, sent: list[str], length: float) -> dict[str, Tensor]:
    """Of that Euclidean length over what is sent."""
    found = float(torch.cat([tensors[name].flatten() for name in sent]).norm())
    return {name: tensor * (length / found) for name, tensor in tensors.items()}
