"""Clients side by side: the same results in the same order, whoever trains whom."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import nn

from defenses.dp_sgd import DPSGD
from fedgc.types import State
from fedgc.workers import Workers


def equal(a: State, b: State) -> bool:
    backbone = all(torch.equal(a.backbone[name], b.backbone[name]) for name in a.backbone)
    return backbone and torch.equal(a.rows, b.rows) and a.ledger == b.ledger


@pytest.mark.parametrize("defense", [None, DPSGD(noise_multiplier=1.0, delta=1e-2)], ids=["none", "dp-sgd"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedgc"])
def test_side_by_side_trains_what_one_after_another_trains(federation, algorithm: str, defense) -> None:
    """With one thread each, to the bit."""
    torch.set_num_threads(1)
    one, three = (federation(algorithm, defense=defense, workers=n, augment=True) for n in (1, 3))
    a, b = one.initial_state(), three.initial_state()
    for _ in range(2):
        first, second = one.play(a), three.play(b)
        a, b = first.state, second.state
        assert equal(a, b)
        assert (first.loss, first.images) == (second.loss, second.images)


def test_results_come_in_order_and_a_model_is_lent_to_one_at_a_time() -> None:
    models: list[nn.Module] = [nn.Identity(), nn.Identity()]
    lent: set[int] = set()
    together = threading.Barrier(2, timeout=30)

    def train(model: nn.Module, item: int) -> int:
        assert id(model) not in lent
        lent.add(id(model))
        if item < 2:
            together.wait()  # only passes where two are trained at once
        lent.remove(id(model))
        return item * item

    assert list(Workers(models).map(train, range(20))) == [n * n for n in range(20)]


def test_results_that_nobody_took_yet_are_few() -> None:
    done: list[int] = []
    stream = Workers([nn.Identity(), nn.Identity()]).map(lambda model, item: done.append(item), iter(range(1000)))
    next(stream)
    stream.close()
    assert len(done) < 10


def test_an_error_reaches_the_caller_and_threads_are_given_back() -> None:
    threads = torch.get_num_threads()

    def train(model: nn.Module, item: int) -> int:
        if item == 3:
            raise ValueError("three")
        return item

    with pytest.raises(ValueError, match="three"):
        list(Workers([nn.Identity(), nn.Identity()]).map(train, range(9)))
    assert torch.get_num_threads() == threads
