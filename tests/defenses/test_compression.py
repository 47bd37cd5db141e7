"""Pruning keeps the largest entries and quantization a few levels, in the mean the right ones."""

from __future__ import annotations

import math

import pytest
import torch

from defenses.pruning import Pruning, largest
from defenses.quantization import Quantization, quantized
from fedgc.types import HEAD, ClientUpdate


def stream(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update() -> ClientUpdate:
    draw = torch.randn(1000, generator=stream())
    return ClientUpdate(0, {"backbone.a": draw[:700].view(70, 10), HEAD: 3 * draw[700:].view(30, 10)}, 4)


@pytest.mark.parametrize("keep", [0.001, 0.1, 0.5, 0.9999])
def test_the_largest_entries_are_kept_over_all_tensors(keep: float) -> None:
    before, after = update().tensors, Pruning(keep=keep).outgoing(update(), stream()).tensors
    old, new = (torch.cat([t.flatten() for t in x.values()]) for x in (before, after))
    kept = new != 0
    assert int(kept.sum()) == math.ceil(keep * 1000)
    assert torch.equal(new[kept], old[kept])
    if not bool(kept.all()):
        assert float(old[kept].abs().min()) >= float(old[~kept].abs().max())
    assert {n: t.shape for n, t in after.items()} == {n: t.shape for n, t in before.items()}
    if keep == 0.1:  # class embeddings, which are larger here, are pruned by the same measure as the backbone
        assert int((after[HEAD] != 0).sum()) > 60


def test_ties_do_not_raise_the_number() -> None:
    tied = largest({"a": torch.ones(50), "b": -torch.ones(50)}, 0.25)
    assert sum(int((t != 0).sum()) for t in tied.values()) == 25


@pytest.mark.parametrize("bits", range(1, 9))
def test_rounding_is_unbiased_and_to_the_levels(bits: int) -> None:
    x = torch.tensor([-1.0, -0.61, -0.2, 0.0, 0.03, 0.5, 0.777, 1.25], dtype=torch.float64)
    repeats = 40_000
    draws = quantized(x.repeat(repeats, 1), bits, stream(bits))
    levels = torch.unique(draws)
    width = 2.5 if bits == 1 else 1.25 / (2 ** (bits - 1) - 1)
    assert len(levels) <= (2 if bits == 1 else 2**bits - 1)
    assert float((draws - x).abs().max()) <= width * (1 + 1e-9)
    assert float(levels.abs().max()) <= 1.25 * (1 + 1e-12)
    spacing = (levels - levels[0]) / width
    torch.testing.assert_close(spacing, spacing.round(), atol=1e-9, rtol=0)
    error = (draws.mean(dim=0) - x).abs()
    assert float(error.max()) <= 5 * width / 2 / repeats**0.5 + 1e-12
    if bits > 1:
        assert bool((draws[:, 3] == 0).all())  # nothing stays nothing


def test_one_bit_is_the_sign_by_chance_with_one_scale_a_tensor() -> None:
    sent = Quantization(bits=1).outgoing(update(), stream()).tensors
    for name, tensor in sent.items():
        assert len(tensor.abs().unique()) == 1
        assert float(tensor.abs().max()) == float(update().tensors[name].abs().max())


def test_zeros_stay_zeros_and_the_chance_comes_from_the_given_stream() -> None:
    assert float(quantized(torch.zeros(5), 4, stream()).abs().max()) == 0
    tiny = torch.full((5,), 1e-45)
    assert bool(quantized(tiny, 8, stream()).isfinite().all())
    a, b, c = (Quantization(bits=3).outgoing(update(), stream(s)).tensors[HEAD] for s in (0, 0, 1))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
