"""Margins by hand, and the derivatives that gradient matching takes through them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from fedgc.heads import CosineHead, initial_rows, loss, margin_logits
from fedgc.types import ModelSpec


def spec(margin: str, size: float = 0.3, scale: float = 4.0) -> ModelSpec:
    return ModelSpec("small", "group", 8, 32, margin, size, scale)


COSINES = torch.tensor([[0.9, -0.2, 0.1], [0.5, 0.4, -1.0]], dtype=torch.float64)
LABELS = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("margin", "first", "second"),
    [
        ("none", 0.9, -1.0),
        ("cosface", 0.9 - 0.3, -1.0 - 0.3),
        ("arcface", math.cos(math.acos(0.9) + 0.3), -1.0 - 0.3 * math.sin(0.3)),  # the second beyond π - m
    ],
)
def test_logits_by_hand(margin: str, first: float, second: float) -> None:
    expected = 4.0 * torch.tensor([[first, -0.2, 0.1], [0.5, 0.4, second]], dtype=torch.float64)
    torch.testing.assert_close(margin_logits(COSINES, LABELS, spec(margin)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
def test_loss_is_mean_cross_entropy_by_hand(margin: str) -> None:
    logits = margin_logits(COSINES, LABELS, spec(margin))
    by_hand = sum(
        math.log(sum(math.exp(v) for v in row)) - row[y]
        for row, y in zip(logits.tolist(), LABELS.tolist(), strict=True)
    )
    assert float(loss(COSINES, LABELS, spec(margin))) == pytest.approx(by_hand / 2, rel=1e-12)


def target(cosine: torch.Tensor, size: float) -> torch.Tensor:
    """ArcFace's logit of the target as a function of its cosine, at scale 1."""
    labels = torch.zeros(len(cosine), dtype=torch.long)
    return margin_logits(cosine[:, None], labels, spec("arcface", size, 1.0))[:, 0]


