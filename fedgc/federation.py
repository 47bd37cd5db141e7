"""The round loop: clients train, the server aggregates, and what crossed the wire is recorded.

A round is a pure function of the state before it: every random choice has its own stream named by seed, round and
client, so that a resumed run needs no replay and recording does not disturb training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fedgc.algorithms import Algorithm, RunningMean, backbone_part, owner_tensor
from fedgc.doors import ClientPlan, Defense
from fedgc.heads import CosineHead, initial_rows
from fedgc.local import LocalResult, epoch_batches, load_tensors, train_locally
from fedgc.models import FaceModel, build_backbone, state_tensors
from fedgc.rng import generator
from fedgc.types import BACKBONE, HEAD, ClientUpdate, LocalConstants, ModelSpec, State, Tensors, Transcript, Truth


@dataclass(frozen=True)
class Schedule:
    """The numbers of a federation; lr is the peak, warmed up over the first rounds and then lowered along a cosine."""

    rounds: int
    local_epochs: int
    batch_size: int
    lr: float
    head_lr_factor: float
    momentum: float
    weight_decay: float
    clip_norm: float | None
    participation: float
    correction_weight: float
    correction_scale: float
    augment: bool
    warmup_rounds: int = 2

    def lr_at(self, round: int) -> float:
        """Learning rate of round 1..rounds."""
        warm = min(1.0, round / (self.warmup_rounds + 1))
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * (round - 1) / self.rounds))


@dataclass(frozen=True)
class Party:
    """One client: its photos (uint8), their classes, and the classes it owns. Classes run from 0 in order of clients."""

    client: int
    photos: Tensor
    labels: Tensor
    classes: tuple[int, ...]


@dataclass(frozen=True)
class RoundResult:
    state: State
    transcript: Transcript
    loss: float
    images: int


Where = tuple[int | str, ...]  # names a round or a recorded step among the random streams


@dataclass
class Federation:
    """Parties, scheme and defense, with one resident model that every client trains in turn. initial: `backbone.*` tensors to
    start from in place of random ones."""

    algorithm: Algorithm
    spec: ModelSpec
    schedule: Schedule
    parties: Sequence[Party]
    defense: Defense
    seed: int
    noise_key: int
    device: torch.device
    initial: Tensors | None = None

    def __post_init__(self) -> None:
        self.backbone = build_backbone(self.spec, self.seed).to(self.device)
        self.backbone.to(memory_format=torch.channels_last)  # the faster layout for convolutions on a CPU
        self.owners = tuple(p.client for p in self.parties for _ in p.classes)
        module = FaceModel(self.backbone, CosineHead(1, self.spec.embedding_size))
        self.defense.check_module(module)
        self.defense = self.defense.prepared([self.plan(p) for p in self.parties])

    @property
    def classes(self) -> int:
        return len(self.owners)

    def plan(self, party: Party) -> ClientPlan:
        n, batch = len(party.photos), min(self.schedule.batch_size, len(party.photos))
        per_round = self.schedule.local_epochs * math.ceil(n / batch)
        return ClientPlan(party.client, n, batch, per_round * self.schedule.rounds)

    def initial_state(self) -> State:
        rows = initial_rows(self.classes, self.spec.embedding_size, generator(self.seed, "rows"))
        fresh = build_backbone(self.spec, self.seed)  # the resident one holds whatever was trained last
        start = self.initial or {BACKBONE + name: tensor for name, tensor in state_tensors(fresh).items()}
        backbone = {name: tensor.to(self.device) for name, tensor in start.items()}
        return State(0, backbone, rows.to(self.device))

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
        )

    def participants(self, round: int) -> list[Party]:
        count = max(1, round_half_up(self.schedule.participation * len(self.parties)))
        order = torch.randperm(len(self.parties), generator=generator(self.seed, "participants", round))
        return [self.parties[i] for i in sorted(order[:count].tolist())]

    def play(self, state: State) -> RoundResult:
        """One round of training from ``state``."""
        t = state.round + 1
        constants = self.constants(t)
        rounds = [(party, self._train(party, state, t, constants)) for party in self.participants(t)]
        return self._finish(state, t, ("round", t), constants, rounds)

    def play_step(self, state: State, number: int, photos: Tensor, labels: Tensor) -> tuple[Transcript, Truth]:
        """A recorded single step at ``state``: client k on photos[k] (B, 3, S, S) with classes labels[k]. See `Transcript`."""
        t = state.round + 1
        constants = replace(self.constants(t), batch_size=photos.shape[1], steps=1, momentum=0.0, augmented=False)
        parties = [replace(p, photos=x, labels=y) for p, x, y in zip(self.parties, photos, labels, strict=True)]
        results = [(p, self._train(p, state, t, constants, step=number)) for p in parties]
        tag = ("step", t, photos.shape[1], number)
        transcript = self._finish(state, t, tag, constants, results).transcript
        return transcript, Truth(tuple(p.client for p in parties), photos.cpu().float() / 255, labels.cpu())

    def _visible_rows(self, party: Party) -> tuple[int, ...]:
        return tuple(range(self.classes)) if self.algorithm.softmax_over_all else party.classes

    def _train(
        self, party: Party, state: State, t: int, constants: LocalConstants, step: int | None = None
    ) -> LocalResult:
        rows = self._visible_rows(party)
        model = FaceModel(self.backbone, CosineHead(len(rows), self.spec.embedding_size).to(self.device))
        load_tensors(model, {**state.backbone, HEAD: state.rows[list(rows)]})
        model.train(step is None)
        labels = party.labels.to(self.device) - rows[0]
        where: tuple[int | str, ...] = (
            (t, party.client) if step is None else (t, party.client, "step", len(party.photos), step)
        )
        noise = generator(self.noise_key, "noise", *where)
        s, plan = self.schedule, self.plan(party)
        if step is None:
            batches = epoch_batches(
                plan.images, plan.batch_size, s.local_epochs, generator(self.seed, "batches", *where)
            )
            sampling = generator(self.noise_key, "sampling", *where)  # amplification needs it secret
        else:
            plan = ClientPlan(party.client, len(party.photos), len(party.photos), 1)
            batches, sampling = iter([torch.arange(len(party.photos))]), None
        augmenting = generator(self.seed, "augment", *where) if constants.augmented else None
        return train_locally(
            model, party.photos, labels, batches, constants, self.defense, plan,
            sampling=sampling, augmenting=augmenting, noise=noise,
        )  # fmt: skip

    def _finish(
        self, state: State, t: int, where: Where, constants: LocalConstants, results: list[tuple[Party, LocalResult]]
    ) -> RoundResult:
        """What leaves the clients, what the server makes of it, and the record of both."""
        updates = {party.client: self._sent(party, result, where) for party, result in results}
        delta, W = self._aggregated(state, results, updates, where)
        backbone = {name: tensor + delta[name] for name, tensor in state.backbone.items()}
        s, owner = self.schedule, owner_tensor(self.owners, W.device)
        W = self.algorithm.next_rows(W, owner, s.correction_weight, s.correction_scale, constants.lr)
        W, returned = self._returned(W, where)
        charges = [c for p, r in results if (c := self.defense.charge(self.plan(p), t, r.steps)) is not None]
        new = State(t, backbone, W, state.ledger + tuple(charges))
        examples = {k: u.num_examples for k, u in updates.items()}
        transcript = self._transcript(state, new, where, constants, updates, returned, examples)
        losses = [r.loss for _, r in results if not math.isnan(r.loss)]
        return RoundResult(new, transcript, sum(losses) / max(1, len(losses)), sum(r.images for _, r in results))

    def _sent(self, party: Party, result: LocalResult, where: Where) -> ClientUpdate:
        """What one client uploads: private class embeddings stay at home."""
        sent = backbone_part(result.delta) if self.algorithm.head == "private" else result.delta
        update = ClientUpdate(party.client, sent, len(party.photos))
        return self.defense.outgoing(update, generator(self.noise_key, "outgoing", *where, party.client))

    def _aggregated(
        self, state: State, results: list[tuple[Party, LocalResult]], updates: dict[int, ClientUpdate], where: Where
    ) -> tuple[Tensors, Tensor]:
        """The weighted mean update, and all class embeddings after it: averaged, stacked, or moved at home."""
        shared, stacked = self.algorithm.head == "shared", self.algorithm.head == "stacked"
        total = sum(u.num_examples for u in updates.values())
        W, mean = state.rows.clone(), RunningMean()
        for party, result in results:
            update = updates[party.client]
            mean.add(update.tensors if shared else backbone_part(update.tensors), update.num_examples / total)
            if not shared:
                W[list(party.classes)] += (update.tensors if stacked else result.delta)[HEAD]
        delta = self.defense.aggregated(mean.total, generator(self.noise_key, "aggregated", *where))
        return delta, W + delta[HEAD] if shared else W

    def _returned(self, W: Tensor, where: Where) -> tuple[Tensor, dict[int, Tensors]]:
        if self.algorithm.head != "stacked":
            return W, {}
        returned: dict[int, Tensors] = {}
        W = W.clone()
        for party in self.parties:
            rows = list(party.classes)
            noise = generator(self.noise_key, "returning", *where, party.client)
            W[rows] = self.defense.returning(party.client, W[rows], noise)
            returned[party.client] = {HEAD: W[rows]}
        return W, returned

    def _transcript(
        self, old: State, new: State, where: Where, constants: LocalConstants,
        updates: dict[int, ClientUpdate], returned: dict[int, Tensors], examples: dict[int, int],
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
            updates=updates,
            released={**new.backbone, **head_of(new)},
            returned=returned,
            rows={p.client: self._visible_rows(p) for p in self.parties} if shared or stacked else {},
            owners=self.owners,
            examples=examples,
        )


def round_half_up(x: float) -> int:
    return math.floor(x + 0.5)


def victims(parties: Sequence[Party], batch: int, count: int, seed: int) -> list[tuple[Tensor, Tensor]]:
    """The manifest of recorded steps: enough batches of every client to hold ``count`` photos, drawn by the seed.

    Returns photos uint8 (K, batch, 3, S, S) and labels (K, batch) for each recorded step. Independent of algorithm and
    defense, so that every cell of a comparison is attacked on the same photos.
    """
    usable = min(len(p.photos) for p in parties)
    steps = min(math.ceil(count / (len(parties) * batch)), usable // batch)
    picks = [
        torch.randperm(len(p.photos), generator=generator(seed, "victims", batch, p.client))[: steps * batch]
        for p in parties
    ]
    out = []
    for n in range(steps):
        index = [pick[n * batch : (n + 1) * batch] for pick in picks]
        photos = torch.stack([p.photos[i.to(p.photos.device)] for p, i in zip(parties, index, strict=True)])
        labels = torch.stack([p.labels[i.to(p.labels.device)] for p, i in zip(parties, index, strict=True)])
        out.append((photos, labels))
    return out


def manifest_hash(recorded: Sequence[tuple[Tensor, Tensor]]) -> str:
    """SHA-256 of the victims' photos and classes, printed beside every attack figure."""
    import hashlib

    digest = hashlib.sha256()
    for photos, labels in recorded:
        digest.update(photos.cpu().contiguous().numpy().tobytes())
        digest.update(labels.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
