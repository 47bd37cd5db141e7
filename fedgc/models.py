"""Networks of a face recogniser: a backbone, (B, 3, S, S) photos in [0, 1] -> (B, d) features, and a cosine head on it.

Normalisation of pixels happens in the backbone and nowhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from pydantic import TypeAdapter, ValidationError
from torch import Tensor, nn

from fedgc.backbones.inception import InceptionFaceNet
from fedgc.backbones.iresnet import IResNet
from fedgc.backbones.mobilefacenet import MobileFaceNet
from fedgc.backbones.norms import set_norm
from fedgc.backbones.small import SmallFaceNet
from fedgc.errors import RunError, UsageError
from fedgc.heads import CosineHead
from fedgc.rng import stream_seed
from fedgc.types import BACKBONE, ModelSpec, Tensors


@dataclass(frozen=True)
class Backbone:
    """make: (side of a photo, features) -> network with BatchNorm. parameters: how many at its customary ``side`` and
    ``features``; smallest: the least side it takes; fixed: whether it makes no other number of features."""

    make: Callable[[int, int], nn.Module]
    summary: str
    parameters: int
    side: int
    features: int
    smallest: int = 32
    fixed: bool = False


BACKBONES: dict[str, Backbone] = {
    "small": Backbone(SmallFaceNet, "residual net for a laptop (default)", 450_000, 48, 128),
    "mobilefacenet": Backbone(MobileFaceNet, "MobileFaceNet (Chen et al. 2018), for phones", 1_003_136, 112, 128),
    "iresnet18": Backbone(partial(IResNet, (2, 2, 2, 2)), "ArcFace's residual net, 18 layers", 24_025_600, 112, 512),
    "iresnet50": Backbone(partial(IResNet, (3, 4, 14, 3)), "ArcFace's residual net, 50 layers", 43_590_848, 112, 512),
    "inception-resnet-v1": Backbone(
        lambda side, features: InceptionFaceNet(), "facenet-pytorch's, with public weights",
        23_482_624, 160, 512, smallest=75, fixed=True,
    ),
}  # fmt: skip


def check_spec(spec: ModelSpec) -> None:
    """Raise UsageError where no such network can be built, with the settings that help."""
    chosen = BACKBONES[spec.backbone]
    if spec.image_size >= chosen.smallest and (not chosen.fixed or spec.embedding_size == chosen.features):
        return
    makes = f"{chosen.features} features" if chosen.fixed else "features"
    size = f"--set model.embedding_size={chosen.features} " if chosen.fixed else ""
    raise UsageError(
        f"{spec.backbone} makes {makes} from photos of at least {chosen.smallest} px, not {spec.embedding_size} from "
        f"{spec.image_size} px: add {size}--set data.image_size={min(chosen.side, 112)}"
    )


def told_spec(about: Any, where: str) -> ModelSpec:
    """The network that the description of a checkpoint names, likewise."""
    return checked_spec(about.get("spec") if isinstance(about, dict) else None, where)


def checked_spec(values: Any, where: str, hint: str = "give a checkpoint of `fedgc-priv train`") -> ModelSpec:
    """A network's description as it lies in a file; raises UsageError where no such network can be built."""
    names = {f.name for f in fields(ModelSpec)}
    try:
        if values is None:
            raise ValueError("the file does not say which network it is for")
        if not isinstance(values, Mapping) or set(values) - names:
            raise ValueError(f"its keys are {', '.join(sorted(names))}")
        spec = TypeAdapter(ModelSpec).validate_python(dict(values))
        if spec.backbone not in BACKBONES:
            raise ValueError(f"backbone is one of {', '.join(BACKBONES)}")
        if not (32 <= spec.image_size <= 256 and 8 <= spec.embedding_size <= 4096 and 0 < spec.scale <= 256):
            raise ValueError("image_size lies in 32..256, embedding_size in 8..4096, scale in (0, 256]")
        if not 0 <= spec.margin_size <= 1 or spec.softmax_classes < 0:
            raise ValueError("margin_size lies in 0..1, and softmax_classes is no less than 0")
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{where}: wrong spec: {'.'.join(map(str, first['loc']))}: {first['msg']}; {hint}") from None
    except ValueError as error:
        raise UsageError(f"{where}: wrong spec: {error}; {hint}") from None
    check_spec(spec)
    return spec


def endless(tensors: Tensors) -> str | None:
    """The name of the first tensor with a number that is not finite. Lengths are the quicker look; a length that is not finite
    may still be of finite numbers."""
    if not tensors or bool(torch.stack(torch._foreach_norm(list(tensors.values()))).isfinite().all()):
        return None
    return next((name for name, x in tensors.items() if not bool(x.isfinite().all())), None)


class FaceModel(nn.Module):
    """A backbone and a cosine head: (B, 3, S, S) photos -> (B, C) cosines with the class embeddings."""

    def __init__(self, backbone: nn.Module, head: CosineHead) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))


def build_backbone(spec: ModelSpec, seed: int) -> nn.Module:
    """The backbone with its initial weights, a function of the spec and the seed alone. Raises UsageError for a size that
    it does not take."""
    check_spec(spec)
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(stream_seed(seed, "backbone"))  # the CPU's only: layers start there
        backbone = BACKBONES[spec.backbone].make(spec.image_size, spec.embedding_size)
    set_norm(backbone, spec.norm)
    return backbone


def train_last_layer_only(backbone: nn.Module) -> None:
    """Hold every parameter constant but those of the last linear layer and of the norm behind it."""
    layers = list(backbone.modules())
    last = max(i for i, layer in enumerate(layers) if isinstance(layer, nn.Linear))
    backbone.requires_grad_(False)
    for layer in layers[last:]:
        layer.requires_grad_(True)


def load_backbone(spec: ModelSpec, tensors: Tensors) -> nn.Module:
    """The backbone of a message, in evaluation mode, on the CPU, in the precision of its tensors. Names begin with
    ``BACKBONE``; others are passed over. Integer counters are never sent and keep their initial value. Raises RunError where
    something else is missing."""
    sent = {name.removeprefix(BACKBONE): tensor for name, tensor in tensors.items() if name.startswith(BACKBONE)}
    backbone = build_backbone(spec, seed=0).eval()
    if lacking := sorted(state_tensors(backbone).keys() - sent.keys()):
        raise RunError(
            f"no {spec.backbone} can be made of these tensors: {lacking[0]} is missing ({len(lacking)} in all)"
        )
    backbone.to(next(iter(sent.values())).dtype).load_state_dict(sent, strict=False)
    return backbone


def build_model(spec: ModelSpec, classes: int, seed: int = 0) -> FaceModel:
    """A model with an unset head of ``classes`` rows."""
    return FaceModel(build_backbone(spec, seed), CosineHead(classes, spec.embedding_size))


def state_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and floating-point buffers by name: what a client sends and a server averages."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach() for name, tensor in named if tensor.is_floating_point()}


def as_bytes(images: Tensor) -> Tensor:
    """uint8 photos for images in [0, 1], to the nearest level; what lies beyond is cut off."""
    return (images.clamp(0, 1) * 255).round().to(torch.uint8)


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