@pytest.mark.parametrize("size", [0.0, 0.1, 0.3, 0.5, 1.0])
def test_arcface_adds_the_margin_to_the_angle(size: float) -> None:
    phi = torch.linspace(0.01, math.pi - size - 0.01, 500, dtype=torch.float64)
    torch.testing.assert_close(target(phi.cos(), size), (phi + size).cos(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [0.1, 0.3, 0.5, 1.0])
def test_arcface_rises_with_the_cosine_everywhere(size: float) -> None:
    c = torch.linspace(-1, 1, 20_001, dtype=torch.float64)
    assert target(c, size).diff().min() > 0
    assert (target(c, size) <= c).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("cosine", [-1.0, 1.0, 1 + 1e-6, -1 - 1e-6, math.cos(math.pi - 0.3), 0.0])
def test_arcface_has_two_finite_derivatives(cosine: float, dtype: torch.dtype) -> None:
    c = torch.tensor([[cosine, 0.2]], dtype=dtype, requires_grad=True)
    value = loss(c, torch.tensor([0]), spec("arcface"))
    (first,) = torch.autograd.grad(value, c, create_graph=True)
    (second,) = torch.autograd.grad(first.pow(2).sum(), c)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()
    assert float(first.detach()[0, 0]) < 0  # more likeness, less loss


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
def test_two_derivatives_of_the_loss_are_right_away_from_the_kinks(margin: str) -> None:
    """Through features and class embeddings: targets before and beyond π - m, none at it and none at ±1."""
    drawn = torch.Generator().manual_seed(3)
    z = torch.randn(3, 4, generator=drawn, dtype=torch.float64)
    W = torch.randn(3, 4, generator=drawn, dtype=torch.float64)
    W[2] = 0.2 * W[2] - z[2]  # almost opposite: beyond π - m
    labels = torch.arange(3)
    head = CosineHead(3, 4)

    def value(z: torch.Tensor, W: torch.Tensor) -> torch.Tensor:
        return loss(torch.func.functional_call(head, {"weight": W}, (z,)), labels, spec(margin))

    cosines = F.cosine_similarity(z, W)
    assert float(cosines[2]) < math.cos(math.pi - 0.3) < float(cosines[:2].min())
    assert float(cosines.abs().max()) < 0.9999
    inputs = (z.requires_grad_(), W.requires_grad_())
    assert torch.autograd.gradcheck(value, inputs)
    assert torch.autograd.gradgradcheck(value, inputs)


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_photo_that_is_its_class_has_two_finite_derivatives(margin: str, sign: float, dtype: torch.dtype) -> None:
    """cos = ±1 as it comes about: a feature along its class embedding."""
    head = CosineHead(3, 4).to(dtype)
    torch.nn.init.eye_(head.weight)
    z = (sign * 5 * torch.eye(3, 4, dtype=dtype)).requires_grad_()
    value = loss(head(z), torch.arange(3), spec(margin, 0.5, 30.0))
    slopes = torch.autograd.grad(value, [z, head.weight], create_graph=True)
    bends = torch.autograd.grad(sum((s * s).sum() + s.sum() for s in slopes), [z, head.weight])
    assert all(torch.isfinite(t).all() for t in (*slopes, *bends))


@pytest.mark.parametrize("size", [0.1, 0.5, 1.0])
def test_arcface_steps_down_where_its_continuation_begins(size: float) -> None:
    """By m·sin(m) - (1 - cos(m)), small beside the range; never up, so that likeness always pays."""
    edge = math.cos(math.pi - size)
    below, above = target(torch.tensor([edge - 1e-12, edge + 1e-12], dtype=torch.float64), size).tolist()
    step = above - below
    assert step == pytest.approx(size * math.sin(size) - (1 - math.cos(size)), abs=1e-9)
    assert step > 0


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
def test_a_margin_never_touches_the_other_classes(margin: str) -> None:
    logits = margin_logits(COSINES, LABELS, spec(margin))
    others = F.one_hot(LABELS, 3) == 0
    assert torch.equal(logits[others], 4.0 * COSINES[others])


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
def test_an_empty_batch_costs_nothing_and_moves_nothing(margin: str) -> None:
    head = CosineHead(3, 8)
    torch.nn.init.ones_(head.weight)
    z = torch.zeros(0, 8, requires_grad=True)
    value = loss(head(z), torch.zeros(0, dtype=torch.long), spec(margin))
    value.backward()
    assert float(value.detach()) == 0
    assert torch.equal(head.weight.grad, torch.zeros(3, 8))


def test_cosines_ignore_the_length_of_rows_and_features() -> None:
    drawn = torch.Generator().manual_seed(0)
    head = CosineHead(5, 8).double()
    W = torch.randn(5, 8, generator=drawn, dtype=torch.float64)
    z = torch.randn(4, 8, generator=drawn, dtype=torch.float64)
    with torch.no_grad():
        head.weight.copy_(W)
        plain = head(z)
        head.weight.copy_(W * torch.tensor([0.1, 1, 2, 30, 400])[:, None])
        torch.testing.assert_close(head(7 * z), plain, rtol=1e-12, atol=1e-14)
    expected = F.cosine_similarity(z[:, None], W[None], dim=2)
    torch.testing.assert_close(plain, expected, rtol=1e-12, atol=1e-14)


def test_initial_rows_have_unit_expected_length_and_depend_on_the_generator_alone() -> None:
    first, again, other = (initial_rows(400, 64, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert float(first.norm(dim=1).pow(2).mean()) == pytest.approx(1, abs=0.05)


# -- classes that a party does not hold


@pytest.mark.parametrize("margin", ["none", "cosface", "arcface"])
def test_strangers_stand_at_cosine_zero(margin: str) -> None:
    """As many more columns of cosine zero, before the scale, as there are classes of others."""
    wide = torch.cat([COSINES, torch.zeros(2, 4, dtype=torch.float64)], dim=1)
    counted = loss(COSINES, LABELS, replace(spec(margin), softmax_classes=7))
    torch.testing.assert_close(counted, loss(wide, LABELS, spec(margin)), rtol=1e-12, atol=0)
    assert counted > loss(COSINES, LABELS, spec(margin))


def test_who_holds_all_classes_counts_no_strangers() -> None:
    assert loss(COSINES, LABELS, replace(spec("cosface"), softmax_classes=3)) == loss(COSINES, LABELS, spec("cosface"))


def test_one_class_is_pulled_until_it_is_near() -> None:
    """s · max(0, 0.9 - cos)², the positive part of FedAwS: softmax over one class has no gradient."""
    cosines = torch.tensor([[0.95], [0.4]], dtype=torch.float64, requires_grad=True)
    pulled = loss(cosines, torch.zeros(2, dtype=torch.long), spec("cosface"))
    assert float(pulled.detach()) == pytest.approx(4.0 * 0.5**2 / 2, rel=1e-12)
    (g,) = torch.autograd.grad(pulled, cosines)
    torch.testing.assert_close(g, torch.tensor([[0.0], [-4.0 * 0.5]], dtype=torch.float64))
    counted = loss(cosines, torch.zeros(2, dtype=torch.long), replace(spec("none"), softmax_classes=4))
    by_hand = sum(math.log(1 + 3 * math.exp(-4.0 * c)) for c in (0.95, 0.4)) / 2
    assert float(counted.detach()) == pytest.approx(by_hand, rel=1e-12)
