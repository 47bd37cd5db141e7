"""Safetensors files that break their own rules, or keep them and are no checkpoint; written byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgc.files import write_tensors
from fedgc.models import build_backbone, state_tensors
from fedgc.types import BACKBONE, ModelSpec

SPEC = ModelSpec("small", "group", 32, 32, "cosface", 0.25, 30.0)  # what tests/tiny.py trains
STEM = f"{BACKBONE}stem.weight"


@dataclass(frozen=True)
class Abuse:
    """says: words of the refusal; a_checkpoint: whether the file is one by its form, so that an attack may read it."""

    write: Callable[[Path], object]
    says: tuple[str, ...] = ("not a readable safetensors file",)
    a_checkpoint: bool = False
    also: Abuse | None = None


def checkpoint(file: Path, change: Callable[[dict[str, Tensor]], object] = lambda tensors: None) -> None:
    """A checkpoint of that network, changed."""
    tensors = {BACKBONE + name: tensor.clone() for name, tensor in state_tensors(build_backbone(SPEC, 0)).items()}
    change(tensors)
    write_tensors(file, tensors, {"round": 2, "spec": asdict(SPEC)})


def _raw(header: object, body: bytes, file: Path, *, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def _tensor(start: int, stop: int, shape: list[int], dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def _one(entry: dict[str, Any], body: bytes = bytes(8)) -> Abuse:
    return Abuse(partial(_raw, {STEM: entry}, body))


def _deep(file: Path) -> None:
    """A good file but for its description: JSON in JSON, nested deeper than a reader can follow."""
    about = "[" * 100_000 + "]" * 100_000
    _raw({"__metadata__": {"about": about}, STEM: _tensor(0, 8, [2])}, bytes(8), file)


def _twice(file: Path) -> None:
    """A good checkpoint whose header names its first tensor twice, to the same bytes."""
    checkpoint(file)
    data = file.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end].rstrip()
    name, entry = next((n, e) for n, e in json.loads(header).items() if n != "__metadata__")
    again = f",{json.dumps(name)}:{json.dumps(entry)}}}".encode()
    _raw(header.removesuffix(b"}") + again, data[end:], file)


def _lacking(tensors: dict[str, Tensor]) -> None:
    """Without one of its tensors, and with one whose name would paint on a terminal."""
    del tensors[STEM]
    tensors[f"{BACKBONE}\x1b[31m\nhead"] = torch.zeros(1)


def _infinite(tensors: dict[str, Tensor]) -> None:
    tensors[STEM][0, 0, 0, 0] = float("inf")


def _reshaped(tensors: dict[str, Tensor]) -> None:
    tensors[STEM] = tensors[STEM].flatten()


ABUSES: Mapping[str, Abuse] = {
    "header longer than the file": Abuse(partial(_raw, {}, b"", length=1_000)),
    "header of 2^63 bytes": Abuse(partial(_raw, {}, b"", length=2**63)),
    "header is no JSON": Abuse(partial(_raw, b"weights", b""), also=Abuse(_deep)),
    "header is a list": Abuse(partial(_raw, [STEM, 8], bytes(8))),
    "overlapping offsets": Abuse(partial(_raw, {STEM: _tensor(0, 8, [2]), "b": _tensor(4, 12, [2])}, bytes(12))),
    "offsets beyond the end": _one(_tensor(0, 4_000, [1_000])),
    "unknown dtype": _one(_tensor(0, 8, [2], "F99")),
    "shape that does not fit its bytes": _one(_tensor(0, 8, [3])),
    "shape that overflows": _one(_tensor(0, 8, [2**33, 2**31])),
    "a tensor twice": Abuse(_twice, ("names something twice",)),
    "tensors missing": Abuse(partial(checkpoint, change=_lacking), ("names differ",), a_checkpoint=True),
    "tensors of another shape, or not finite": Abuse(
        partial(checkpoint, change=_reshaped),
        (STEM, "there and"),
        a_checkpoint=True,
        also=Abuse(partial(checkpoint, change=_infinite), (STEM, "holds numbers"), a_checkpoint=True),
    ),
}
