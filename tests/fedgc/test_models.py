"""Backbones: deterministic builds, sizes, normalisation layers, and the features that recognition is measured on."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fedgc.backbones.norms import set_norm
from fedgc.config import Model
from fedgc.errors import RunError, UsageError
from fedgc.models import BACKBONES, FaceModel, build_backbone, build_model, embed, load_backbone, state_tensors
from fedgc.pipeline.listing import listing
from fedgc.types import BACKBONE, HEAD, ModelSpec

SMALL = ModelSpec("small", "group", 16, 32, "cosface", 0.25, 30.0)
INCEPTION = replace(SMALL, backbone="inception-resnet-v1", embedding_size=512, image_size=80)


def photos(count: int, size: int = 32) -> torch.Tensor:
    drawn = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=drawn)


def norms(module: nn.Module, *kinds: type[nn.Module]) -> int:
    return sum(isinstance(m, kinds) for m in module.modules())


LIGHT = ("small", "mobilefacenet")
PLAIN = ("small", "mobilefacenet", "iresnet18", "iresnet50")


def named(name: str, **changes: object) -> ModelSpec:
    return replace(SMALL, backbone=name, **changes)


def parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", LIGHT)
def test_weights_are_a_function_of_spec_and_seed(name: str) -> None:
    builds = []
    for seed in (3, 3, 4):
        torch.manual_seed(len(builds))  # the global generator plays no part
        builds.append(state_tensors(build_backbone(named(name), seed)))
    first, again, other = builds
    assert all(torch.equal(first[n], again[n]) for n in first)
    convolution = next(n for n, t in first.items() if t.dim() == 4)
    assert not torch.equal(first[convolution], other[convolution])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_backbone_of_a_message_is_the_one_that_was_sent(dtype: torch.dtype) -> None:
    spec = replace(SMALL, norm="batch")
    sender = build_backbone(spec, seed=5).to(dtype)
    sender(photos(4).to(dtype) / 255)  # moves running statistics, and a counter that is not sent
    message = {f"{BACKBONE}{name}": tensor for name, tensor in state_tensors(sender).items()}
    held = load_backbone(spec, {**message, HEAD: torch.zeros(3, 16)})
    assert not held.training
    x = photos(2).to(dtype) / 255
    torch.testing.assert_close(held(x), sender.eval()(x), rtol=0, atol=0)
    with pytest.raises(RunError, match=r"embedding.weight is missing \(1 in all\)"):
        load_backbone(spec, {name: t for name, t in message.items() if not name.endswith("embedding.weight")})


@pytest.mark.parametrize(
    ("name", "side", "features", "millions", "within"),
    [
        ("mobilefacenet", 112, 128, 0.99, 0.015),  # published with each norm folded into its convolution
        ("iresnet18", 112, 512, 24.0, 0.002),
        ("iresnet50", 112, 512, 43.6, 0.001),
    ],
)
def test_parameters_as_published(name: str, side: int, features: int, millions: float, within: float) -> None:
    for norm in ("group", "batch"):
        with torch.device("meta"):
            backbone = BACKBONES[name].make(side, features)
        set_norm(backbone, norm)
        assert parameters(backbone) == pytest.approx(millions * 1e6, rel=within)


def test_mobilefacenet_has_the_published_size_to_a_percent_once_norms_are_folded() -> None:
    backbone = BACKBONES["mobilefacenet"].make(112, 128)
    scales = sum(m.weight.numel() for m in backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))
    assert (parameters(backbone) - scales) / 1e6 == pytest.approx(0.99, abs=0.005)


def test_what_the_listing_says_is_what_is_built() -> None:
    for row in listing("models"):
        chosen = BACKBONES[row["name"]]
        if row["name"] in PLAIN:
            with torch.device("meta"):
                assert parameters(chosen.make(chosen.side, chosen.features)) == row["parameters"]
        assert f">= {chosen.smallest} px" in row["takes"]


def test_the_configuration_knows_every_backbone() -> None:
    assert get_args(Model.model_fields["backbone"].annotation) == tuple(BACKBONES)


@pytest.mark.parametrize("name", PLAIN[1:])
@pytest.mark.parametrize("side", [32, 45, 112])
def test_every_side_gives_features(name: str, side: int) -> None:
    with torch.device("meta"):
        backbone = BACKBONES[name].make(side, 24)
        assert backbone(torch.rand(2, 3, side, side)).shape == (2, 24)


def test_maps_of_112_px_are_those_of_the_papers() -> None:
    assert tuple(BACKBONES["mobilefacenet"].make(112, 128).pool.weight.shape) == (512, 1, 7, 7)
    with torch.device("meta"):
        assert BACKBONES["iresnet50"].make(112, 512).embedding.in_features == 512 * 7 * 7


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_an_iresnet_makes_features_that_differ(norm: str) -> None:
    backbone = build_backbone(named("iresnet18", norm=norm), 0)
    z = backbone(photos(4).float() / 255)
    assert torch.isfinite(z).all()
    assert torch.linalg.matrix_rank(z.detach()) >= 3


@pytest.mark.parametrize("name", ["small", "mobilefacenet"])
def test_a_backbone_is_twice_differentiable_in_its_photos(name: str) -> None:
    """Gradient matching differentiates a gradient: along a direction, against a difference quotient."""
    backbone = build_backbone(named(name, norm="frozen" if name == "mobilefacenet" else "group"), 0).double()
    weights = list(backbone.parameters())
    x = photos(2).double() / 255

    def steepness(x: torch.Tensor, graph: bool = False) -> torch.Tensor:
        z = F.normalize(backbone(x), dim=1)
        slopes = torch.autograd.grad((z[0] - z[1]).square().sum(), weights, create_graph=graph)
        return torch.stack([s.square().sum() for s in slopes]).sum()

    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(steepness(leaf, graph=True), leaf)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    h = 1e-7
    quotient = (steepness(x + h * way) - steepness(x - h * way)) / (2 * h)
    torch.testing.assert_close((slope * way).sum(), quotient.detach(), rtol=1e-3, atol=0)


def test_untrained_networks_without_statistics_stay_finite() -> None:
    """`frozen` before anybody's training is the untrained baseline: fifty layers must neither vanish nor overflow."""
    backbone = build_backbone(named("iresnet50", norm="frozen"), 0)
    z = embed(backbone, photos(3))
    torch.testing.assert_close(z.norm(dim=1), torch.ones(3))
    assert float((z[0] - z[1]).norm()) > 1e-6


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
    assert parameters(backbone) == pytest.approx(0.45e6, rel=0.03)


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


