"""facenet-pytorch's InceptionResnetV1, the one backbone here for which others publish weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from fedgc.errors import WorkFailedError
from fedgc.limits import raise_if_short


class InceptionFaceNet(nn.Module):
    """23.5 M parameters, 512 features, photos of at least 75 px. Pixels are scaled as its published weights expect."""

    def __init__(self) -> None:
        super().__init__()
        # dropout draws from the global generator and would make a run depend on the order of work
        self.net = facenet_pytorch().InceptionResnetV1(pretrained=None, dropout_prob=0.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.net((x * 255 - 127.5) / 128)


def facenet_pytorch() -> Any:
    """The library, or a WorkFailedError that says how to repair it."""
    try:
        import facenet_pytorch
    except (ImportError, RuntimeError) as error:
        raise_if_short(error)
        raise WorkFailedError(
            f"facenet-pytorch cannot be imported ({error}). torch and torchvision probably come from different builds: "
            "install both from the same index, with the versions in constraints.txt"
        ) from error
    return facenet_pytorch
