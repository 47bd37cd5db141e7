"""Weights that others publish for InceptionResnetV1. They come as pickles, the only ones that this project reads.

A file is read once into memory, its SHA-256 is judged before anything looks inside, and PyTorch's restricted reader
(``weights_only=True``) is the only reader: there is no other to fall back to.
"""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgc.backbones.inception import facenet_pytorch
from fedgc.errors import UsageError, WorkFailedError
from fedgc.limits import raise_if_short

PUBLISHED = ("vggface2", "casia-webface")  # the data they were trained on; names that facenet-pytorch knows
BACKBONE_OF_PUBLISHED = "inception-resnet-v1"
CLASSIFIER = "logits."  # of the people that it was trained on


def downloaded(name: str) -> Path:
    """The file of a published network in PyTorch's cache, fetched by facenet-pytorch where it is not there yet.

    Raises WorkFailedError where it cannot be fetched.
    """
    facenet_pytorch()
    from facenet_pytorch.models import inception_resnet_v1 as publisher

    cache = Path(publisher.get_torch_home()) / "checkpoints"
    if not (found := _cached(cache, name)):
        if os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"):
            raise UsageError(
                "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD lets a downloaded file run code: unset it before a download"
            )
        reason: Any = "nothing arrived"
        try:
            publisher.load_weights(_Nobody(), name)
        except Exception as error:  # of the network, or of a reader that refuses what arrived: ours judges that again
            raise_if_short(error)
            reason = error
        if not (found := _cached(cache, name)):
            raise WorkFailedError(
                f"facenet-pytorch could not fetch the weights '{name}' ({reason}): put its file into {cache} on a machine "
                "that has a network, or give the file with --set model.init=FILE.pt"
            )
    return found[0]


def _cached(cache: Path, name: str) -> list[Path]:
    return sorted(cache.glob(f"*-{name}.pt"))


class _Nobody:
    """Takes the weights that facenet-pytorch has read, so that it need not build a network."""

    def load_state_dict(self, state: Any) -> None:
        pass


def read_published(file: Path, expected: str | None, *, trusted: bool = False) -> tuple[dict[str, Tensor], str]:
    """Tensors of a published state dict without its classifier, and the SHA-256 of the file.

    expected: the hash that it must have; only a ``trusted`` file may come without one. Raises UsageError where the hash
    is another or absent, or where the file is anything but named tensors.
    """
    try:
        data = file.read_bytes()
    except OSError as error:
        raise_if_short(error)
        raise UsageError(f"{file} cannot be read ({error})") from None
    digest = hashlib.sha256(data).hexdigest()
    check_hash(file, digest, expected)
    if expected is None and not trusted:
        raise UsageError(
            f"{file} may run code when it is read, and has the SHA-256 {digest}: check it against what its publisher "
            f"states, then add --set model.init_sha256={digest}"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other formats and readers: the refusal says all
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except Exception as error:  # hostile bytes can fail in any way; none of them is worth another reader
        raise_if_short(error)
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(f"{file} is not a plain file of named tensors and is not loaded ({reason})") from None
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UsageError(f"{file} is not a plain file of named tensors: save the network's state_dict() alone")
    kept = {name: t for name, t in state.items() if not name.startswith(CLASSIFIER)}
    return {f"net.{name}": t.detach() for name, t in kept.items() if t.is_floating_point()}, digest


def check_hash(file: Path, digest: str, expected: str | None) -> None:
    if expected is not None and digest != expected:
        raise UsageError(
            f"{file} has the SHA-256 {digest}, not that of model.init_sha256: another file, or a damaged one. Fetch it again, "
            "or correct the key if you know this one"
        )
