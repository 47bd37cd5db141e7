"""What the server gathers while the clients of one round report, and every door of the defense on its side of the wire."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
from torch import Tensor

from fedgc.acceptance import problem_with
from fedgc.algorithms import Algorithm, RunningMean
from fedgc.doors import ClientPlan, Defense
from fedgc.errors import WorkFailedError
from fedgc.rng import generator
from fedgc.robust import MEAN, Robust
from fedgc.schedule import Party
from fedgc.types import HEAD, Charge, ClientUpdate, State, Tensors
from fedgc.uploads import Home, Upload, Where


@dataclass
class Inbox:
    """Updates are added up as they arrive, in one accumulator. asked: photos of each client of this round; keep: whose messages
    are kept for the record; robust: the rule in place of the mean.

    examples: as asked, of those that answered; rows: (C, d) what the server holds of class embeddings, with those that have
    arrived; kept: as clients keep them at home, if other than those; updates, own: what is kept of messages (see `Transcript`).
    """

    algorithm: Algorithm
    defense: Defense
    noise_key: int
    where: Where
    asked: Mapping[int, int]
    before: State
    keep: Callable[[int], bool]
    robust: Robust = MEAN
    mean: RunningMean = field(default_factory=RunningMean)
    every: list[Tensors] = field(default_factory=list)  # of each client, where the rule needs all
    examples: dict[int, int] = field(default_factory=dict)
    updates: dict[int, ClientUpdate] = field(default_factory=dict)
    own: dict[int, Tensors] = field(default_factory=dict)
    charges: tuple[Charge, ...] = ()
    losses: list[float] = field(default_factory=list)
    drawn: dict[tuple[int, int], tuple[int, int]] = field(default_factory=dict)
    dropped: int = 0
    chosen: tuple[int, ...] = ()  # classes whose rows a probing client chose

    def __post_init__(self) -> None:
        self.rows = self.before.rows.clone()
        self.kept = {name: tensor.clone() for name, tensor in self.before.kept.items()}
        self.probes = self.before.probes

    def take(self, party: Party, upload: Upload, plan: ClientPlan) -> None:
        """What one client uploads. Private class embeddings, and those that a client keeps, are put into the state only where the
        client is of this process, or part of an experiment in several."""
        mine, home, sent = list(party.classes), upload.home, dict(upload.sent)
        if self.algorithm.head == "private" and home.rows is not None:
            self.rows[mine] = home.rows
        elif self.algorithm.head == "stacked":
            sent[HEAD] = self._stack(party, sent[HEAD], home)
        self._add(party.client, sent, upload.masked)
        self._charge(plan, upload.steps)
        self.losses += [] if math.isnan(upload.loss) else [upload.loss]
        self.drawn[int(self.where[1]), party.client] = (upload.steps, upload.images)
        self.dropped += upload.dropped

    @property
    def images(self) -> int:
        return sum(photos for _, photos in self.drawn.values())

    def problem_with(self, party: Party, upload: Upload, constant: frozenset[str]) -> str | None:
        """Why what a client sent cannot be its update of this round, or None. constant: names of tensors that no client sends."""
        if upload.client != party.client or party.client in self.examples:
            return f"it speaks for client {upload.client}" if upload.client != party.client else "it answered twice"
        shapes = {name: x.shape for name, x in self.before.backbone.items() if name not in constant}
        held = self.before.rows[list(party.classes)] if self.algorithm.head == "stacked" else None
        if self.algorithm.head != "private":
            shapes[HEAD] = self.before.rows.shape if held is None else held.shape
        masked = tuple(self.algorithm.averaged(shapes)) if self.defense.masks else ()
        found = problem_with(upload, shapes, held, masked=masked)
        return None if found is None else f"its answer was refused: {found}"

    def missed(self, plan: ClientPlan) -> None:
        """A client that was asked, and did not answer or is not believed. What it may have released is paid for."""
        self._charge(plan, plan.steps // plan.rounds)

    def _charge(self, plan: ClientPlan, steps: int) -> None:
        charge = self.defense.charge(plan, int(self.where[1]), steps)
        self.charges += (charge,) if charge is not None else ()

    def _stream(self, door: str, *more: int) -> torch.Generator:
        return generator(self.noise_key, door, *self.where, *more)

    def _stack(self, party: Party, change: Tensor, home: Home) -> Tensor:
        """Put what one client uploads as its class embeddings in their place, and return how far the server lets them move."""
        k, mine = party.client, list(party.classes)
        held = self.rows[mine]
        taken = self.defense.receiving(k, change, held)
        if home.probes is not None and self.where[0] == "round":
            came = home.probes if taken is change else replace(home.probes, sent=held + taken)
            self.probes, self.chosen = came.to_tensors(), party.classes
        elif home.rows is not None:
            self.kept[HEAD][mine] = home.rows
        self.rows[mine] += self.defense.aggregated({HEAD: taken}, 1.0, self._stream("stacked", k))[HEAD]
        return taken

    def _add(self, k: int, sent: Tensors, masked: Tensors) -> None:
        """What of an upload is averaged, added up, and the record of it: of a masked one only what is not."""
        averaged = self.algorithm.averaged(sent)
        clear = sent
        if self.defense.masks:
            self.mean.add(masked, 1)
            clear = {name: tensor for name, tensor in sent.items() if name not in averaged}
        elif self.robust.rule == "mean":
            self.mean.add(averaged, self.asked[k] / sum(self.asked.values()))
        else:
            self.every.append(averaged)
        self.examples[k] = self.asked[k]
        if self.keep(k):
            self.own |= {k: averaged} if self.defense.masks else {}
            self.updates |= {k: ClientUpdate(k, clear, self.asked[k])} if clear else {}

    @cached_property
    def total(self) -> Tensors:
        """The mean of what clients sent to be averaged, or what stands in its place. Raises WorkFailedError where there is none
        to be had."""
        absent = sorted(self.asked.keys() - self.examples.keys())
        if not self.examples or (absent and self.defense.masks):
            why = "masks only cancel where everybody answers" if self.examples else "nobody else was asked"
            raise WorkFailedError(
                f"round {self.where[1]} has no mean: client {', '.join(map(str, absent))} did not answer, and {why}. Rounds "
                "before it are on disk: go on with --resume"
            )
        if self.defense.masks:
            return self.defense.unmasked(self.mean.total)
        if self.every:
            weights = [n / sum(self.examples.values()) for n in self.examples.values()]
            return self.robust.aggregate(self.every, weights, int(self.where[1]))
        if not absent:
            return self.mean.total
        whole = sum(self.asked.values()) / sum(self.examples.values())
        return {name: whole * tensor for name, tensor in self.mean.total.items()}

    @property
    def complete(self) -> bool:
        """Whether all that went into the mean is kept for the record."""
        return not self.defense.masks and not self.every and len(self.updates) == len(self.examples)

    def aggregate(self) -> Tensors:
        """The mean as the defense lets it out."""
        total = self.total
        largest = max(self.examples.values()) / sum(self.examples.values())
        return self.defense.aggregated(total, largest, self._stream("aggregated"))

    def answered(self, W: Tensor) -> dict[str, Tensor]:
        """Class embeddings that clients keep at home, changed as the server, which now holds ``W``, changed those that they
        uploaded. A client that uploaded others keeps its own out of it."""
        if not self.kept:
            return {}
        answer = W - self.rows
        answer[list(self.chosen)] = 0
        return {name: tensor + answer for name, tensor in self.kept.items()}
