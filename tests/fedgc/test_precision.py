"""bfloat16 products in local training: nearly the same update, and nothing left behind on the network."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from defenses.dp_sgd import DPSGD
from fedgc.errors import UsageError
from fedgc.local import products_in_bfloat16
from fedgc.models import build_backbone


def test_updates_are_near_those_of_float32_and_not_equal(federation) -> None:
    full, half = (federation("fedgc", precision=p, lr=0.01) for p in ("float32", "bfloat16"))
    state = full.initial_state()
    a, b = (f.play(state).transcript.updates[0].tensors for f in (full, half))
    assert all(t.dtype == torch.float32 for t in b.values())
    for name in a:
        along = torch.cosine_similarity(a[name].flatten(), b[name].flatten(), dim=0)
        assert along > 0.97, name
    assert any(not torch.equal(a[name], b[name]) for name in a)


def test_the_network_is_as_before_afterwards(federation) -> None:
    backbone = build_backbone(federation().spec, 0)
    x = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    before = backbone(x)
    with products_in_bfloat16(backbone):
        inside = backbone(x)
    assert inside.dtype == torch.float32
    assert not torch.equal(inside, before)
    torch.testing.assert_close(inside, before, rtol=0.1, atol=0.05 * float(before.detach().abs().max()))
    assert torch.equal(backbone(x), before)
    assert "forward" not in vars(backbone)
    assert not any(m._forward_pre_hooks for m in backbone.modules())


def test_what_clips_single_photos_keeps_full_precision(federation) -> None:
    with pytest.raises(UsageError, match=r"dp-sgd needs federation\.precision = float32"):
        federation("fedgc", precision="bfloat16", defense=DPSGD(noise_multiplier=1.0, delta=1e-2))


def test_the_precision_is_a_public_constant(federation) -> None:
    fed = federation("fedgc", precision="bfloat16")
    assert fed.play(fed.initial_state()).transcript.constants == replace(fed.constants(1), precision="bfloat16")
