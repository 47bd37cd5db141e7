"""Photos or people: what is sampled, clipped, dropped and accounted for."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from defenses.accounting import epsilon_of, pld_epsilon, profile
from defenses.dp_sgd import DPSGD, photos_of_people, poisson_units
from eval.privacy import rero_from_profile
from fedgc import heads
from fedgc.doors import ClientPlan, LocalSession
from fedgc.errors import UsageError
from fedgc.local import train_locally
from fedgc.models import FaceModel, build_model
from fedgc.types import Charge, LocalConstants, ModelSpec

SPEC = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
PEOPLE = torch.tensor([0, 1, 1, 2, 2, 2])
SILENT = 1e-15  # noise multiplier
both_modes = pytest.mark.parametrize("mode", ["bookkeeping", "hooks"])


def drawn(name: int) -> torch.Generator:
    return torch.Generator().manual_seed(name)


def face_model() -> FaceModel:
    model = build_model(SPEC, 3, seed=0)
    nn.init.normal_(model.head.weight, generator=drawn(1))
    return model.double()


@contextmanager
def opened(
    model: FaceModel, defense: DPSGD, plan: ClientPlan, sampling: torch.Generator | None
) -> Iterator[LocalSession]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    batches = iter([torch.arange(plan.images)])
    with defense.local_training(model, optimizer, batches, plan, sampling, drawn(3)) as session:
        yield session


def one_step(model: FaceModel, defense: DPSGD, x: torch.Tensor) -> tuple[dict[str, torch.Tensor], int]:
    """Minus the change of every parameter by one step on all photos, and how many gradients were dropped."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with opened(model, defense, ClientPlan(0, len(x), len(x), 1, people=PEOPLE), None) as session:
        for index in session.batches:
            session.optimizer.zero_grad()
            heads.loss(model(x[index]), PEOPLE[index], SPEC).backward()
            session.optimizer.step()
        dropped = session.optimizer.dropped
    return {n: before[n] - p.detach() for n, p in model.named_parameters()}, dropped


def gradient_of(model: FaceModel, x: torch.Tensor, label: torch.Tensor) -> list[torch.Tensor]:
    loss = heads.loss(model(x[None]), label[None], SPEC)
    return list(torch.autograd.grad(loss, list(model.parameters())))


def expected(x: torch.Tensor, clip: float, left_out: tuple[int, ...] = ()) -> dict[str, torch.Tensor]:
    """A loop in float64: the mean gradient of each person, clipped, summed, over the number of people."""
    model = face_model().train()
    total = [torch.zeros_like(p) for p in model.parameters()]
    for person in range(3):
        mine = [i for i in range(len(x)) if PEOPLE[i] == person]
        each = [[torch.zeros_like(p) for p in model.parameters()] if i in left_out else gradient_of(model, x[i], PEOPLE[i])
                for i in mine]  # fmt: skip
        mean = [torch.stack(parts).mean(dim=0) for parts in zip(*each, strict=True)]
        length = math.sqrt(sum(float(g.square().sum()) for g in mean))
        for t, g in zip(total, mean, strict=True):
            t += g * min(1.0, clip / (length + 1e-6))
    return {n: t / 3 for (n, _), t in zip(model.named_parameters(), total, strict=True)}


def photos() -> torch.Tensor:
    return torch.rand(6, 3, 32, 32, generator=drawn(2), dtype=torch.float64)


@both_modes
@pytest.mark.parametrize("clip", [0.05, 100.0])
def test_the_mean_gradient_of_each_person_is_clipped(clip: float, mode: str) -> None:
    defense = DPSGD(noise_multiplier=SILENT, max_grad_norm=clip, unit="identity", mode=mode)
    found, dropped = one_step(face_model(), defense, photos())
    for name, gradient in expected(photos(), clip).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9)
    assert dropped == 0


@both_modes
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_is_dropped_before_clipping(bad: float, mode: str) -> None:
    x = photos()
    x[4, 0, 3, 3] = bad
    found, dropped = one_step(face_model(), DPSGD(noise_multiplier=SILENT, unit="identity", mode=mode), x)
    assert dropped == 1
    for name, gradient in expected(photos(), 1.0, left_out=(4,)).items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-5, atol=1e-9)


def test_a_photo_without_a_finite_loss_does_not_keep_a_client_from_sending() -> None:
    """A client that falls silent when one photo has no finite loss tells everybody that the photo is there."""
    x = (photos() * 255).float()
    x[4, 0, 3, 3] = math.nan
    constants = LocalConstants(SPEC, 0.1, 1.0, 0.0, 0.0, None, 6, None, False)
    found = train_locally(
        face_model().float(), x, PEOPLE, iter([torch.arange(6)]), constants, DPSGD(noise_multiplier=1.0),
        ClientPlan(0, 6, 6, 1, PEOPLE), sampling=None, augmenting=None, noise=drawn(3),
    )  # fmt: skip
    assert found.dropped == 1
    assert all(bool(delta.isfinite().all()) and float(delta.norm()) > 0 for delta in found.delta.values())


