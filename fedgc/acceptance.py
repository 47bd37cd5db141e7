"""The door in front of the aggregation: whether what a client sent can be an update of this round at all."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from fedgc.types import HEAD
from fedgc.uploads import Order, Packing, Upload


def problem_with(upload: Upload, order: Order, pack: Packing) -> str | None:
    """Why an upload is not taken: names, shapes, types, numbers that are not finite, or counts that cannot be. None where it is.

    An update that passes may still be a lie: this is no defense against poisoning.
    """
    expected = {name: x.shape for name, x in order.backbone.items() if name not in pack.constant}
    if order.rows is not None:
        expected[HEAD] = order.rows.shape
    averaged = pack.averaged(expected) if pack.defense.masks else {}
    clear = {name: shape for name, shape in expected.items() if name not in averaged}
    sent = {
        name: x for name, x in upload.sent.items() if name not in averaged
    }  # what is masked may be there for the record
    found = _misfit(sent, clear, floating=True) or _misfit(upload.masked, averaged, floating=False)
    if found is None and not 0 <= upload.dropped <= upload.images:
        found = f"{upload.dropped} gradients left out of {upload.images} photos"
    if found is None and upload.steps < 0:
        found = f"{upload.steps} steps"
    return found


def _misfit(tensors: Mapping[str, Tensor], shapes: Mapping[str, torch.Size], *, floating: bool) -> str | None:
    missing, more = shapes.keys() - tensors.keys(), tensors.keys() - shapes.keys()
    if missing or more:
        return f"{min(missing)} is missing" if missing else f"{min(more)} was not asked for"
    for name, x in tensors.items():
        if x.shape != shapes[name]:
            return f"{name} is {list(x.shape)} in place of {list(shapes[name])}"
        if x.dtype != (torch.float32 if floating else torch.int64):
            return f"{name} is {str(x.dtype).removeprefix('torch.')}"
        if floating and not bool(x.isfinite().all()):
            return f"{name} is not finite"
    return None
