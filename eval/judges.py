"""Independent recognisers that say whether two pictures show one person. No attack can reach one: none is ever in a loss.

A judge sees pictures as a file would hold them, in 8 bits a channel, and only the part that its own training framed.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from eval.pairs import unit
from eval.statistics import Floats
from fedgc.errors import UsageError, WorkFailedError
from fedgc.models import as_bytes, embed

CHIP = 150  # pixels of a side that dlib's network takes
DLIB_WEIGHTS = "dlib_face_recognition_resnet_model_v1.dat"
INSTALL = "install both with `pip install dlib-bin face_recognition_models` (the extra [judge] of this package)"


@dataclass(frozen=True)
class Framing:
    """The square of a picture that a judge looks at. side: its own over the picture's; right, down: how far its centre lies
    from the picture's, in sides of the picture. What lies outside the picture repeats its edge."""

    side: float = 1.0
    right: float = 0.0
    down: float = 0.0


@dataclass(frozen=True)
class Judge:
    """name: as a user gives it; weights: SHA-256 of what it was loaded from; network: uint8 pictures (n, 3, S, S) -> (n, d)
    features; side: S; framing: the part of a picture that becomes those."""

    name: str
    weights: str
    network: Callable[[Tensor], Any]
    side: int
    framing: Framing = Framing()

    def __call__(self, photos: Tensor) -> Floats:
        """Unit embeddings (n, d), float64, of photos float32 (n, 3, H, W) in [0, 1]. Raises UsageError for anything else."""
        if not len(photos):
            raise UsageError("a judge needs at least one picture")
        found = self.network(in_bytes(framed(in_bytes(photos).float() / 255, self.framing, self.side)))
        return unit(found)

    @property
    def key(self) -> str:
        """A name for files: another one wherever the judge would say something else."""
        about = (self.name, self.weights, self.side, self.framing)
        plain = "".join(c if c.isalnum() else "-" for c in Path(self.name).stem)[:40]
        return f"{plain}-{hashlib.sha256(repr(about).encode()).hexdigest()[:8]}"


def in_bytes(photos: Tensor) -> Tensor:
    """uint8 of pictures in [0, 1]. Raises UsageError where they are none."""
    if photos.ndim != 4 or photos.shape[1] != 3 or not photos.is_floating_point():
        raise UsageError(f"pictures must be floating point (n, 3, H, W), got {photos.dtype} {tuple(photos.shape)}")
    if not bool(photos.isfinite().all()):
        raise UsageError("a picture holds NaN or infinity: replace what is missing by grey first")
    return as_bytes(photos.detach().cpu())


def framed(photos: Tensor, framing: Framing, side: int) -> Tensor:
    """The framed square of photos (n, 3, H, H), resized to (n, 3, side, side), bicubic, with antialiasing where it shrinks."""
    fits = round(side / framing.side)
    if photos.shape[-1] > fits:
        photos = F.interpolate(photos, size=(fits, fits), mode="bicubic", antialias=True)
    square = torch.tensor([[framing.side, 0.0, 2 * framing.right], [0.0, framing.side, 2 * framing.down]])
    grid = F.affine_grid(square.expand(len(photos), 2, 3), [len(photos), 3, side, side], align_corners=False)
    return F.grid_sample(photos, grid, mode="bicubic", padding_mode="border", align_corners=False).clamp(0, 1)


def network_judge(name: str, weights: str, backbone: nn.Module, side: int) -> Judge:
    """A backbone of ours, photos of ``side`` pixels; embeddings are the mean over a picture and its mirror image."""
    backbone.eval()
    return Judge(name, weights, lambda photos: embed(backbone, photos, batch=64), side)


def dlib_judge(framing: Framing) -> Judge:
    """The residual network of dlib's ``dlib_face_recognition_resnet_model_v1.dat`` (King 2017): 128 features, trained on 3
    million faces of 7,485 people, none of them in LFW by its author's account. Raises UsageError where a package is missing."""
    network, digest = _dlib()

    def features(photos: Tensor) -> np.ndarray:
        chips = photos.permute(0, 2, 3, 1).contiguous().numpy()
        return np.array(network.compute_face_descriptor(list(chips)))

    return Judge("dlib", digest, features, CHIP, framing)


def dlib_missing() -> str | None:
    """Which of the packages behind dlib's judge cannot be found, or None. Imports neither."""
    needed = {"dlib": "dlib-bin", "face_recognition_models": "face_recognition_models"}
    return " and ".join(p for module, p in needed.items() if importlib.util.find_spec(module) is None) or None


@cache
def _dlib() -> tuple[Any, str]:
    """The network and the SHA-256 of its file. The package that carries it is found, never imported: it asks for setuptools."""
    missing = dlib_missing()
    if missing:
        raise UsageError(f"the judge dlib needs {missing}: {INSTALL}")
    found = importlib.util.find_spec("face_recognition_models")
    assert found is not None
    places = [Path(folder) / "models" / DLIB_WEIGHTS for folder in found.submodule_search_locations or ()]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise UsageError(f"face_recognition_models holds no {DLIB_WEIGHTS}: install version 0.3.0 again")
    try:
        import dlib
    except ImportError as error:
        raise WorkFailedError(f"dlib cannot be imported ({error}): {INSTALL}") from error
    return dlib.face_recognition_model_v1(str(file)), hashlib.sha256(file.read_bytes()).hexdigest()
