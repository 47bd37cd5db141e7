"""What the last layers give away, against forward and backward passes of real backbones in float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attacks import backbone_algebra as algebra
from attacks.unmixing import unmix
from fedgc import heads
from fedgc.models import build_model
from fedgc.rng import generator
from fedgc.types import HEAD, LocalConstants, ModelSpec, ObservedUpdate

CLASSES = 12


class Step:
    """One step of a network on noise photos in float64, its gradient shortened to a fifth; and what happened inside."""

    def __init__(self, backbone: str, norm: str, labels: list[int], *, head: bool = True, stored: bool = False) -> None:
        size, d = {"inception-resnet-v1": (80, 512)}.get(backbone, (32, 32))
        spec = ModelSpec(backbone, norm, d, size, "cosface", 0.3, 16.0)  # type: ignore[arg-type]
        self.constants = LocalConstants(spec, 0.02, 4.0, 0.0, 1e-3, None, len(labels), 1, False)
        draw = generator("backbone algebra", backbone, norm)
        model = build_model(spec, CLASSES).double().eval()
        model.head.weight.data = heads.initial_rows(CLASSES, d, draw).double()
        for module in model.modules():  # as if trained: no norm is the identity
            if isinstance(getattr(module, "running_mean", None), Tensor):
                module.running_mean += 0.1 * torch.rand(module.running_mean.shape, generator=draw)
                module.running_var *= 0.8 + 0.4 * torch.rand(module.running_var.shape, generator=draw)
            if "Norm" in type(module).__name__:
                module.weight.data *= 0.8 + 0.4 * torch.rand(module.weight.shape, generator=draw)
                module.bias.data += 0.2 * torch.rand(module.bias.shape, generator=draw)
        linear = [m for m in model.backbone.modules() if isinstance(m, nn.Linear)][-1]
        linear.register_forward_hook(lambda m, x, y: setattr(self, "inputs", x[0].detach()))
        photos = torch.rand((len(labels), 3, size, size), generator=draw).double()
        z = model.backbone(photos)
        z.retain_grad()
        heads.loss(model.head(z), torch.tensor(labels), spec).backward()
        self.units, self.feature_gradient = F.normalize(z.detach(), dim=1), z.grad / 5
        self.features = z.detach()
        before = {
            n: p.detach() for n, p in [*model.named_parameters(), *model.named_buffers()] if p.is_floating_point()
        }
        delta = {n: -self.constants.lr_of(n) * (p.grad / 5 + 1e-3 * p.detach()) for n, p in model.named_parameters()}
        if stored:
            before = {n: t.float() for n, t in before.items()}
            delta = {n: (before[n].double() + t).float() - before[n] for n, t in delta.items()}
        if not head:
            del before[HEAD], delta[HEAD]
        self.update = ObservedUpdate((0,), before, delta, len(labels), tuple(range(CLASSES)) if head else ())


def nearest(found: Tensor, true: Tensor) -> Tensor:
    """(n,) relative distance of each true row to the nearest found one."""
    return torch.cdist(true, found.double()).amin(dim=1) / true.norm(dim=1)


LAYERS = [
    ("small", "group"), ("mobilefacenet", "group"), ("mobilefacenet", "batch"), ("iresnet18", "group"),
    ("iresnet18", "batch"), ("iresnet18", "frozen"), ("inception-resnet-v1", "batch"),
]  # fmt: skip


@pytest.mark.parametrize(("backbone", "norm"), LAYERS)
def test_one_photo_without_the_head(backbone: str, norm: str) -> None:
    step = Step(backbone, norm, [4], head=False)
    found = algebra.recover(step.update, step.constants)
    assert found.labels is None
    assert float(found.unit_embeddings[0] @ step.units[0]) > 1 - 1e-9
    assert float(nearest(found.inputs, step.inputs)) < 1e-6
    if backbone != "inception-resnet-v1":  # which ends in a normalisation of its own
        torch.testing.assert_close(found.features, step.features, rtol=1e-6, atol=1e-7)
        if found.feature_gradient is not None:
            torch.testing.assert_close(found.feature_gradient, step.feature_gradient, rtol=1e-6, atol=1e-9)
    assert (found.feature_gradient is None) == (norm == "frozen")


def test_a_scale_that_the_gradient_does_not_hold_is_not_made_up() -> None:
    step = Step("inception-resnet-v1", "group", [4], head=False)
    found = algebra.recover(step.update, step.constants)
    assert found.inputs is None  # no bias, and GroupNorm undoes any scale
    assert float(found.unit_embeddings[0] @ step.units[0]) > 1 - 1e-9


@pytest.mark.parametrize("head", [True, False])
@pytest.mark.parametrize("stored", [True, False])
def test_a_batch_is_told_apart_by_its_zeros(head: bool, stored: bool) -> None:
    step = Step("small", "group", [1, 5, 5, 7], head=head, stored=stored)
    found = algebra.recover(step.update, step.constants)
    assert float(nearest(found.inputs, step.inputs).max()) < (1e-3 if stored else 1e-6)
    assert float(nearest(found.unit_embeddings, step.units).max()) < 1e-3
    assert (found.labels is None) == (not head)
    if head:
        assert found.labels.tolist() == [1, 5, 5, 7]
        order = (found.unit_embeddings.double() @ step.units.T).argmax(dim=1)
        assert torch.tensor([1, 5, 5, 7])[order].tolist() == [1, 5, 5, 7]  # entry i of each field is about one photo
        size = float(step.feature_gradient.abs().max())
        torch.testing.assert_close(found.feature_gradient, step.feature_gradient[order], rtol=0, atol=1e-2 * size)


@pytest.mark.parametrize(("backbone", "norm"), LAYERS)
def test_known_features_give_the_inputs_of_a_batch(backbone: str, norm: str) -> None:
    step = Step(backbone, norm, [1, 5, 5, 7])
    inputs = algebra.inputs_of_batch(step.update, step.constants, step.units)
    assert float((inputs - step.inputs).norm() / step.inputs.norm()) < 1e-4


def test_a_batch_without_zeros_and_without_the_head_says_so() -> None:
    step = Step("mobilefacenet", "group", [1, 5], head=False)
    assert not algebra.separable(step.update, step.constants)
    found = algebra.recover(step.update, step.constants)
    assert found.unit_embeddings is None
    assert "nothing" in found.how


def test_an_update_without_a_backbone_is_read_through_its_rows() -> None:
    step = Step("small", "group", [3])
    only = {
        name: {HEAD: tensors[HEAD]} for name, tensors in (("before", step.update.before), ("delta", step.update.delta))
    }
    found = algebra.recover(replace(step.update, **only), step.constants)
    assert (found.labels.tolist(), found.inputs) == ([3], None)
    assert float(found.unit_embeddings[0] @ step.units[0]) > 1 - 1e-9


def test_under_noise_one_photo_still_gets_an_estimate() -> None:
    step = Step("small", "group", [3], head=False)
    draw = generator("noisy")
    name = "backbone.embedding.weight"
    size = float(step.update.delta[name].norm()) / step.update.delta[name].numel() ** 0.5
    noisy = {n: d + 0.5 * size * torch.randn(d.shape, generator=draw).double() for n, d in step.update.delta.items()}
    found = algebra.recover(replace(step.update, delta=noisy), step.constants)
    assert float(found.unit_embeddings[0] @ step.units[0]) > 0.9


def mixed(count: int, noise: float, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a layer's weight and bias behind ``count`` inputs with about half zeros, and the inputs."""
    draw = generator("mixed", seed)
    h = torch.randn(count, 600, generator=draw, dtype=torch.float64).relu()
    pulls = torch.randn(40, count, generator=draw, dtype=torch.float64)
    dW = pulls @ h
    return dW + noise * torch.randn(dW.shape, generator=draw, dtype=torch.float64), pulls.sum(1), h


