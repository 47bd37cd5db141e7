"""One client's half of a round, as a function of what the server sent, its photos and what it keeps at home.

Every random choice has its own stream named by seed, round and client, so that a resumed run needs no replay, recording does not
disturb training, and a client makes the same of an order in whatever process it lives.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from fedgc.algorithms import Algorithm
from fedgc.doors import ClientPlan, Defense, Scheme
from fedgc.errors import UsageError
from fedgc.heads import CosineHead
from fedgc.limits import available, shown
from fedgc.local import LocalResult, epoch_batches, load_tensors, train_locally
from fedgc.models import FaceModel, build_backbone, train_last_layer_only
from fedgc.probing import Probing, require_answers
from fedgc.rng import generator
from fedgc.schedule import Party, Schedule
from fedgc.team import Team
from fedgc.types import BACKBONE, HEAD, Charge, ModelSpec, Tensors
from fedgc.uploads import Home, Order, Packing, Upload


@dataclass
class Clients:
    """Parties, scheme and defense, with one resident model that every client of this process trains in turn. initial:
    `backbone.*` tensors to start from in place of random ones. probing: what one client does in place of the protocol, if any
    does. last_layer_only: whether clients train no more of the backbone than its last layer. team: other processes that share
    every batch of a round."""

    algorithm: Algorithm
    spec: ModelSpec
    schedule: Schedule
    parties: Sequence[Party]
    defense: Defense
    seed: int
    noise_key: int
    device: torch.device
    initial: Tensors | None = None
    probing: Probing | None = None
    last_layer_only: bool = False
    team: Team | None = None

    def __post_init__(self) -> None:
        self.backbone = self._fresh().to(
            memory_format=torch.channels_last
        )  # the faster layout for convolutions on a CPU
        self.owners = tuple(p.client for p in self.parties for _ in p.classes)
        if self.last_layer_only:
            train_last_layer_only(self.backbone)
        held = [name for name, p in self.backbone.named_parameters() if not p.requires_grad]
        held += [name for name, _ in self.backbone.named_buffers()] if self.spec.norm == "frozen" else []
        self.constant = frozenset(BACKBONE + name for name in held)  # what no client trains, or sends
        self.defense.check_scheme(self.scheme)
        if self.probing is not None:
            require_answers(self.algorithm, len(self.parties))
        module = FaceModel(self.backbone, CosineHead(1, self.spec.embedding_size))
        self.defense.check_module(module)
        if self.defense.per_photo and self.schedule.precision != "float32":
            raise UsageError(
                f"{self.defense.name} needs federation.precision = float32: it clips the gradient of each photo"
            )
        robust = self.schedule.robust
        robust.require(len(self.participants(1)))
        if robust.rule != "mean" and (self.defense.of_mean or self.algorithm.alone):
            who = (
                f"defense {self.defense.name}"
                if self.defense.of_mean
                else f"{self.algorithm.name}, which has one party,"
            )
            raise UsageError(f"federation.aggregation = {robust.rule}: {who} goes with the mean alone")
        self.defense = self.defense.prepared([self.plan(p) for p in self.parties])

    def _fresh(self) -> nn.Module:
        return build_backbone(self.spec, self.seed).to(self.device)

    def require_memory(self) -> None:
        """Raises UsageError where the gradients of single photos, if a defense forms them, certainly do not fit into memory."""
        if not self.defense.forms_photo_gradients(self.backbone):
            return
        need, photos, client = max(self._photo_gradients(p) for p in self.parties)
        there = available(str(self.device))
        if there is not None and need > there:
            raise UsageError(
                f"{self.defense.name} would hold a gradient for each of up to {photos} photos of client {client} at once: at "
                f"least {shown(need)} of memory, and {shown(there)} are available. Take a smaller federation.batch_size (now "
                f"{self.schedule.batch_size}), or defense.mode = bookkeeping, which forms no such gradients"
            )

    def _photo_gradients(self, party: Party) -> tuple[int, int, int]:
        """(bytes, photos, client) of the gradients of single photos of a client's largest batch: of every parameter, its
        class embeddings included, and of the largest tensor a second time, beside its copy while it is kept. A lower bound,
        so that nothing that fits is refused: measured peaks are 1.1 to 1.8 times as much, and more where activations weigh
        more than gradients."""
        photos = self.defense.largest_batch(self.plan(party))
        sizes = [p.numel() for p in self.backbone.parameters() if p.requires_grad]
        sizes.append(len(self.visible_rows(party)) * self.spec.embedding_size)
        return 4 * photos * (sum(sizes) + max(sizes)), photos, party.client

    @property
    def classes(self) -> int:
        return len(self.owners)

    @property
    def scheme(self) -> Scheme:
        a = self.algorithm
        return Scheme(a.name, a.head, a.alone is None, a.corrects, len(self.participants(1)))

    def plan(self, party: Party) -> ClientPlan:
        n, batch = len(party.photos), min(self.schedule.batch_size, len(party.photos))
        per_round = self.schedule.local_epochs * math.ceil(n / batch)
        steps, rounds = per_round * self.schedule.rounds, self.schedule.rounds
        return ClientPlan(party.client, n, batch, steps, party.labels.cpu(), rounds)

    def charges(self, round: int) -> tuple[Charge, ...]:
        """What a round costs in which everybody who is asked answers."""
        return tuple(c for p in self.participants(round) if (c := self._cost(p, round)) is not None)

    def _cost(self, party: Party, round: int) -> Charge | None:
        plan = self.plan(party)
        drawn = epoch_batches(plan.images, plan.batch_size, self.schedule.local_epochs, generator(0, "steps"))
        return self.defense.charge(plan, round, sum(1 for _ in drawn))

    def participants(self, round: int) -> list[Party]:
        count = max(1, round_half_up(self.schedule.participation * len(self.parties)))
        order = torch.randperm(len(self.parties), generator=generator(self.seed, "participants", round))
        return [self.parties[i] for i in sorted(order[:count].tolist())]

    def answer(self, party: Party, order: Order, home: Home) -> Upload:
        """What ``party`` makes of an order, in a round on all its photos or in a recorded step on them."""
        pack = Packing(self.algorithm, self.defense, self.noise_key, self.constant)
        return pack(party, self._trained(party, order, home), order, home)

    def visible_rows(self, party: Party) -> tuple[int, ...]:
        return tuple(range(self.classes)) if self.algorithm.softmax_over_all else party.classes

    def _trained(self, party: Party, order: Order, home: Home) -> LocalResult:
        rows, recorded = self.visible_rows(party), order.recorded
        start = home.probes.own if home.probes else order.rows if home.rows is None else home.rows
        assert start is not None
        model = FaceModel(self.backbone, CosineHead(len(rows), self.spec.embedding_size).to(self.device))
        if self.defense.blinds:
            start = self.defense.unblinded(start, self._clients_secret())
        load_tensors(model, {**order.backbone, HEAD: start})
        model.train(not recorded)
        draw = lambda key, what: generator(key, what, *_stream(party, order))  # noqa: E731
        if recorded:
            n, steps = len(party.photos), order.constants.steps or 1
            plan = ClientPlan(party.client, n, n, steps, party.labels.cpu())
            batches, sampling = iter([torch.arange(n)] * steps), None
        else:
            plan = self.plan(party)
            batches = epoch_batches(
                plan.images, plan.batch_size, self.schedule.local_epochs, draw(self.seed, "batches")
            )
            per_photo = self.defense.per_photo
            sampling = draw(self.noise_key, "sampling") if per_photo else None  # amplification needs it secret
        result = train_locally(
            model, party.photos, party.labels.to(self.device) - rows[0], batches, order.constants, self.defense, plan,
            sampling=sampling, augmenting=draw(self.seed, "augment") if order.constants.augmented else None,
            noise=draw(self.noise_key, "noise") if self.defense.per_photo else None, team=None if recorded else self.team,
        )  # fmt: skip
        if not self.defense.blinds:
            return result
        blind = self.defense.blinded(result.delta[HEAD], self._clients_secret())
        return replace(result, delta={**result.delta, HEAD: blind})

    def _clients_secret(self) -> torch.Generator:
        return clients_secret(self.noise_key)


def _stream(party: Party, order: Order) -> tuple[int | str, ...]:
    """What names this client's randomness in this round or recorded step."""
    if not order.recorded:
        return order.where[1], party.client
    _, t, batch, number, *steps = order.where
    return t, party.client, "step", batch, number, *steps


def clients_secret(noise_key: int) -> torch.Generator:
    """The stream that all clients of a run share, and the server does not know."""
    return generator(noise_key, "clients-secret")


def round_half_up(x: float) -> int:
    return math.floor(x + 0.5)