@both_modes
def test_one_person_moves_the_sum_by_no_more_than_the_clipping_norm(mode: str) -> None:
    """Sensitivity, however many photos the person has and whatever they show."""
    defense = DPSGD(noise_multiplier=SILENT, max_grad_norm=0.5, unit="identity", mode=mode)
    one, two = photos(), photos()
    two[3:] = torch.randn(3, 3, 32, 32, generator=drawn(9), dtype=torch.float64) * 1e3
    a, b = (one_step(face_model(), defense, x)[0] for x in (one, two))
    moved = math.sqrt(sum(float((a[n] - b[n]).square().sum()) for n in a)) * 3
    assert moved <= 2 * 0.5 * (1 + 1e-6)  # taken away and put in
    assert moved > 0.1


def test_people_join_a_batch_independently_with_few_photos_each() -> None:
    plan = ClientPlan(0, 60, 8, 1, people=torch.arange(60) // 6)
    defense = DPSGD(noise_multiplier=1.0, unit="identity", photos_per_person=4)
    assert defense.rate(plan) == 2 / 10
    assert defense.charge(plan, 1, 7) == Charge(0, 1, 1.0, 0.2, 7, 1)
    assert DPSGD(noise_multiplier=1.0).charge(plan, 1, 7) == Charge(0, 1, 1.0, 8 / 60, 7, 6)
    steps = 2000
    joined = torch.zeros(steps, 10)
    batches = photos_of_people(poisson_units(10, 0.2, steps, drawn(0)), plan, 4, drawn(1))
    seen = torch.zeros(60)
    for t, index in enumerate(batches):
        people, counts = plan.people[index].unique(return_counts=True)
        joined[t, people] = 1
        seen[index] += 1
        assert len(index) == 0 or counts.tolist() == [4] * len(people)
    assert float((joined.mean(dim=0) - 0.2).abs().max()) < 4 * math.sqrt(0.16 / steps)
    assert float(seen.min()) > 0.5 * float(seen.mean())  # every photo has its turn


def test_a_delta_that_promises_nothing_to_people_is_refused() -> None:
    plan = ClientPlan(0, 60, 8, 10, people=torch.arange(60) // 6)
    with pytest.raises(UsageError, match="a client with 10 people"):
        DPSGD(noise_multiplier=1.0, unit="identity", delta=0.2).prepared([plan])
    assert DPSGD(noise_multiplier=1.0, unit="identity", delta=0.05).prepared([plan]).noise_multiplier == 1.0


# -- accounting

pld = pytest.mark.skipif(pld_epsilon([(1.0, 0.5, 1)], 0.1) is None, reason="dp-accounting is not installed")


@pld
def test_the_anchor_by_both_libraries() -> None:
    history = [(1.0, 0.1, 200)]
    assert pld_epsilon(history, 2.5e-4) == pytest.approx(8.03, abs=0.01)
    assert epsilon_of(history, 2.5e-4) == pytest.approx(8.03, abs=0.03)


@pld
def test_the_profile_bounds_reconstruction_as_computed_elsewhere() -> None:
    """n = 400, batch 40, 20 epochs, δ = 2.5e-4: γ at 1 in 100 is 0.272 where ε is 8 (σ = 1.01), 0.102 at 4 (σ = 1.51)."""
    for sigma, gamma in ((1.01, 0.272), (1.51, 0.102)):
        pairs = profile([(sigma, 0.1, 200)], 2.5e-4)
        assert rero_from_profile(*zip(*pairs, strict=True), 0.01) == pytest.approx(gamma, rel=0.03)


@pld
def test_all_photos_of_a_person_cost_far_more_than_one() -> None:
    """Figures of dp-accounting's mixture of Gaussians at q = .05, σ = 1, T = 2000, δ = 1e-5."""
    history = [(1.0, 0.05, 2000)]
    assert pld_epsilon(history, 1e-5) == pytest.approx(16.5, abs=0.05)
    assert pld_epsilon(history, 1e-5, 5) == pytest.approx(161, rel=0.01)
    assert pld_epsilon([(1.0, 0.05, 1000), (1.0, 0.05, 1000)], 1e-5, 5) == pytest.approx(161, rel=0.01)


@pld
def test_the_statement_says_both_and_what_a_person_is_promised() -> None:
    ledger = [Charge(0, t, 1.0, 0.1, 10, 3) for t in range(1, 4)]
    by_photo = DPSGD(noise_multiplier=1.0, delta=1e-3).spent(ledger)
    assert by_photo["epsilon_pld"] == pytest.approx(by_photo["epsilon"], rel=0.02)
    assert by_photo["epsilon_identity"] > 2 * by_photo["epsilon"]
    assert by_photo["photos_of_a_person"] == 3
    by_person = DPSGD(noise_multiplier=1.0, delta=1e-3, unit="identity").spent(ledger)
    assert by_person["unit"] == "identity"
    assert "epsilon_identity" not in by_person