@pytest.mark.parametrize(("count", "noise"), [(1, 0.0), (2, 0.0), (6, 0.0), (6, 1e-4), (12, 0.0)])
def test_inputs_with_zeros_are_unmixed_in_their_true_scale(count: int, noise: float) -> None:
    dW, db, h = mixed(count, noise)
    found = unmix(dW, db, count)
    assert (len(found.inputs), found.rank) == (count, count)
    assert float(nearest(found.inputs, h).max()) < 1e-8 + 100 * noise


def test_a_photo_whose_gradient_drowns_in_rounding_is_left_out() -> None:
    draw = generator("drowned")
    h = torch.randn(3, 600, generator=draw, dtype=torch.float64).relu()
    pulls = torch.randn(40, 3, generator=draw, dtype=torch.float64) * torch.tensor([1.0, 1.0, 1e-7])
    dW = pulls @ h + 1e-4 * torch.randn(40, 600, generator=draw, dtype=torch.float64)
    found = unmix(dW, pulls.sum(1), 3)
    assert (len(found.inputs), found.rank) == (2, 2)
    assert float(nearest(found.inputs, h[:2]).max()) < 1e-2


def test_inputs_without_zeros_are_not_mistaken_for_unmixed() -> None:
    draw = generator("dense")
    h = torch.rand(4, 600, generator=draw, dtype=torch.float64) + 0.1
    pulls = torch.randn(40, 4, generator=draw, dtype=torch.float64)
    assert len(unmix(pulls @ h, pulls.sum(1), 4).inputs) == 0
