"""An update from elsewhere: one client's weights before and after its step, in one safetensors file that describes itself.

Tensors are ``before/NAME`` and ``after/NAME`` (or ``delta/NAME``, after minus before), NAME as in the state of a
`fedgc.models.FaceModel`: ``backbone.*`` and ``head.weight``. The header's entry ``about`` is JSON with the fields of
`Described`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from torch import Tensor

from fedgc.errors import UsageError
from fedgc.files import PRIVATE, write_tensors
from fedgc.models import build_backbone, checked_spec, state_tensors
from fedgc.types import BACKBONE, HEAD, LocalConstants, ModelSpec, ObservedUpdate, Tensors

BEFORE, AFTER, DELTA = "before/", "after/", "delta/"
HELP = "docs/how-to/foreign-update.md shows the format"


class Noised(BaseModel):
    """What DP-SGD did: the clipping norm of a photo's gradient, and the noise in its units."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    max_grad_norm: float = Field(gt=0)
    noise_multiplier: float = Field(gt=0)


class Described(BaseModel):
    """What an attacker is told of the step. batch_size: photos behind it; steps: optimiser steps of SGD, each on all of them;
    classes: a number for each row of the head, in their order; dp_sgd: where noise was added."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    format: Literal[1]
    spec: dict[str, Any]
    lr: float = Field(gt=0)
    batch_size: int = Field(ge=1)
    head_lr_factor: float = Field(default=1.0, gt=0)
    momentum: float = Field(default=0.0, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    clip_norm: float | None = Field(default=None, gt=0)
    steps: int = Field(default=1, ge=1)
    augmented: bool = False
    classes: tuple[int, ...] | None = None
    dp_sgd: Noised | None = None

    @field_validator("classes")
    @classmethod
    def _each_once(cls, classes: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if classes is not None and (len(set(classes)) < len(classes) or min(classes, default=0) < 0):
            raise ValueError("classes are whole numbers from 0, each named once")
        return classes

    @classmethod
    def of(cls, about: Any, where: str) -> Self:
        """Raises UsageError that names the first field that is wrong."""
        try:
            return cls.model_validate(about if isinstance(about, dict) else {})
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(map(str, first["loc"]))
            raise UsageError(f"{where}: its description 'about' has a wrong {field}: {first['msg']}; {HELP}") from None

    def constants(self, spec: ModelSpec) -> LocalConstants:
        card = {} if self.dp_sgd is None else {"name": "dp-sgd", **self.dp_sgd.model_dump()}
        return LocalConstants(
            spec, self.lr, self.head_lr_factor, self.momentum, self.weight_decay, self.clip_norm, self.batch_size, self.steps,
            self.augmented, card,
        )  # fmt: skip


def save_update(
    path: Path, before: Tensors, after: Tensors, spec: ModelSpec, *, lr: float, batch_size: int, **more: Any
) -> None:
    """Write the file, owner-only. before, after: the state of a FaceModel (`state_dict()`), copied at these two moments; more:
    the other fields of `Described`. Raises UsageError where `unpack_update` would."""
    about = {"format": 1, "spec": asdict(spec), "lr": lr, "batch_size": batch_size, **more}
    tensors = {BEFORE + name: t for name, t in before.items()} | {AFTER + name: t for name, t in after.items()}
    update, _ = unpack_update(tensors, about, str(path))
    if not any(bool(change.any()) for change in update.delta.values()):
        raise UsageError(
            f"{path}: before and after are the same: copy before the step, with copy.deepcopy(model.state_dict())"
        )
    write_tensors(path, tensors, about, PRIVATE)


def holds_update(tensors: Tensors) -> bool:
    """Whether these are tensors of an update, rather than of a checkpoint."""
    return any(name.startswith((BEFORE, AFTER, DELTA)) for name in tensors)


def unpack_update(tensors: Tensors, about: Any, where: str) -> tuple[ObservedUpdate, LocalConstants]:
    """The update, in float32, and the public constants behind it. Raises UsageError for the first thing that is wrong:
    description, names, shapes, or numbers that are not finite."""
    described = Described.of(about, where)
    spec = checked_spec(described.spec, where, HELP)
    parts = {prefix: _part(tensors, prefix) for prefix in (BEFORE, AFTER, DELTA)}
    _check_named(tensors, parts, where)
    before, moved = parts[BEFORE], parts[AFTER] or parts[DELTA]
    backbone = build_backbone(spec, seed=0)
    shapes = {BACKBONE + name: tuple(t.shape) for name, t in state_tensors(backbone).items()}
    shapes[HEAD] = (_rows(before, described, where), spec.embedding_size)
    counters = {BACKBONE + name for name in backbone.state_dict()} - shapes.keys()
    for prefix, part in parts.items():
        for name in counters & part.keys():
            del part[name]  # of BatchNorm: integers that tell of no photo
        _check_tensors(part, shapes, prefix, where)
    if lacking := sorted((shapes.keys() - {HEAD} | moved.keys()) - before.keys()):
        raise UsageError(f"{where}: {BEFORE}{lacking[0]} is missing ({len(lacking)} in all); {HELP}")
    if HEAD in before and HEAD not in moved:
        raise UsageError(f"{where}: {HEAD} must be there before and after, or not at all; {HELP}")
    delta = {name: (t - before[name] if parts[AFTER] else t).float() for name, t in moved.items()}
    classes = () if HEAD not in before else described.classes or tuple(range(len(before[HEAD])))
    start = {name: t.float() for name, t in before.items()}
    return ObservedUpdate((0,), start, delta, described.batch_size, classes), described.constants(spec)


def _part(tensors: Tensors, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def _check_named(tensors: Tensors, parts: Mapping[str, Tensors], where: str) -> None:
    """Every tensor is before, after or a change, and there is one way to tell the change."""
    if strange := sorted(set(tensors) - {prefix + name for prefix, part in parts.items() for name in part}):
        raise UsageError(
            f"{where}: tensor '{strange[0]}' is neither {BEFORE}NAME nor {AFTER}NAME nor {DELTA}NAME; {HELP}"
        )
    if bool(parts[AFTER]) == bool(parts[DELTA]):
        held = "both" if parts[AFTER] else "neither"
        raise UsageError(f"{where} holds {held} of {AFTER} and {DELTA}: give one of them; {HELP}")


def _rows(before: Tensors, described: Described, where: str) -> int:
    """How many rows the head has; where the classes are named, as many."""
    head = before.get(HEAD)
    rows = 0 if head is None or head.ndim == 0 else len(head)
    if described.classes is not None and len(described.classes) != rows:
        raise UsageError(f"{where}: {len(described.classes)} classes are named, and {HEAD} has {rows} rows; {HELP}")
    return rows


def _check_tensors(part: Tensors, shapes: Mapping[str, tuple[int, ...]], prefix: str, where: str) -> None:
    for name, tensor in part.items():
        if name not in shapes:
            raise UsageError(f"{where}: {prefix}{name} is no tensor of that network; {HELP}")
        if tuple(tensor.shape) != shapes[name] or not tensor.is_floating_point():
            raise UsageError(
                f"{where}: {prefix}{name} is {tensor.dtype} {tuple(tensor.shape)}, and a float of {shapes[name]} is due; {HELP}"
            )
        if not bool(torch.isfinite(tensor).all()):
            raise UsageError(f"{where}: {prefix}{name} holds numbers that are not finite: the training had diverged")
