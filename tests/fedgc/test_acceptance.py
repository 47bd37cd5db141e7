"""The door in front of the aggregation, and the rule in place of the mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from defenses.secure_aggregation import SecureAggregation
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.robust import Robust
from fedgc.types import HEAD
from fedgc.uploads import Absence, Answers, Asked, Upload

Build = Callable[..., Federation]


def lying(fed: Federation, lies: dict[int, Callable[[Upload], Upload | Absence]]) -> None:
    """Clients of this process, some of which send something else."""

    def ask(orders: Asked) -> Answers:
        for party, order, home in orders:
            upload = fed.answer(party, order, home)
            yield party, lies[party.client](upload) if party.client in lies else upload

    fed.ask = ask


def with_tensor(name: str, change: Callable[[Tensor], Tensor]) -> Callable[[Upload], Upload]:
    return lambda u: replace(u, sent={**u.sent, name: change(u.sent[name])})


LIES: dict[str, tuple[Callable[[Upload], Upload], str]] = {
    "nan": (with_tensor(HEAD, lambda x: x * torch.nan), "not finite"),
    "inf": (with_tensor(HEAD, lambda x: x + torch.inf), "not finite"),
    "a row without length": (lambda u: replace(u, sent={**u.sent, HEAD: -ROWS[u.client]}), "row of no length"),
    "sparse": (with_tensor(HEAD, lambda x: x.to_sparse()), "sparse_coo"),
    "complex": (with_tensor(HEAD, lambda x: x.to(torch.complex64)), "complex64"),
    "half": (with_tensor(HEAD, lambda x: x.half()), "float16"),
    "fewer rows": (with_tensor(HEAD, lambda x: x[:-1]), "in place of"),
    "another client": (lambda u: replace(u, client=u.client + 1), "speaks for client"),
    "steps below zero": (lambda u: replace(u, steps=-1), "steps"),
    "an endless loss": (lambda u: replace(u, loss=float("inf")), "loss"),
}
ROWS: dict[int, Tensor] = {}


@pytest.mark.parametrize("lie", LIES)
def test_what_cannot_be_an_update_is_left_out(lie: str, federation: Build) -> None:
    fed, honest = federation("fedgc"), federation("fedgc")
    state = fed.initial_state()
    ROWS.update({p.client: state.rows[list(p.classes)] for p in fed.parties})
    spoil, why = LIES[lie]
    lying(fed, {1: spoil})
    result = fed.play(state)
    assert list(result.missing) == [1]
    assert why in result.missing[1]
    lying(honest, {1: lambda u: Absence("it never came")})
    other = honest.play(state)
    assert all(torch.equal(x, other.state.backbone[name]) for name, x in result.state.backbone.items())
    assert torch.equal(result.state.rows, other.state.rows)


def test_a_client_that_answers_twice_is_taken_once(federation: Build) -> None:
    fed = federation("fedgc")

    def ask(orders: Asked) -> Answers:
        for party, order, home in orders:
            upload = fed.answer(party, order, home)
            yield party, upload
            if party.client == 0:
                yield party, upload

    once = federation("fedgc").play(fed.initial_state())
    fed.ask = ask
    twice = fed.play(fed.initial_state())
    assert twice.missing == {0: "it answered twice"}
    assert all(torch.equal(x, once.state.backbone[name]) for name, x in twice.state.backbone.items())


@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc"])
def test_a_rule_in_place_of_the_mean(algorithm: str, federation: Build) -> None:
    fed = federation(algorithm, robust=Robust("median"))
    state = fed.initial_state()
    result = fed.play(state)
    sent = result.transcript.updates
    averaged = [name for name in sent[0].tensors if algorithm == "fedavg" or name != HEAD]
    for name in averaged:
        middle = torch.quantile(torch.stack([u.tensors[name] for u in sent.values()]).double(), 0.5, dim=0)
        moved = result.transcript.released[name] - result.transcript.broadcast[name]
        torch.testing.assert_close(moved.double(), middle, rtol=1e-4, atol=1e-6)
    assert result.transcript.summed  # the mean of the updates is not what was released
    with pytest.raises(UsageError, match="goes with the mean alone"):
        federation("fedgc", defense=SecureAggregation(), robust=Robust("median"))
