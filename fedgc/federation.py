"""The round loop: clients train, the server aggregates, and what crossed the wire is recorded.

A round is a pure function of the state before it: every random choice has its own stream named by seed, round and
client, so that a resumed run needs no replay and recording does not disturb training.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from fedgc.algorithms import Algorithm, owner_tensor
from fedgc.doors import ClientPlan, Defense, Scheme
from fedgc.errors import UsageError
from fedgc.heads import CosineHead, initial_rows
from fedgc.inbox import Inbox, Where
from fedgc.local import LocalResult, epoch_batches, load_tensors, train_locally
from fedgc.models import FaceModel, build_backbone, state_tensors, train_last_layer_only
from fedgc.probing import Probes, Probing, next_probes, require_answers
from fedgc.rng import generator, on_device
from fedgc.schedule import Party, Schedule
from fedgc.types import (
    BACKBONE,
    HEAD,
    LocalConstants,
    ModelSpec,
    State,
    Tensors,
    Transcript,
    Truth,
)


@dataclass(frozen=True)
class RoundResult:
    state: State
    transcript: Transcript
    loss: float
    images: int
    dropped: int = 0


@dataclass
class Federation:
    """Parties, scheme and defense, with one resident model that every client trains in turn. initial: `backbone.*` tensors to
    start from in place of random ones. probing: what one client does in place of the protocol, if any does. last_layer_only:
    whether clients train no more of the backbone than its last layer."""

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
        self.defense = self.defense.prepared([self.plan(p) for p in self.parties])

    def _fresh(self) -> nn.Module:
        return build_backbone(self.spec, self.seed).to(self.device)

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

    @cached_property
    def push_weight(self) -> float:
        """λ: as given, or as many pushes a round as a class embedding would get in centralised training."""
        if self.schedule.push.weight is not None:
            return self.schedule.push.weight
        steps = self.schedule.participation * sum(self.plan(p).steps for p in self.parties) / self.schedule.rounds
        return self.schedule.head_lr_factor * steps / self.classes

    def initial_state(self) -> State:
        rows = initial_rows(self.classes, self.spec.embedding_size, generator(self.seed, "rows"))
        start = self.initial or {BACKBONE + name: tensor for name, tensor in state_tensors(self._fresh()).items()}
        backbone = {name: tensor.to(self.device) for name, tensor in start.items()}
        rows = rows.to(self.device)
        return State(0, backbone, rows, kept={HEAD: rows.clone()} if self.defense.keeps_rows else {})

    def constants(self, round: int) -> LocalConstants:
        s = self.schedule
        return LocalConstants(
            self.spec,
            s.lr_at(round),
            s.head_lr_factor,
            s.momentum,
            s.weight_decay,
            s.clip_norm,
            s.batch_size,
            None,
            s.augment,
            self.defense.card(),
            1.0 if self.algorithm.alone else s.server_lr,
            s.precision,
        )

    def participants(self, round: int) -> list[Party]:
        count = max(1, round_half_up(self.schedule.participation * len(self.parties)))
        order = torch.randperm(len(self.parties), generator=generator(self.seed, "participants", round))
        return [self.parties[i] for i in sorted(order[:count].tolist())]

    def play(self, state: State, keep: Callable[[int], bool] = lambda client: True) -> RoundResult:
        """One round of training from ``state``. keep: whose updates stay in the transcript."""
        t = state.round + 1
        return self._play(state, ("round", t), self.constants(t), self.participants(t), keep)

    def play_step(
        self,
        state: State,
        number: int,
        photos: Tensor,
        labels: Tensor,
        keep: Callable[[int], bool] = lambda client: True,
        steps: int = 1,
    ) -> tuple[Transcript, Truth]:
        """A recorded step at ``state``: client k on photos[k] (B, 3, S, S) with classes labels[k]. See `Transcript`.

        steps: how many optimiser steps each client takes, all on the same photos, with momentum from the second on.
        """
        t = state.round + 1
        constants = replace(self.constants(t), batch_size=photos.shape[1], steps=steps, augmented=False)
        if steps == 1:
            constants = replace(constants, momentum=0.0)
        parties = [replace(p, photos=x, labels=y) for p, x, y in zip(self.parties, photos, labels, strict=True)]
        where: Where = ("step", t, photos.shape[1], number, *([] if steps == 1 else [steps]))
        transcript = self._play(state, where, constants, parties, keep).transcript
        return transcript, Truth(tuple(p.client for p in parties), photos.cpu().float() / 255, labels.cpu())

    def _play(
        self,
        state: State,
        where: Where,
        constants: LocalConstants,
        parties: Sequence[Party],
        keep: Callable[[int], bool],
    ) -> RoundResult:
        """Clients train, each update is added up as it arrives, and the server makes the next state of the sum."""
        examples = {p.client: len(p.photos) for p in parties}
        got = Inbox(self.algorithm, self.defense, self.noise_key, self.constant, where, examples, state, keep)
        probes = self._probes(state, where)
        for party in parties:
            mine = probes if self.probing and party.client == self.probing.client else None
            result = self._train(party, state, constants, where, mine)
            got.take(party, result, self.plan(party), mine)
        new, carried, returned = self._next(state, got, constants, where)
        transcript = self._transcript(state, new, where, constants, got, returned, carried)
        loss = sum(got.losses) / max(1, len(got.losses))
        return RoundResult(new, transcript, loss, got.images, got.dropped)

    def _kept(self, state: State) -> Tensor:
        """Class embeddings (C, d) that clients train from: their own where they keep such, else what the server holds."""
        return state.kept.get(HEAD, state.rows)

    def _visible_rows(self, party: Party) -> tuple[int, ...]:
        return tuple(range(self.classes)) if self.algorithm.softmax_over_all else party.classes

    def _probes(self, state: State, where: Where) -> Probes | None:
        """What the probing client has in mind in this round; None while nobody probes."""
        if self.probing is None or int(where[1]) < self.probing.first:
            return None
        before = Probes(**state.probes) if state.probes else None
        held = state.rows if before else self._kept(state)
        received = held[list(self.parties[self.probing.client].classes)]
        return next_probes(self.probing, int(where[1]), self.seed, received, before)

    def _train(
        self, party: Party, state: State, constants: LocalConstants, where: Where, probes: Probes | None = None
    ) -> LocalResult:
        """The client's half: what ``party`` makes of the state, in a round on all its photos or in a recorded step on them."""
        rows, recorded = self._visible_rows(party), where[0] == "step"
        model = FaceModel(self.backbone, CosineHead(len(rows), self.spec.embedding_size).to(self.device))
        start = self._kept(state)[list(rows)] if probes is None else probes.own
        load_tensors(model, {**state.backbone, HEAD: self.defense.unblinded(start, self._clients_secret())})
        model.train(not recorded)
        draw = lambda key, what: generator(key, what, *self._stream(party, where))  # noqa: E731
        if recorded:
            n, steps = len(party.photos), constants.steps or 1
            plan = ClientPlan(party.client, n, n, steps, party.labels.cpu())
            batches, sampling = iter([torch.arange(n)] * steps), None
        else:
            plan = self.plan(party)
            batches = epoch_batches(
                plan.images, plan.batch_size, self.schedule.local_epochs, draw(self.seed, "batches")
            )
            sampling = draw(self.noise_key, "sampling")  # amplification needs it secret
        result = train_locally(
            model, party.photos, party.labels.to(self.device) - rows[0], batches, constants, self.defense, plan,
            sampling=sampling, augmenting=draw(self.seed, "augment") if constants.augmented else None,
            noise=draw(self.noise_key, "noise"),
        )  # fmt: skip
        return replace(
            result, delta={**result.delta, HEAD: self.defense.blinded(result.delta[HEAD], self._clients_secret())}
        )

    def _clients_secret(self) -> torch.Generator:
        return clients_secret(self.noise_key)

    def _stream(self, party: Party, where: Where) -> Where:
        if where[0] == "round":
            return where[1], party.client
        _, t, batch, number, *steps = where
        return t, party.client, "step", batch, number, *steps

    def _next(
        self, state: State, got: Inbox, constants: LocalConstants, where: Where
    ) -> tuple[State, Tensors, dict[int, Tensors]]:
        """The server's half: the next state, the momentum that went into it, and the class embeddings it returns."""
        decay, rate, W = self.schedule.server_momentum, constants.server_lr, got.rows
        if self.algorithm.alone:  # there is no server
            decay = 0.0
        delta = got.aggregate()
        carried = {name: decay * tensor for name, tensor in state.momentum.items()}
        momentum = {name: tensor + carried[name] if carried else tensor for name, tensor in delta.items()}
        backbone = {
            name: tensor + rate * momentum[name] if name in momentum else tensor.clone()
            for name, tensor in state.backbone.items()
        }
        if self.algorithm.head == "shared":
            W = W + rate * momentum[HEAD]
        owner, draw = owner_tensor(self.owners, W.device), generator(self.seed, "negatives", *where)
        step = self.push_weight * constants.lr
        W = self.algorithm.next_rows(W, owner, self.schedule.push, step, on_device(draw, W.device))
        W, returned = self._returned(W, got.rows, where)
        charges, kept = state.ledger + got.charges, got.answered(W)
        new = State(state.round + 1, backbone, W, charges, momentum if decay else {}, got.probes, kept)
        return new, carried, returned

    def _returned(self, W: Tensor, uploaded: Tensor, where: Where) -> tuple[Tensor, dict[int, Tensors]]:
        if self.algorithm.head != "stacked":
            return W, {}
        returned: dict[int, Tensors] = {}
        W = W.clone()
        for party in self.parties:
            rows = list(party.classes)
            noise = generator(self.noise_key, "returning", *where, party.client)
            W[rows] = self.defense.returning(party.client, W[rows], uploaded[rows], noise)
            returned[party.client] = {HEAD: W[rows]}
        return W, returned

    def _transcript(
        self, old: State, new: State, where: Where, constants: LocalConstants,
        got: Inbox, returned: dict[int, Tensors], carried: Tensors,
    ) -> Transcript:  # fmt: skip
        shared, stacked = self.algorithm.head == "shared", self.algorithm.head == "stacked"
        head_of = lambda s: {HEAD: s.rows} if shared else {}  # noqa: E731
        own = {p.client: {HEAD: old.rows[list(p.classes)]} for p in self.parties} if stacked else {}
        return Transcript(
            algorithm=self.algorithm.name,
            round=new.round,
            kind="round" if where[0] == "round" else "step",
            constants=constants,
            broadcast={**old.backbone, **head_of(old)},
            sent=own,
            updates=got.updates,
            released={**new.backbone, **head_of(new)},
            returned=returned,
            rows={p.client: self._visible_rows(p) for p in self.parties} if shared or stacked else {},
            owners=self.owners,
            examples=got.examples,
            carried=carried,
            prober=self.probing.client if self.probing and new.probes and where[0] == "round" else None,
            masked=self.defense.masks,
            summed={} if self.algorithm.alone or got.complete else got.total,
            own=got.own,
        )


def clients_secret(noise_key: int) -> torch.Generator:
    """The stream that all clients of a run share, and the server does not know."""
    return generator(noise_key, "clients-secret")


def round_half_up(x: float) -> int:
    return math.floor(x + 0.5)
