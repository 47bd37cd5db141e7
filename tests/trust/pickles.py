"""Files that create a file when they are unpickled: twelve forms share nine ways of writing them."""

from __future__ import annotations

import gzip
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

CANARY = "canary"


class Code:
    """Unpickled, it is a call of ``os.makedirs``."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.canary), 0o755, True)


def _objects(canary: Path) -> np.ndarray[Any, Any]:
    array = np.empty(1, dtype=object)
    array[0] = Code(canary)
    return array


def _npz(file: Path, canary: Path) -> None:
    with file.open("wb") as stream:
        np.savez(stream, weights=_objects(canary))


def _nested(file: Path, canary: Path) -> None:
    state = OrderedDict(weight=torch.zeros(2, 2))
    state._metadata = {"": {"version": Code(canary)}}  # type: ignore[attr-defined]
    torch.save({"epoch": 3, "state_dict": state, "optimizer": [Code(canary)]}, file)


def _torchscript(file: Path, canary: Path) -> None:
    """The archive of a scripted module by its names; nothing is compiled for it."""
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("hostile/version", "3\n")
        archive.writestr("hostile/byteorder", "little")
        archive.writestr("hostile/code/__torch__.py", "class Net(Module):\n  __parameters__ = []\n")
        archive.writestr("hostile/constants.pkl", pickle.dumps((), protocol=2))
        archive.writestr("hostile/data.pkl", pickle.dumps(Code(canary), protocol=2))


def _trap(file: Path, canary: Path) -> None:
    """Tensors by the publisher's names, and beside them what only another reader would accept."""
    state = {"conv2d_1a.conv.weight": torch.zeros(32, 3, 3, 3), "last_linear.weight": torch.zeros(512, 1792)}
    torch.save({**state, "logits.bias": Code(canary)}, file)


PICKLES: Mapping[str, Callable[[Path, Path], object]] = {
    "zip": lambda file, canary: torch.save(Code(canary), file),
    "legacy": lambda file, canary: torch.save(Code(canary), file, _use_new_zipfile_serialization=False),
    "bare": lambda file, canary: file.write_bytes(pickle.dumps(Code(canary))),
    "nested": _nested,
    "gzip": lambda file, canary: file.write_bytes(gzip.compress(pickle.dumps(Code(canary)))),
    "npy": lambda file, canary: np.save(file, _objects(canary), allow_pickle=True),
    "npz": _npz,
    "torchscript": _torchscript,
    "trap": _trap,
}
