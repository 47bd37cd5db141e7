"""The two plainer ways to spread class embeddings, in float64: autograd, finite differences, hand values, symmetries."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fedgc.correction import gradient
from fedgc.spreading import fedaws, fedaws_gradient, fedcos, fedcos_gradient

Function = Callable[[Tensor, Tensor], Tensor]
WAYS: dict[str, tuple[Function, Function]] = {
    "fedcos": (fedcos, fedcos_gradient),
    "fedcos squared": (lambda W, o: fedcos(W, o, squared=True), lambda W, o: fedcos_gradient(W, o, squared=True)),
    "fedaws": (lambda W, o: fedaws(W, o, 1.2), lambda W, o: fedaws_gradient(W, o, 1.2, block=4)),
}
OWNERS = {
    "unequal clients, one of a single row": [0] * 7 + [1] + [2] * 3,
    "one class a client": [0, 1, 2, 3, 4],
    "clients interleaved": [5, 0, 2, 5, 0, 2, 2, 5],
}


@pytest.fixture(params=WAYS.values(), ids=WAYS.keys())
def way(request: pytest.FixtureRequest) -> tuple[Function, Function]:
    return request.param


@pytest.fixture(params=OWNERS.values(), ids=OWNERS.keys())
def owner(request: pytest.FixtureRequest) -> Tensor:
    return torch.tensor(request.param)


def rows(count: int, d: int = 5, seed: int = 0) -> Tensor:
    """Float64 rows of unequal lengths."""
    W = torch.randn(count, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return W * torch.linspace(0.3, 3, count, dtype=torch.float64)[:, None]


def test_the_closed_form_is_the_gradient_of_the_reference(way, owner: Tensor) -> None:
    value, closed_form = way
    W = rows(len(owner)).requires_grad_()
    (expected,) = torch.autograd.grad(value(W, owner), W)
    torch.testing.assert_close(closed_form(W.detach(), owner), expected, rtol=1e-11, atol=1e-13)


def test_finite_differences(way, owner: Tensor) -> None:
    value, closed_form = way
    W, h = rows(len(owner), d=3), 1e-6
    found = closed_form(W, owner)
    for j in range(len(W)):
        for c in range(W.shape[1]):
            step = torch.zeros_like(W)
            step[j, c] = h
            slope = float(value(W + step, owner) - value(W - step, owner)) / (2 * h)
            assert float(found[j, c]) == pytest.approx(slope, rel=1e-6, abs=1e-6)


def test_the_references_are_the_formulas(owner: Tensor) -> None:
    W = rows(len(owner))
    E = F.normalize(W, dim=1)
    pairs = [(E[i], E[j]) for i in range(len(E)) for j in range(len(E)) if owner[i] != owner[j]]
    assert float(fedcos(W, owner)) == pytest.approx(sum(float(a @ b) for a, b in pairs), rel=1e-12)
    assert float(fedcos(W, owner, squared=True)) == pytest.approx(sum(float(a @ b) ** 2 for a, b in pairs), rel=1e-12)
    hinges = sum(max(0.0, 1.2 - float((a - b).norm())) ** 2 for a, b in pairs)
    assert float(fedaws(W, owner, 1.2)) == pytest.approx(hinges, rel=1e-12)


def test_two_people_by_hand() -> None:
    """e_1 = (1, 0), w_2 = 2 (cos φ, sin φ), both ordered pairs: the slope along φ is -2 sin φ, -4 cos φ sin φ, and
    -4 (ν - D) cos(φ/2) with D = 2 sin(φ/2)."""
    phi, margin = 0.7, 1.2
    W = torch.tensor([[1.0, 0.0], [2 * math.cos(phi), 2 * math.sin(phi)]], dtype=torch.float64)
    owner = torch.tensor([0, 1])
    along = torch.tensor([-math.sin(phi), math.cos(phi)], dtype=torch.float64)
    distance = 2 * math.sin(phi / 2)
    for found, slope in (
        (fedcos_gradient(W, owner), -2 * math.sin(phi)),
        (fedcos_gradient(W, owner, squared=True), -4 * math.cos(phi) * math.sin(phi)),
        (fedaws_gradient(W, owner, margin), -4 * (margin - distance) * math.cos(phi / 2)),
    ):
        expected = torch.stack([torch.tensor([0.0, -slope], dtype=torch.float64), slope / 2 * along])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_equivariant_to_order_and_rotation_and_tangent(way, owner: Tensor) -> None:
    _, closed_form = way
    W = rows(len(owner))
    G = closed_form(W, owner)
    order = torch.randperm(len(W), generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(closed_form(W[order], owner[order]), G[order], rtol=1e-11, atol=1e-13)
    R, _ = torch.linalg.qr(rows(5, seed=2))
    torch.testing.assert_close(closed_form(W @ R, owner), G @ R, rtol=1e-11, atol=1e-13)
    assert (G * W).sum(dim=1).abs().max() < 1e-13
    assert G.norm() > 0


def test_one_client_has_nothing_to_spread(way) -> None:
    value, closed_form = way
    W, owner = rows(6), torch.full((6,), 4)
    assert float(value(W, owner)) == 0
    assert not closed_form(W, owner).any()


@pytest.mark.parametrize("block", [1, 2, 3, 4, 6, 12, 13])
def test_blocks_of_any_size_make_the_same_gradient(block: int) -> None:
    W, owner = rows(12), torch.tensor([1] * 7 + [0] + [2] * 4)
    torch.testing.assert_close(
        fedaws_gradient(W, owner, 1.3, block=block), fedaws_gradient(W, owner, 1.3), rtol=1e-12, atol=1e-13
    )


def test_people_beyond_the_margin_are_left_alone() -> None:
    W, owner = torch.eye(4, dtype=torch.float64), torch.arange(4)
    assert not fedaws_gradient(W, owner, math.sqrt(2) - 1e-9).any()
    assert not fedaws_gradient(-W[:2] + W[2:], torch.arange(2), 0.5).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_coinciding_rows_do_not_break_the_others(way, dtype: torch.dtype) -> None:
    W, owner = rows(9).to(dtype), torch.arange(9) % 3
    W[4] = 2 * W[0]  # the same direction on another client
    W[5] = W[1] * (1 + 1e-7)
    found = way[1](W, owner)
    assert torch.isfinite(found).all()
    live = W.double().requires_grad_()
    (expected,) = torch.autograd.grad(way[0](live, owner), live)
    apart = torch.tensor([2, 3, 6, 7, 8])
    torch.testing.assert_close(found[apart].double(), expected[apart], rtol=1e-3, atol=1e-4)
    assert found.abs().max() < 1e3


def test_coinciding_rows_alone_stay_where_they_are() -> None:
    """No direction is better than another, and rounding must not choose one: |push| far below the margin."""
    W = rows(1, 512).float().repeat(2, 1)
    W /= W.norm(dim=1, keepdim=True)
    assert fedaws_gradient(W, torch.tensor([0, 1]), 0.9).norm() < 0.01


def test_fedaws_knows_who_collides_and_fedcos_does_not() -> None:
    """Against FedGC's push on people of whom a few have lookalikes elsewhere."""
    W = F.normalize(rows(60, 32), dim=1)
    W[30:36] = W[:6] + 0.1 * rows(6, 32, seed=5)
    owner = torch.arange(60) // 30
    push = gradient(W, owner, 16.0).flatten()
    near, uniform = (F.cosine_similarity(g.flatten(), push, dim=0) for g in (
        fedaws_gradient(W, owner, 0.9), fedcos_gradient(W, owner),
    ))  # fmt: skip
    assert near > 0.5
    assert near > uniform + 0.2