@pytest.mark.parametrize("name", PLAIN)
def test_photos_that_are_too_small_are_refused_before_anything_is_built(name: str) -> None:
    with pytest.raises(UsageError, match=f"{name} makes features from photos of at least 32 px, not 16 from 31 px"):
        build_backbone(named(name, image_size=31), 0)


@pytest.mark.parametrize("wrong", [{"image_size": 64}, {"embedding_size": 128}, {"image_size": 74}])
def test_inception_refuses_sizes_and_says_which_settings_help(wrong: dict[str, int]) -> None:
    with pytest.raises(UsageError) as refusal:
        build_backbone(replace(INCEPTION, **wrong), 0)
    assert "--set model.embedding_size=512" in str(refusal.value)
    assert "--set data.image_size=112" in str(refusal.value)


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["group", "batch"])
def test_inception_forward(norm: str) -> None:
    torch.manual_seed(5)
    expected = torch.rand(2)
    torch.manual_seed(5)
    backbone = build_backbone(replace(INCEPTION, norm=norm), 0)
    assert torch.equal(torch.rand(2), expected)
    assert (norms(backbone, nn.modules.batchnorm._BatchNorm) > 0) is (norm == "batch")
    assert parameters(backbone) == BACKBONES["inception-resnet-v1"].parameters == pytest.approx(23.5e6, rel=0.001)
    x = torch.rand(2, 3, 80, 80)
    backbone.eval()
    with torch.no_grad():
        assert backbone(x).shape == (2, 512)
    backbone.train()
    with torch.no_grad():
        first, again = backbone(x), backbone(x)
    torch.testing.assert_close(first, again)  # no dropout, no hidden state in the forward pass
    assert FaceModel(backbone, nn.Identity())(x).shape == (2, 512)
