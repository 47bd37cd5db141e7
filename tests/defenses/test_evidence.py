"""What was drawn against the law of Poisson sampling, and the ledger against what ran."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from defenses.dp_sgd import DPSGD, poisson_units
from defenses.evidence import CHANCE, _bernstein, _closeness, require_bounded, uncharged, unlike_poisson
from fedgc.doors import ClientPlan, Drawn
from fedgc.errors import WorkFailedError
from fedgc.types import Charge

ROUNDS, STEPS = 20, 8
PLANS = [ClientPlan(k, n, 8, ROUNDS * STEPS, torch.arange(n) // 4, ROUNDS) for k, n in enumerate((32, 60, 200))]
RATES = {plan.client: 8 / plan.images for plan in PLANS}
ONES = {plan.client: torch.ones(plan.images) for plan in PLANS}
Sampler = Callable[[ClientPlan, torch.Generator], int]


def drawn(photos: Sampler, seed: int) -> Drawn:
    draw = torch.Generator().manual_seed(seed)
    return {(t, plan.client): (STEPS, photos(plan, draw)) for t in range(1, ROUNDS + 1) for plan in PLANS}


def poisson(plan: ClientPlan, draw: torch.Generator) -> int:
    return sum(len(batch) for batch in poisson_units(plan.images, RATES[plan.client], STEPS, draw))


def shuffled(plan: ClientPlan, draw: torch.Generator) -> int:
    return STEPS * 8


def higher(plan: ClientPlan, draw: torch.Generator) -> int:
    return int((torch.rand(STEPS, plan.images, generator=draw) < 1.5 * RATES[plan.client]).sum())


def test_honest_runs_are_not_doubted() -> None:
    assert not any(unlike_poisson(PLANS, RATES, ONES, drawn(poisson, seed)) for seed in range(60))


@pytest.mark.parametrize(("photos", "says"), [(shuffled, "as a shuffle does"), (higher, "drew")])
def test_another_sampling_is_seen(photos: Sampler, says: str) -> None:
    for seed in range(10):
        why = unlike_poisson(PLANS, RATES, ONES, drawn(photos, seed))
        assert why is not None
        assert says in why


def test_people_are_counted_by_their_photos() -> None:
    defense = DPSGD(noise_multiplier=1.0, unit="identity", photos_per_person=2, delta=1e-3)
    plan = PLANS[1]
    sizes = defense._photos(plan)
    assert (len(sizes), sizes.unique().tolist()) == (15, [2])
    q = defense.rate(plan)
    mean = round(ROUNDS * STEPS * q * float(sizes.sum()))
    fair = {(1, plan.client): (ROUNDS * STEPS, mean)}
    assert unlike_poisson([plan], {plan.client: q}, {plan.client: sizes}, fair) is None
    unfair = {(1, plan.client): (ROUNDS * STEPS, 2 * mean)}
    assert unlike_poisson([plan], {plan.client: q}, {plan.client: sizes}, unfair) is not None


def test_a_full_batch_is_no_shuffle() -> None:
    """At rate 1 every count is the mean, as it must be."""
    plan = PLANS[0]
    full = {(t, 0): (STEPS, STEPS * plan.images) for t in range(1, ROUNDS + 1)}
    assert unlike_poisson([plan], {0: 1.0}, ONES, full) is None
    assert unlike_poisson([plan], {0: 1.0}, ONES, {(1, 0): (STEPS, STEPS * plan.images - 40)}) is not None


def test_nothing_drawn_is_nothing_to_doubt() -> None:
    assert unlike_poisson(PLANS, RATES, ONES, {}) is None


@pytest.mark.parametrize("rate", [0.05, 0.3, 0.9])
def test_the_bound_on_the_mean_holds(rate: float) -> None:
    """Bernstein's inequality at a chance that can be counted."""
    trials, chance, times = 400, 0.05, 4000
    sums = torch.distributions.Binomial(trials, torch.tensor(rate)).sample((times,))
    away = (sums - trials * rate).abs() > _bernstein(trials * rate * (1 - rate), 1.0, chance)
    assert float(away.double().mean()) <= chance


@pytest.mark.parametrize("rate", [0.02, 0.3])
def test_closeness_is_uniform_or_larger(rate: float) -> None:
    steps, units = 8, 30
    counts = torch.distributions.Binomial(steps * units, torch.tensor(rate)).sample((3000,)).long().tolist()
    found = torch.tensor([_closeness(count, steps, units, rate) for count in counts])
    for level in (0.05, 0.2, 0.5):
        assert float((found <= level).double().mean()) <= level + 0.03
    assert CHANCE < 1e-8


def test_every_release_is_charged_as_it_ran() -> None:
    due = lambda client, t, steps: Charge(client, t, 1.0, 0.5, steps)  # noqa: E731
    charge = lambda plan, t, steps: due(plan.client, t, steps)  # noqa: E731
    ledger = [due(0, 1, 3), due(1, 1, 3), due(0, 2, 3)]
    ran = {(1, 0): (3, 9), (1, 1): (3, 9), (2, 0): (3, 9)}
    assert uncharged(charge, PLANS, ledger, ran) is None
    assert uncharged(charge, PLANS, [*ledger, due(1, 2, 3)], ran) is None  # paid, and not released: too much is no lie
    assert "client 1 in round 1" in str(uncharged(charge, PLANS, [ledger[0], ledger[2]], ran))
    assert "4 steps of client 0 in round 2" in str(uncharged(charge, PLANS, ledger, {**ran, (2, 0): (4, 9)}))


@pytest.mark.parametrize("length", [1.01, float("nan"), float("inf")])
def test_what_is_too_long_never_leaves(length: float) -> None:
    require_bounded([torch.tensor([0.6]), torch.tensor([[0.8]])], 1.0, "it")
    with pytest.raises(WorkFailedError, match="clipping: it has length"):
        require_bounded([torch.tensor([length])], 1.0, "it")
