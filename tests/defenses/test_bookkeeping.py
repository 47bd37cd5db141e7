"""The book-keeping way of dp-sgd: the same steps as Opacus's hooks, bounded, and a clear word where it cannot be had."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from defenses.bookkeeping import BookKeepingOptimizer
from defenses.dp_sgd import DPSGD
from fedgc import heads
from fedgc.doors import ClientPlan
from fedgc.errors import UsageError
from fedgc.heads import CosineHead
from fedgc.models import FaceModel, build_model
from fedgc.types import ModelSpec

SPEC = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
CLASSES, CLIP = 5, 0.3


def small_net(dtype: torch.dtype = torch.float32) -> FaceModel:
    """Of every kind of layer one, and quick."""
    torch.manual_seed(0)
    backbone = nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.GroupNorm(2, 8), nn.PReLU(8),
        nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False), nn.Conv2d(8, 16, 3, stride=2, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(16 * 16, 16),
    )  # fmt: skip
    model = FaceModel(backbone, CosineHead(CLASSES, 16))
    nn.init.normal_(model.head.weight)
    return model.to(dtype)


def clipped_sum(
    model: FaceModel, x: Tensor, labels: Tensor, mode: str, people: Tensor | None = None
) -> tuple[Tensor, int]:
    """Sum of clipped gradients, all parameters in one vector, and how many photos were dropped."""
    defense = DPSGD(noise_multiplier=1.0, max_grad_norm=CLIP, mode=mode, unit="image" if people is None else "identity")
    plan = ClientPlan(0, len(x), 4, 1, people=people)
    batches = iter([torch.arange(len(x))])
    with defense.local_training(
        model, torch.optim.SGD(model.parameters(), lr=1.0), batches, plan, None, torch.Generator()
    ) as s:
        for index in s.batches:
            s.optimizer.zero_grad()
            heads.loss(model(x[index]), labels[index], SPEC).backward()
            s.optimizer.clip_and_accumulate()
        return torch.cat([p.summed_grad.flatten() for p in model.parameters()]), s.optimizer.dropped


def batch(photos: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(seed)
    x = torch.rand(photos, 3, 16, 16, generator=drawn, dtype=dtype)
    return x, torch.randint(CLASSES, (photos,), generator=drawn)


@pytest.mark.parametrize("people", [None, torch.tensor([0, 1, 1, 2, 2, 2, 0])])
def test_it_agrees_with_hooks(people: Tensor | None) -> None:
    x, labels = batch(7, dtype=torch.float64)
    found, _ = clipped_sum(small_net(torch.float64), x, labels, "bookkeeping", people)
    expected, _ = clipped_sum(small_net(torch.float64), x, labels, "hooks", people)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("mode", ["bookkeeping", "hooks"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_a_photo_whose_gradient_is_not_finite_is_left_out_and_counted(bad: float, mode: str) -> None:
    x, labels = batch(4)
    expected, _ = clipped_sum(small_net(), x[[0, 1, 3]], labels[[0, 1, 3]], mode)
    x[2, 1, 5:9] = bad  # 1e30: finite itself, squared it is not
    found, dropped = clipped_sum(small_net(), x, labels, mode)
    assert bool(found.isfinite().all())
    if bad == 1e30:
        assert float((found - expected).norm()) <= CLIP * (1 + 1e-6)
    else:
        assert dropped == 1
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_one_photo_moves_the_sum_by_no_more_than_the_clipping_norm() -> None:
    """Random batches, among them enormous, constant, infinite and undefined photos (float32, as training runs)."""
    model = small_net()
    worst = moved_at_all = 0.0
    for trial in range(60):
        x, labels = batch(1 + trial % 5, seed=trial)
        x = x * 10.0 ** (trial % 7 - 3)
        if trial % 3 == 0:
            x[0] = (1.0, 1e4, 1e20, math.inf, math.nan)[trial // 3 % 5]
        whole, _ = clipped_sum(model, x, labels, "bookkeeping")
        rest = clipped_sum(model, x[1:], labels[1:], "bookkeeping")[0] if len(x) > 1 else torch.zeros_like(whole)
        moved = float((whole.double() - rest.double()).norm())
        assert math.isfinite(moved)
        worst, moved_at_all = max(worst, moved), max(moved_at_all, moved)
    assert worst <= CLIP * (1 + 1e-6)
    assert moved_at_all > 0.99 * CLIP


def test_no_gradient_of_a_parameter_is_formed_on_the_way_back() -> None:
    model = small_net()
    x, labels = batch(3)
    with DPSGD(noise_multiplier=1.0).local_training(
        model, torch.optim.SGD(model.parameters(), lr=1.0), iter(()), ClientPlan(0, 3, 3, 1), None, torch.Generator()
    ) as session:
        assert isinstance(session.optimizer, BookKeepingOptimizer)
        heads.loss(model(x), labels, SPEC).backward()
        assert all(p.grad is None and p.requires_grad for p in model.parameters())
        with torch.no_grad():  # a look in between is no part of a step
            model(x)
        session.optimizer.step()


class Unknown(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.slope = nn.Parameter(torch.ones(16))

    def forward(self, x: Tensor) -> Tensor:
        return self.slope * x


def test_a_layer_without_a_rule_falls_back_to_hooks_or_is_refused() -> None:
    model = small_net()
    model.backbone = nn.Sequential(model.backbone, nn.LayerNorm(16))
    x, labels = batch(3)
    by_default, _ = clipped_sum(model, x, labels, "auto")
    torch.testing.assert_close(by_default, clipped_sum(model, x, labels, "hooks")[0])
    with pytest.raises(UsageError, match=r"no rule for the layer backbone\.1 .*defense\.mode = hooks"):
        clipped_sum(model, x, labels, "bookkeeping")
    model.backbone[1] = Unknown()
    with pytest.raises(UsageError, match=r"no rule for the layer backbone\.1"):
        clipped_sum(model, x, labels, "bookkeeping")


def test_a_layer_used_twice_is_refused() -> None:
    model = small_net()
    shared = nn.PReLU(8)
    model.backbone[2] = nn.Sequential(shared, shared)
    x, labels = batch(2)
    with pytest.raises(UsageError, match=r"uses a layer \(PReLU\) twice"):
        clipped_sum(model, x, labels, "bookkeeping")


def test_the_default_network_needs_no_hooks() -> None:
    model = build_model(SPEC, CLASSES, 0)
    with DPSGD(noise_multiplier=1.0).local_training(
        model, torch.optim.SGD(model.parameters(), lr=1.0), iter(()), ClientPlan(0, 3, 3, 1), None, torch.Generator()
    ) as session:
        assert isinstance(session.optimizer, BookKeepingOptimizer)
