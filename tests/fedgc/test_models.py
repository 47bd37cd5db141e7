"""Backbones: deterministic builds, sizes, normalisation layers, and the features that recognition is measured on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedgc.errors import UsageError
from fedgc.models import FaceModel, build_backbone, build_model, embed, replace_batch_norm, state_tensors
from fedgc.types import ModelSpec

SMALL = ModelSpec("small", "group", 16, 32, "cosface", 0.25, 30.0)
INCEPTION = replace(SMALL, backbone="inception-resnet-v1", embedding_size=512, image_size=80)


def photos(count: int, size: int = 32) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=drawn)


def norms(module: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(m, kinds) for m in module.modules())


def test_weights_are_a_function_of_spec_and_seed() -> None:
    first, again, other = (state_tensors(build_backbone(SMALL, seed)) for seed in (3, 3, 4))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["stem.weight"], other["stem.weight"])


def test_building_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    build_backbone(SMALL, 0)
    build_model(SMALL, 5, 0)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("size", [32, 33, 48, 64, 100])
@pytest.mark.parametrize("features", [8, 128])
def test_the_small_backbone_takes_every_size(size: int, features: int) -> None:
    backbone = build_backbone(replace(SMALL, image_size=size, embedding_size=features), 0)
    assert backbone(torch.rand(2, 3, size, size)).shape == (2, features)


def test_the_small_backbone_has_the_size_that_its_docstring_claims() -> None:
    backbone = build_backbone(replace(SMALL, image_size=48, embedding_size=128), 0)
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(0.45e6, rel=0.03)


def test_the_small_backbone_has_no_batch_norm_and_no_buffer() -> None:
    backbone = build_backbone(SMALL, 0)
    assert norms(backbone, nn.modules.batchnorm._BatchNorm) == 0
    assert norms(backbone, nn.GroupNorm) == 7
    assert list(backbone.buffers()) == []


def test_a_photo_does_not_see_its_batch() -> None:
    backbone = build_backbone(SMALL, 0).double().train()
    x = photos(5).double() / 255
    torch.testing.assert_close(backbone(x)[2:3], backbone(x[2:3]), rtol=1e-12, atol=1e-12)


def test_the_model_returns_cosines_with_its_rows() -> None:
    model = build_model(SMALL, 7, 0)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    x = photos(3).float() / 255
    expected = F.cosine_similarity(model.backbone(x)[:, None], model.head.weight[None], dim=2)
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


def test_tensors_of_a_model_carry_the_names_of_the_wire() -> None:
    names = set(state_tensors(build_model(SMALL, 2, 0)))
    assert "head.weight" in names
    assert all(name.startswith("backbone.") for name in names - {"head.weight"})


def test_embeddings_are_unit_means_of_photo_and_mirror_image() -> None:
    backbone = build_backbone(SMALL, 0)
    x = photos(5)
    z = embed(backbone, x)
    with torch.no_grad():
        both = [F.normalize(backbone(y.float() / 255), dim=1) for y in (x, x.flip(-1))]
    torch.testing.assert_close(z, F.normalize(both[0] + both[1], dim=1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z.norm(dim=1), torch.ones(5))
    torch.testing.assert_close(embed(backbone, x.flip(3)), z, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(embed(backbone, x, batch=2), z, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("training", [True, False])
def test_embedding_leaves_the_mode_as_it_was(training: bool) -> None:
    backbone = build_backbone(SMALL, 0).train(training)
    embed(backbone, photos(1))
    assert backbone.training is training


def test_nobody_embeds_to_no_rows() -> None:
    assert len(embed(build_backbone(SMALL, 0), photos(0))) == 0


def test_batch_norm_is_refused_for_the_small_backbone() -> None:
    with pytest.raises(UsageError, match=r"model\.norm = batch is not available.*'group'"):
        build_backbone(replace(SMALL, norm="batch"), 0)


@pytest.mark.parametrize("wrong", [{"image_size": 64}, {"embedding_size": 128}, {"image_size": 74}])
def test_inception_refuses_sizes_and_says_which_settings_help(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError) as refusal:
        build_backbone(replace(INCEPTION, **wrong), 0)
    assert "--set model.embedding_size=512" in str(refusal.value)
    assert "--set data.image_size=112" in str(refusal.value)


def test_replacing_batch_norm_leaves_none_and_keeps_widths() -> None:
    net = nn.Sequential(nn.Conv2d(3, 12, 3), nn.BatchNorm2d(12), nn.Sequential(nn.BatchNorm2d(7)), nn.BatchNorm1d(5))
    replace_batch_norm(net)
    assert norms(net, nn.modules.batchnorm._BatchNorm) == 0
    groups = [(m.num_groups, m.num_channels) for m in net.modules() if isinstance(m, nn.GroupNorm)]
    assert groups == [(4, 12), (1, 7), (1, 5)]


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_inception_forward(norm: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    backbone = build_backbone(replace(INCEPTION, norm=norm), 0)
    assert torch.equal(torch.rand(2), expected)
    assert (norms(backbone, nn.modules.batchnorm._BatchNorm) > 0) is (norm == "batch")
    assert sum(p.numel() for p in backbone.parameters()) == pytest.approx(23.5e6, rel=0.01)
    x = torch.rand(2, 3, 80, 80)
    backbone.eval()
    with torch.no_grad():
        assert backbone(x).shape == (2, 512)
    backbone.train()
    with torch.no_grad():
        first, again = backbone(x), backbone(x)
    torch.testing.assert_close(first, again)  # no dropout, no hidden state in the forward pass
    assert FaceModel(backbone, nn.Identity())(x).shape == (2, 512)
