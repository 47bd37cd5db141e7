"""The round loop: clients train, the server aggregates, and what crossed the wire is recorded.

A round is a pure function of the state before it. Clients are of this process, in turn, unless `Federation.ask` reaches others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from torch import Tensor

from fedgc.algorithms import owner_tensor
from fedgc.client import Clients
from fedgc.doors import Drawn
from fedgc.errors import WorkFailedError
from fedgc.heads import initial_rows
from fedgc.inbox import Inbox
from fedgc.models import endless, state_tensors
from fedgc.probing import Probes, next_probes
from fedgc.rng import generator, on_device
from fedgc.schedule import Party
from fedgc.types import (
    BACKBONE,
    HEAD,
    LocalConstants,
    State,
    Tensors,
    Transcript,
    Truth,
)
from fedgc.uploads import Absence, Answers, Ask, Asked, Home, Order, Where


@dataclass(frozen=True)
class RoundResult:
    """missing: clients that the round went on without, and why; drawn: steps and photos of the others."""

    state: State
    transcript: Transcript
    loss: float
    images: int
    dropped: int = 0
    missing: Mapping[int, str] = field(default_factory=dict)
    drawn: Drawn = field(default_factory=dict)


@dataclass
class Federation(Clients):
    """The server's half, beside clients of this process. ask: how clients are reached in a round, None for an answer that never
    came; recorded steps are played here always, by who holds the photos."""

    ask: Ask | None = None

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
        asked = {p.client: len(p.photos) for p in parties}
        got = Inbox(self.algorithm, self.defense, self.noise_key, where, asked, state, keep, self.schedule.robust)
        probes = self._probes(state, where)
        orders = ((p, self._order(state, p, where, constants, asked), self._home(state, p, probes)) for p in parties)
        missing = {}
        for party, upload in (self.ask if self.ask and where[0] == "round" else self._in_turn)(orders):
            problem = upload.why if isinstance(upload, Absence) else got.problem_with(party, upload, self.constant)
            if problem is None:
                got.take(party, upload, self.plan(party))  # type: ignore[arg-type]
                continue
            missing[party.client] = problem
            if not isinstance(upload, Absence) or upload.asked:
                got.missed(self.plan(party))
        new, carried, returned = self._next(state, got, constants, where)
        require_finite(new)
        transcript = self._transcript(state, new, where, constants, got, returned, carried)
        loss = sum(got.losses) / max(1, len(got.losses))
        return RoundResult(new, transcript, loss, got.images, got.dropped, missing, got.drawn)

    def _in_turn(self, orders: Asked) -> Answers:
        for party, order, home in orders:
            yield party, self.answer(party, order, home)

    def _order(
        self, state: State, party: Party, where: Where, constants: LocalConstants, asked: dict[int, int]
    ) -> Order:
        private = self.algorithm.head == "private"
        rows = None if private else state.rows[list(self.visible_rows(party))]
        return Order(where, constants, state.backbone, rows, asked)

    def _home(self, state: State, party: Party, probes: Probes | None) -> Home:
        """What a client of this process would have kept."""
        mine = list(party.classes)
        if self.algorithm.head == "private":
            return Home(state.rows[mine])
        mind = probes if self.probing and party.client == self.probing.client else None
        return Home(state.kept[HEAD][mine] if state.kept else None, mind)

    def _kept(self, state: State) -> Tensor:
        """Class embeddings (C, d) that clients train from: their own where they keep such, else what the server holds."""
        return state.kept.get(HEAD, state.rows)

    def _probes(self, state: State, where: Where) -> Probes | None:
        """What the probing client has in mind in this round; None while nobody probes."""
        if self.probing is None or int(where[1]) < self.probing.first:
            return None
        before = Probes(**state.probes) if state.probes else None
        held = state.rows if before else self._kept(state)
        received = held[list(self.parties[self.probing.client].classes)]
        return next_probes(self.probing, int(where[1]), self.seed, received, before)

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
            rows={p.client: self.visible_rows(p) for p in self.parties} if shared or stacked else {},
            owners=self.owners,
            examples=got.examples,
            carried=carried,
            prober=self.probing.client if self.probing and new.probes and where[0] == "round" else None,
            masked=self.defense.masks,
            summed={} if self.algorithm.alone or got.complete else got.total,
            own=got.own,
        )


def require_finite(state: State) -> None:
    """Raise WorkFailedError, before anything of it is kept, where the server made a state that no round can start from. All that
    arrived was finite: what is not came of adding up, noise, momentum or the correction."""
    parts = {**state.backbone, HEAD: state.rows, **{f"momentum of {name}": x for name, x in state.momentum.items()}}
    if (name := endless(parts)) is not None:
        raise WorkFailedError(
            f"round {state.round} diverged: {name} is not finite after the server's step. Nothing of it was kept, and rounds "
            "before it are on disk: go on with --resume where this was an accident, else lower federation.server_lr"
        )
