"""The rule of every layer, against autograd on one photo at a time in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from defenses.layer_gradients import FORMING, RULES, Units, products, unknown_layers
from fedgc.heads import CosineHead

PHOTOS = 5
PEOPLE = torch.tensor([3, 1, 3, 3, 1])  # two people, with three photos and two
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv, many places: formed": (lambda: nn.Conv2d(3, 4, 3, padding=1, bias=False), (3, 9, 8)),
    "conv, few places: products": (lambda: nn.Conv2d(24, 32, 3, padding=1), (24, 2, 2)),
    "conv with stride, unlike sides": (lambda: nn.Conv2d(3, 5, (1, 3), stride=(2, 1), padding=(0, 1)), (3, 6, 7)),
    "conv with dilation": (lambda: nn.Conv2d(2, 3, 3, padding=2, dilation=2), (2, 7, 7)),
    "conv of points": (lambda: nn.Conv2d(6, 4, 1), (6, 5, 5)),
    "conv of channels by themselves": (lambda: nn.Conv2d(6, 6, 3, stride=2, padding=1, groups=6), (6, 7, 7)),
    "conv of pairs of channels": (lambda: nn.Conv2d(4, 6, 3, groups=2), (4, 5, 5)),
    "linear": (lambda: nn.Linear(7, 4), (7,)),
    "linear on a sequence": (lambda: nn.Linear(7, 4, bias=False), (6, 7)),
    "group norm of maps": (lambda: nn.GroupNorm(2, 6), (6, 4, 4)),
    "group norm of features": (lambda: nn.GroupNorm(1, 6), (6,)),
    "prelu, one slope": (lambda: nn.PReLU(), (6, 3, 3)),
    "prelu, a slope a channel": (lambda: nn.PReLU(6), (6, 3, 3)),
    "cosine head": (lambda: CosineHead(4, 7), (7,)),
}


def made(name: str) -> tuple[nn.Module, Tensor, Tensor]:
    """The layer, its input and the gradient of its output."""
    make, shape = LAYERS[name]
    drawn = torch.Generator().manual_seed(0)
    layer = make().double()
    for p in layer.parameters():
        nn.init.normal_(p, generator=drawn)
    x = torch.randn(PHOTOS, *shape, generator=drawn, dtype=torch.float64)
    return layer, x, torch.randn(layer(x).shape, generator=drawn, dtype=torch.float64)


def alone(layer: nn.Module, x: Tensor, g: Tensor) -> list[dict[nn.Parameter, Tensor]]:
    """Each photo's gradient of every parameter."""
    own = list(layer.parameters())
    return [
        dict(zip(own, torch.autograd.grad((layer(x[i : i + 1]) * g[i : i + 1]).sum(), own), strict=True))
        for i in range(len(x))
    ]


@pytest.mark.parametrize("people", [None, PEOPLE], ids=["photos", "people"])
@pytest.mark.parametrize("name", LAYERS)
def test_lengths_and_scaled_sums_are_those_of_a_loop(name: str, people: Tensor | None) -> None:
    layer, x, g = made(name)
    single = alone(layer, x, g)
    groups = (
        [[i] for i in range(PHOTOS)] if people is None else [[1, 4], [0, 2, 3]]
    )  # in the order of the names 1 and 3
    means = [{p: torch.stack([single[i][p] for i in mine]).mean(dim=0) for p in layer.parameters()} for mine in groups]
    factors = torch.linspace(0.2, 1.0, len(groups), dtype=torch.float64)
    parts = RULES[type(layer)](layer, x, g, Units(PHOTOS, people))
    squares = sum(part.squares for part in parts)
    expected = torch.stack([sum((v.square().sum() for v in mean.values()), torch.zeros(())) for mean in means])
    torch.testing.assert_close(squares, expected, rtol=1e-12, atol=0)
    totals = dict(pair for part in parts for pair in part.total(factors))
    assert totals.keys() == set(layer.parameters())
    for p, total in totals.items():
        wanted = sum(f * mean[p] for f, mean in zip(factors, means, strict=True))
        torch.testing.assert_close(total, wanted, rtol=1e-11, atol=1e-12)


def test_both_ways_of_a_convolution_are_among_the_cases() -> None:
    """Else the choice between them were tested on one side only."""
    chosen = set()
    for name in ("conv, many places: formed", "conv, few places: products"):
        _, x, g = made(name)
        places, inputs, outputs = g[0, 0].numel(), 9 * x.shape[1], g.shape[1]
        chosen.add(places**2 * (inputs + outputs) < FORMING * inputs * outputs)
    assert chosen == {True, False}


def test_a_gradient_too_large_to_keep_is_formed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x, g = made("conv, many places: formed")
    (kept,) = RULES[nn.Conv2d](layer, x, g, Units(PHOTOS))
    monkeypatch.setattr("defenses.layer_gradients.KEPT", 0)
    (again,) = RULES[nn.Conv2d](layer, x, g, Units(PHOTOS))
    torch.testing.assert_close(kept.squares, again.squares, rtol=1e-12, atol=0)
    factors = torch.rand(PHOTOS, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    torch.testing.assert_close(kept.total(factors)[0][1], again.total(factors)[0][1], rtol=1e-12, atol=1e-12)


def test_lengths_do_not_come_out_short_where_places_cancel() -> None:
    """A flat picture: equal inputs at all places and gradients that add up to next to nothing. In float32 the inner products lose
    more than is left; a length taken too short would let a photo past the clipping norm."""
    drawn = torch.Generator().manual_seed(0)
    a = torch.rand(200, 30, 1, generator=drawn).expand(-1, -1, 16).contiguous()
    g = torch.randn(200, 8, 16, generator=drawn) * 100
    g = g - g.mean(dim=2, keepdim=True) * (1 - 1e-5)
    truth = (g.double() @ a.double().transpose(1, 2)).square().sum(dim=(1, 2))
    plain = ((a.transpose(1, 2) @ a) * (g.transpose(1, 2) @ g)).sum(dim=(1, 2))
    assert bool((plain.double() < truth).any())
    assert bool((products(a, g).double() >= truth).all())


def test_layers_without_a_rule_are_named() -> None:
    known = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.GroupNorm(2, 4), nn.PReLU())
    assert unknown_layers(known) == []
    other = nn.Sequential(known, nn.LayerNorm(4), nn.Conv2d(3, 4, 3, padding="same"), nn.ConvTranspose2d(3, 4, 3))
    assert unknown_layers(other) == ["1", "2", "3"]
    assert unknown_layers(nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect")) == [""]
