"""Backbones: (B, 3, S, S) photos in [0, 1] -> (B, d) features. Normalisation of pixels happens here and nowhere else."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedgc.errors import UsageError, WorkFailedError
from fedgc.heads import CosineHead
from fedgc.rng import stream_seed
from fedgc.types import ModelSpec


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(math.gcd(channels, 8), channels)


class _Residual(nn.Module):
    """Pre-activation block (He et al. 2016) that halves the side; the shortcut is pooled and projected to match."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = _group_norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=2, padding=1, bias=False)
        self.norm2 = _group_norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv1(F.relu(self.norm1(x)))
        y = self.conv2(F.relu(self.norm2(y)))
        return y + self.shortcut(F.avg_pool2d(x, 2, ceil_mode=True))


class SmallFaceNet(nn.Module):
    """The default: a stem and three residual stages with GroupNorm; 0.45 M parameters at 48 px and 128 features."""

    def __init__(self, image_size: int, embedding_size: int, widths: tuple[int, ...] = (16, 32, 64, 128)) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, widths[0], 3, stride=2, padding=1, bias=False)
        self.stages = nn.Sequential(*(_Residual(a, b) for a, b in pairwise(widths)))
        self.norm = _group_norm(widths[-1])
        side = math.ceil(image_size / 2 ** len(widths))
        self.embedding = nn.Linear(widths[-1] * side * side, embedding_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stages(self.stem((x - 0.5) / 0.25))
        return self.embedding(F.relu(self.norm(x)).flatten(1))


class InceptionFaceNet(nn.Module):
    """facenet-pytorch's InceptionResnetV1 (23.5 M parameters, 512 features, photos of at least 75 px)."""

    def __init__(self, norm: str) -> None:
        super().__init__()
        # dropout draws from the global generator and would make a run depend on the order of work
        self.net = _facenet_pytorch().InceptionResnetV1(pretrained=None, dropout_prob=0.0)
        if norm == "group":
            replace_batch_norm(self.net)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 255 - 127.5) / 128)


def _facenet_pytorch() -> Any:
    try:
        import facenet_pytorch
    except (ImportError, RuntimeError) as error:
        raise WorkFailedError(
            f"facenet-pytorch cannot be imported ({error}). torch and torchvision probably come from different builds: "
            "install both from the same index, with the versions in constraints.txt"
        ) from error
    return facenet_pytorch


def replace_batch_norm(module: nn.Module) -> None:
    """Replace every BatchNorm by a GroupNorm of the same width, in place: batch statistics mix photos, so that no
    per-photo gradient exists, and they leave the client with the model."""
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm1d | nn.BatchNorm2d):
            setattr(module, name, _group_norm(child.num_features))
        else:
            replace_batch_norm(child)


def _small(spec: ModelSpec) -> nn.Module:
    if spec.norm != "group":
        raise UsageError("model.norm = batch is not available for the backbone 'small'; leave it at 'group'")
    return SmallFaceNet(spec.image_size, spec.embedding_size)


def _inception(spec: ModelSpec) -> nn.Module:
    if spec.embedding_size != 512 or spec.image_size < 75:
        raise UsageError(
            f"inception-resnet-v1 makes 512 features from photos of at least 75 px, not {spec.embedding_size} from "
            f"{spec.image_size} px: add --set model.embedding_size=512 --set data.image_size=112"
        )
    return InceptionFaceNet(spec.norm)


BACKBONES: dict[str, tuple[Callable[[ModelSpec], nn.Module], str]] = {
    "small": (_small, "residual net with GroupNorm for a laptop (default)"),
    "inception-resnet-v1": (_inception, "facenet-pytorch's InceptionResnetV1, 23.5 M parameters, photos >= 75 px"),
}


class FaceModel(nn.Module):
    """A backbone and a cosine head: (B, 3, S, S) photos -> (B, C) cosines with the class embeddings."""

    def __init__(self, backbone: nn.Module, head: CosineHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def build_backbone(spec: ModelSpec, seed: int) -> nn.Module:
    """The backbone with its initial weights, a function of the spec and the seed alone."""
    build, _ = BACKBONES[spec.backbone]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(stream_seed(seed, "backbone"))
        return build(spec)


def build_model(spec: ModelSpec, classes: int, seed: int = 0) -> FaceModel:
    """A model with an unset head of ``classes`` rows."""
    return FaceModel(build_backbone(spec, seed), CosineHead(classes, spec.embedding_size))


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name: what a client sends and a server averages."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


@torch.no_grad()
def embed(backbone: nn.Module, photos: Tensor, batch: int = 256) -> Tensor:
    """Unit features of uint8 photos (N, 3, S, S) -> float32 (N, d) on the CPU; mean of the photo and its mirror image."""
    was_training = backbone.training
    backbone.eval()
    device = next(backbone.parameters()).device
    out = []
    for part in photos.split(batch):
        x = part.to(device).float() / 255
        z = F.normalize(backbone(x), dim=1) + F.normalize(backbone(x.flip(3)), dim=1)
        out.append(F.normalize(z, dim=1).cpu())
    backbone.train(was_training)
    return cast(Tensor, torch.cat(out)) if out else torch.zeros(0, 1)
