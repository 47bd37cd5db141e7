"""Rules in place of the mean: against their definitions, and against liars."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedgc.errors import UsageError
from fedgc.rng import generator
from fedgc.robust import RULES, Robust

SHAPES = {"backbone.a": (3, 2), "backbone.b": (4,)}


def updates(n: int, seed: int = 0) -> list[dict[str, Tensor]]:
    """Honest clients: a common direction, and something of their own."""
    draw = generator(seed, "updates")
    common = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    return [
        {name: common[name] + 0.5 * torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        for _ in range(n)
    ]


def flat(update: dict[str, Tensor]) -> Tensor:
    return torch.cat([update[name].flatten() for name in SHAPES])


def aggregate(rule: str, many: list[dict[str, Tensor]], liars: int = 1, round: int = 1) -> Tensor:
    return flat(Robust(rule, liars).aggregate(many, [1 / len(many)] * len(many), round))


@pytest.mark.parametrize("n", [5, 6])
def test_definitions(n: int) -> None:
    many = updates(n)
    rows = torch.stack([flat(u) for u in many]).double()
    expected = {
        "mean": rows.mean(dim=0),
        "median": torch.quantile(rows, 0.5, dim=0),
        "trimmed-mean": torch.stack([torch.tensor(sorted(c)[1:-1]).mean() for c in rows.T.tolist()]),
        "norm-clipping": torch.stack([r * min(1.0, float(rows.norm(dim=1).median() / r.norm())) for r in rows]).mean(
            dim=0
        ),
    }
    for rule, value in expected.items():
        torch.testing.assert_close(aggregate(rule, many).double(), value.double(), rtol=1e-5, atol=1e-6)


def test_krum_by_its_definition() -> None:
    many, f = updates(7), 2
    rows = torch.stack([flat(u) for u in many]).double()
    scores = []
    for i in range(7):
        distances = sorted(float((rows[i] - rows[j]).square().sum()) for j in range(7) if j != i)
        scores.append(sum(distances[: 7 - f - 2]))
    chosen = sorted(range(7), key=scores.__getitem__)[: 7 - f]
    torch.testing.assert_close(
        aggregate("multi-krum", many, f).double(), rows[chosen].mean(dim=0), rtol=1e-5, atol=1e-6
    )


def test_sybils_count_once() -> None:
    """Four copies of one lie, a little different, against five honest clients: the mean is theirs to a good part, safl's is
    not."""
    honest = updates(5, seed=3)
    lie = {name: -10 * torch.ones(shape) for name, shape in SHAPES.items()}
    draw = generator(1, "sybils")
    sybils = [{n: x + 0.01 * torch.randn(x.shape, generator=draw) for n, x in lie.items()} for _ in range(4)]
    truth = torch.stack([flat(u) for u in honest]).mean(dim=0)
    off = {rule: float((aggregate(rule, honest + sybils, 1) - truth).norm()) for rule in ("mean", "safl")}
    assert off["safl"] < 0.25 * off["mean"]


@pytest.mark.parametrize("rule", sorted(set(RULES) - {"mean"}))
@pytest.mark.parametrize("scale", [-1.0, 10.0, 1e6])
def test_one_liar_of_seven_moves_little(rule: str, scale: float) -> None:
    honest = updates(6, seed=5)
    liar = {name: scale * 5 * x for name, x in honest[0].items()}
    truth = torch.stack([flat(u) for u in honest]).mean(dim=0)
    spread = torch.stack([flat(u) - truth for u in honest]).norm(dim=1).max()
    found = aggregate(rule, [*honest, liar])
    assert bool(found.isfinite().all())
    assert float((found - truth).norm()) < float(spread)
    if scale > 1:
        assert float((aggregate("mean", [*honest, liar]) - truth).norm()) > float(spread)


def test_types_and_shapes_are_kept() -> None:
    many = [{name: x.double() for name, x in u.items()} for u in updates(5)]
    for rule in RULES:
        found = Robust(rule).aggregate(many, [0.2] * 5, 1)
        assert {n: (x.shape, x.dtype) for n, x in found.items()} == {
            n: (torch.Size(s), torch.float64) for n, s in SHAPES.items()
        }


def test_too_few_to_outvote_is_refused() -> None:
    for rule, clients in (("median", 2), ("trimmed-mean", 4), ("multi-krum", 6), ("safl", 2)):
        with pytest.raises(UsageError, match=f"{rule} needs"):
            Robust(rule, liars=2).require(clients)
    Robust("multi-krum", liars=2).require(7)
