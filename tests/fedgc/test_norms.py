"""Normalisation layers against PyTorch's own, and the promise of `frozen`: no photo sees another."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from fedgc.backbones.norms import FrozenBatchNorm, set_norm
from fedgc.models import build_backbone, state_tensors
from fedgc.types import ModelSpec, Norm


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def trained(layer: nn.Module) -> nn.Module:
    """With statistics and an affine map that are not those of a new layer."""
    with torch.no_grad():
        for name, tensor in state_tensors(layer).items():
            tensor.copy_(drawn(*tensor.shape).abs() + 0.5 if "var" in name else drawn(*tensor.shape))
    return layer


@pytest.mark.parametrize(("kind", "shape"), [(nn.BatchNorm1d, (5, 6)), (nn.BatchNorm2d, (5, 6, 3, 4))])
@pytest.mark.parametrize("eps", [1e-5, 1e-3])
def test_a_frozen_layer_is_batch_norm_at_rest(kind: type[nn.Module], shape: tuple[int, ...], eps: float) -> None:
    batch = trained(kind(6, eps=eps).double()).eval()
    frozen = FrozenBatchNorm(6, eps).double().train()
    frozen.load_state_dict({k: v for k, v in batch.state_dict().items() if k != "num_batches_tracked"})
    x = drawn(*shape).requires_grad_()
    torch.testing.assert_close(frozen(x), batch(x), rtol=0, atol=0)
    by_hand = (x - frozen.running_mean.view(-1, *[1] * (x.dim() - 2))) / (
        frozen.running_var.view(-1, *[1] * (x.dim() - 2)) + eps
    ).sqrt()
    scale, shift = (t.view(-1, *[1] * (x.dim() - 2)) for t in (frozen.weight, frozen.bias))
    torch.testing.assert_close(frozen(x), by_hand * scale + shift, rtol=1e-12, atol=1e-12)
    assert torch.autograd.gradcheck(frozen, (x,))
    assert torch.autograd.gradgradcheck(frozen, (x,))


def test_a_frozen_layer_has_nothing_to_train_and_keeps_its_numbers() -> None:
    layer = trained(FrozenBatchNorm(4).double()).train()
    before = {name: tensor.clone() for name, tensor in state_tensors(layer).items()}
    layer(drawn(8, 4, 2, 2))
    assert list(layer.parameters()) == []
    assert set(before) == {"weight", "bias", "running_mean", "running_var"}
    assert all(torch.equal(before[name], tensor) for name, tensor in state_tensors(layer).items())


def net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Sequential(nn.BatchNorm2d(7)), nn.BatchNorm1d(5))


def test_groups_in_place_of_batches() -> None:
    changed = net()
    set_norm(changed, "group")
    groups = [(m.num_groups, m.num_channels) for m in changed.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [(4, 12), (1, 7), (1, 5)]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in changed.modules())


def test_flat_features_are_not_pinned_by_their_norm() -> None:
    """Eight groups of one feature each would make every embedding zero."""
    layer = nn.Sequential(nn.BatchNorm1d(8))
    set_norm(layer, "group")
    z = layer(drawn(4, 8).float())
    assert torch.linalg.matrix_rank(z.detach()) == 4
    assert float(z.detach().norm(dim=1).min()) > 1


@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_batch_and_frozen_share_their_names_and_shapes(norm: Norm) -> None:
    changed, original = net(), net()
    set_norm(changed, norm)
    assert {n: t.shape for n, t in state_tensors(changed).items()} == {
        n: t.shape for n, t in state_tensors(original).items()
    }


@pytest.mark.parametrize("name", ["small", "mobilefacenet"])
@pytest.mark.parametrize("norm", ["group", "batch", "frozen"])
def test_a_photo_sees_its_batch_under_batch_norm_only(name: str, norm: Norm) -> None:
    backbone = build_backbone(ModelSpec(name, norm, 16, 32, "none", 0.0, 1.0), 0).double().train()
    x = drawn(4, 3, 32, 32).sigmoid().requires_grad_()
    (influence,) = torch.autograd.grad(backbone(x)[0].square().sum(), x)
    assert bool(influence[0].any())
    assert bool(influence[1:].any()) is (norm == "batch")
