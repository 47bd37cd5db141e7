"""One step of DP-SGD through every kind of layer, against a loop over photos in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from defenses.dp_sgd import DPSGD
from fedgc import heads
from fedgc.doors import ClientPlan
from fedgc.errors import UsageError
from fedgc.models import FaceModel, build_model, state_tensors
from fedgc.types import ModelSpec, Norm

CLASSES, PHOTOS, CLIP, LR = 4, 3, 0.7, 0.1
NOISE = 1e-13  # an optimiser without noise is none of Opacus'; this much is below every tolerance


def made(backbone: str, norm: Norm, side: int = 32) -> tuple[FaceModel, ModelSpec]:
    spec = ModelSpec(backbone, norm, 16, side, "cosface", 0.2, 8.0)
    model = build_model(spec, CLASSES, 0)
    nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name, tensor in state_tensors(model).items():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(2))
    return model.double(), spec


def looped(model: FaceModel, spec: ModelSpec, x: Tensor, labels: Tensor) -> list[Tensor]:
    """The parameters after one step, each photo's gradient clipped by itself."""
    parameters = list(model.parameters())
    total = [torch.zeros_like(p) for p in parameters]
    for i in range(PHOTOS):
        own = torch.autograd.grad(heads.loss(model(x[i : i + 1]), labels[i : i + 1], spec), parameters)
        length = torch.stack([g.norm() for g in own]).norm()
        for t, g in zip(total, own, strict=True):
            t += g * (CLIP / (length + 1e-6)).clamp(max=1)  # as Opacus keeps it off zero
    return [p.detach() - LR * t / PHOTOS for p, t in zip(parameters, total, strict=True)]


@pytest.mark.parametrize("mode", ["bookkeeping", "hooks"])
@pytest.mark.parametrize(
    ("backbone", "norm"),
    [
        ("small", "group"),
        ("small", "frozen"),
        ("mobilefacenet", "group"),
        ("mobilefacenet", "frozen"),
        pytest.param("iresnet18", "group", marks=pytest.mark.slow),
        pytest.param("iresnet18", "frozen", marks=pytest.mark.slow),
    ],
)
def test_a_private_step_is_the_mean_of_clipped_gradients(backbone: str, norm: Norm, mode: str) -> None:
    model, spec = made(backbone, norm)
    defense = DPSGD(noise_multiplier=NOISE, max_grad_norm=CLIP, mode=mode)
    defense.check_module(model)
    x = torch.rand(PHOTOS, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    labels = torch.arange(PHOTOS)
    expected = looped(model, spec, x, labels)
    constants = {n: b.clone() for n, b in model.named_buffers()}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    plan, noise = ClientPlan(0, PHOTOS, PHOTOS, 1), torch.Generator().manual_seed(0)
    with defense.local_training(model, optimizer, iter(()), plan, None, noise) as session:
        heads.loss(model(x), labels, spec).backward()
        session.optimizer.step()
    for p, e in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-9, atol=1e-11)
    assert all(torch.equal(constants[n], b) for n, b in model.named_buffers())
    assert bool(constants) is (norm == "frozen")


@pytest.mark.parametrize("backbone", ["small", "mobilefacenet"])
def test_batch_norm_is_refused(backbone: str) -> None:
    with pytest.raises(UsageError, match="BatchNorm, which mixes photos"):
        DPSGD(noise_multiplier=1.0).check_module(made(backbone, "batch")[0])
