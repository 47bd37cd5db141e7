"""The door in front of the aggregation: whether what a client sent can be an update of this round at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from fedgc.models import endless
from fedgc.types import HEAD
from fedgc.uploads import Upload


def problem_with(
    upload: Upload, shapes: Mapping[str, torch.Size], held: Tensor | None, *, masked: Collection[str] = ()
) -> str | None:
    """Why an upload is not taken: names, shapes, types, numbers that are not finite, a class embedding without a direction, or
    counts that cannot be. None where it is.

    shapes: of what this client is to send; held: class embeddings (n, d) that it changes, where it uploads its own; masked:
    names of what arrives as masked integers. An update that passes may still be a lie: see `fedgc.robust`.
    """
    clear = {name: shape for name, shape in shapes.items() if name not in masked}
    sent = {
        name: x for name, x in upload.sent.items() if name not in masked
    }  # what is masked may be there for the record
    found = _misfit(sent, clear, floating=True) or _misfit(
        upload.masked, {n: shapes[n] for n in masked}, floating=False
    )
    if found is None and held is not None and bool(((held + upload.sent[HEAD]).norm(dim=1) == 0).any()):
        found = f"{HEAD} has a row of no length"
    if found is None and not 0 <= upload.dropped <= upload.images:
        found = f"{upload.dropped} gradients left out of {upload.images} photos"
    if found is None and (upload.steps < 0 or math.isinf(upload.loss)):
        found = f"{upload.steps} steps with a loss of {upload.loss:g}"
    return found


def _misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, floating: bool) -> str | None:
    missing, more = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or more:
        return f"{min(missing)} is missing" if missing else f"{min(more)} was not asked for"
    for name, x in tensors.items():
        if x.layout != torch.strided:
            return f"{name} is {str(x.layout).removeprefix('torch.')}"
        if x.shape != shapes[name]:
            return f"{name} is {list(x.shape)} in place of {list(shapes[name])}"
        if x.dtype != (torch.float32 if floating else torch.int64):
            return f"{name} is {str(x.dtype).removeprefix('torch.')}"
    found = endless(tensors) if floating else None
    return None if found is None else f"{found} is not finite"
