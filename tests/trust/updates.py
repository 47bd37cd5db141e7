"""25 kinds of update that a client should not send, each under three rules of aggregation (reliability S5)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from defenses.none import NoDefense
from fedgc.algorithms import ALGORITHMS, Push
from fedgc.data.synthetic import synthetic_faces
from fedgc.federation import Federation, RoundResult
from fedgc.robust import Robust
from fedgc.schedule import Party, Schedule
from fedgc.types import HEAD, ModelSpec, State
from fedgc.uploads import Absence, Answers, Asked, Upload

CLIENTS, PEOPLE, LIAR = 5, 2, 1
RULES = ("mean", "norm-clipping", "trimmed-mean")
REFUSED, BOUNDED = "refused", "bounded"
Lie = Callable[[Upload, State], list[Upload]]


def tensors(change: Callable[[Tensor], Tensor], name: str | None = None) -> Lie:
    """Of every tensor, or of one."""
    return lambda u, s: [replace(u, sent={n: change(x) if name in (None, n) else x for n, x in u.sent.items()})]


def one_coordinate(value: float) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[(0,) * x.ndim] = value
        return x

    return change


def some_name(u: Upload) -> str:
    return next(n for n in u.sent if n != HEAD)


def without(u: Upload, s: State) -> list[Upload]:
    return [replace(u, sent={n: x for n, x in u.sent.items() if n != some_name(u)})]


def flattened(u: Upload, s: State) -> list[Upload]:
    name = next(n for n, x in u.sent.items() if x.ndim > 1 and n != HEAD)
    return [replace(u, sent={**u.sent, name: u.sent[name].flatten()})]


KINDS: dict[str, tuple[Lie, str]] = {
    "NaN everywhere": (tensors(lambda x: x * torch.nan), REFUSED),
    "+inf everywhere": (tensors(lambda x: x + torch.inf), REFUSED),
    "-inf everywhere": (tensors(lambda x: x - torch.inf), REFUSED),
    "one NaN in one class embedding": (tensors(one_coordinate(torch.nan), HEAD), REFUSED),
    "one infinite number": (tensors(one_coordinate(torch.inf)), REFUSED),
    "another shape": (flattened, REFUSED),
    "a class embedding less": (tensors(lambda x: x[:-1], HEAD), REFUSED),
    "a class embedding more": (tensors(lambda x: torch.cat([x, x[:1]]), HEAD), REFUSED),
    "float64": (tensors(lambda x: x.double()), REFUSED),
    "float16": (tensors(lambda x: x.half()), REFUSED),
    "integers": (tensors(lambda x: x.to(torch.int64)), REFUSED),
    "complex numbers": (tensors(lambda x: x.to(torch.complex64)), REFUSED),
    "sparse tensors": (tensors(lambda x: x.to_sparse()), REFUSED),
    "a tensor missing": (without, REFUSED),
    "a tensor more": (lambda u, s: [replace(u, sent={**u.sent, "backdoor": torch.zeros(3)})], REFUSED),
    "nothing at all": (lambda u, s: [replace(u, sent={})], REFUSED),
    "in the name of another client": (lambda u, s: [replace(u, client=0)], REFUSED),
    "twice": (lambda u, s: [u, u], REFUSED),
    "a class embedding without length": (
        lambda u, s: [replace(u, sent={**u.sent, HEAD: -s.rows[LIAR * PEOPLE : (LIAR + 1) * PEOPLE]})], REFUSED,
    ),
    "photos below zero": (lambda u, s: [replace(u, images=-5)], REFUSED),
    "a million photos left out": (lambda u, s: [replace(u, dropped=10**6)], REFUSED),
    "an infinite loss": (lambda u, s: [replace(u, loss=float("inf"))], REFUSED),
    "ten times as long": (tensors(lambda x: 10 * x), BOUNDED),
    "a million times as long": (tensors(lambda x: 1e6 * x), BOUNDED),
    "the other way": (tensors(lambda x: -x), BOUNDED),
}  # fmt: skip


def federation(rule: str) -> Federation:
    faces, people = synthetic_faces(CLIENTS * PEOPLE, 4, 32, seed=1)
    parties = []
    for k in range(CLIENTS):
        classes = tuple(range(k * PEOPLE, (k + 1) * PEOPLE))
        index = torch.cat([torch.nonzero(people == c)[:, 0] for c in classes])
        parties.append(Party(k, faces[index], people[index], classes))
    schedule = Schedule(
        rounds=3, local_epochs=1, batch_size=4, lr=0.05, head_lr_factor=2.0, momentum=0.0, weight_decay=0.0, clip_norm=2.0,
        participation=1.0, push=Push(weight=1.0), augment=False, robust=Robust(rule),
    )  # fmt: skip
    spec = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
    return Federation(ALGORITHMS["fedgc"], spec, schedule, parties, NoDefense(), 0, 1, torch.device("cpu"))


def played(fed: Federation, lie: Lie | None, absent: bool = False) -> RoundResult:
    """One round in which a client lies, or does not answer."""
    state = fed.initial_state()

    def ask(orders: Asked) -> Answers:
        for party, order, home in orders:
            upload = fed.answer(party, order, home)
            if party.client != LIAR or (lie is None and not absent):
                yield party, upload
            elif lie is None:
                yield party, Absence("it is left out")
            else:
                for sent in lie(upload, state):
                    yield party, sent

    fed.ask = ask
    return fed.play(state)


@dataclass(frozen=True)
class Bad:
    kind: str
    rule: str

    def run(self) -> str | None:
        """None where it was refused and logged, or bounded, and the model is finite; else what is wrong."""
        lie, expected = KINDS[self.kind]
        fed = federation(self.rule)
        result = played(fed, lie)
        everything = [*result.state.backbone.values(), result.state.rows]
        if not all(bool(x.isfinite().all()) for x in everything):
            return "the model is no longer finite"
        if expected == REFUSED:
            return None if list(result.missing) == [LIAR] else f"not refused: {dict(result.missing)}"
        if result.missing:
            return f"refused: {dict(result.missing)}"
        return self._bounded(result) if self.rule != "mean" else None

    def _bounded(self, result: RoundResult) -> str | None:
        """Under a robust rule the model lies no further from that without the liar than honest updates lie apart."""
        without = played(federation(self.rule), None, absent=True).state.backbone
        off = _length({n: x - without[n] for n, x in result.state.backbone.items()})
        sent = [u.tensors for u in played(federation(self.rule), None).transcript.updates.values()]
        apart = max(_length({n: a[n] - b[n] for n in a if n != HEAD}) for a in sent for b in sent)
        return None if off <= apart else f"the model moved by {off:.3g}, and honest updates lie {apart:.3g} apart"


def _length(x: dict[str, Tensor]) -> float:
    return float(torch.stack([t.norm() for t in x.values()]).norm())


def cases() -> Iterator[Bad]:
    for rule in RULES:
        for kind in KINDS:
            yield Bad(kind, rule)
