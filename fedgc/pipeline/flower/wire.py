"""Orders and uploads as Flower's records: arrays for tensors, one JSON text for everything else."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from torch import Tensor

from fedgc.files import MALFORMED
from fedgc.transcripts import read_constants
from fedgc.types import Tensors
from fedgc.uploads import Home, Order, Upload

ABOUT, JSON = "about", "json"
BACKBONE, ROWS, HOME, SENT, MASKED = "backbone", "rows", "home", "sent", "masked"
_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
ONLY = "only"  # the name of the tensor in a record of one


def arrays(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(tensor.detach().cpu().contiguous().numpy()) for name, tensor in tensors.items()})


def tensors_of(content: RecordDict, record: str) -> dict[str, Tensor]:
    """The tensors of a record, none where it is absent. Raises ValueError, TypeError for what is no tensor."""
    if record not in content.array_records:
        return {}
    return {name: _tensor(name, array) for name, array in content.array_records[record].items()}


def _tensor(name: str, array: Array) -> Tensor:
    """NumPy's format, whose header says how many bytes must follow: that is looked at before memory is taken for them."""
    stream = io.BytesIO(array.data)
    try:
        shape, turned, kind = _HEADERS[np.lib.format.read_magic(stream)](stream)
    except Exception:  # a header is a Python literal, and a hostile one can make its parser raise nearly anything
        raise ValueError(f"{name} is not an array in NumPy's format") from None
    if kind.hasobject or turned or math.prod(shape) * kind.itemsize != len(array.data) - stream.tell():
        raise ValueError(f"{name} is not the array that its header promises")
    return torch.from_numpy(np.frombuffer(array.data, kind, offset=stream.tell()).reshape(shape).copy())


def one_of(content: RecordDict, record: str) -> Tensor | None:
    return tensors_of(content, record).get(ONLY)


def about(content: RecordDict) -> dict[str, Any]:
    """Raises ValueError where the sender speaks another language."""
    try:
        found = json.loads(str(content.config_records[ABOUT][JSON]))
    except MALFORMED:
        found = None
    if not isinstance(found, dict):
        raise ValueError("a message without a description")
    return found


def note(**told: Any) -> ConfigRecord:
    return ConfigRecord({JSON: json.dumps(told)})


def order_to_content(order: Order, backbone: ArrayRecord, home: Home, **more: Any) -> RecordDict:
    """backbone: `order.backbone`, packed once for all clients. home: sent only to a client that cannot have it."""
    content = RecordDict({BACKBONE: backbone})
    if order.rows is not None:
        content[ROWS] = arrays({ONLY: order.rows})
    if home.rows is not None:
        content[HOME] = arrays({ONLY: home.rows})
    examples = {str(k): n for k, n in order.examples.items()}
    content[ABOUT] = note(where=list(order.where), constants=asdict(order.constants), examples=examples, **more)
    return content


def content_to_order(content: RecordDict) -> tuple[Order, Home]:
    told = about(content)
    constants = read_constants(told["constants"])
    examples = {int(k): n for k, n in told["examples"].items()}
    backbone = tensors_of(content, BACKBONE)
    order = Order(tuple(told["where"]), constants, backbone, one_of(content, ROWS), examples)
    return order, Home(one_of(content, HOME))


def upload_to_content(upload: Upload, order: Order, *, everything: bool) -> RecordDict:
    """everything: with what never leaves a real client, for the record of an experiment."""
    clear = upload.sent if everything else {n: x for n, x in upload.sent.items() if n not in upload.masked}
    content = RecordDict({SENT: arrays(clear)})
    if upload.masked:
        content[MASKED] = arrays(upload.masked)
    if everything and upload.home.rows is not None:
        content[HOME] = arrays({ONLY: upload.home.rows})
    counts = {"loss": upload.loss, "steps": upload.steps, "images": upload.images, "dropped": upload.dropped}
    content[ABOUT] = note(client=upload.client, where=list(order.where), **counts)
    return content


def content_to_upload(content: RecordDict, client: int, where: tuple[int | str, ...]) -> Upload:
    """Raises ValueError where it is not of this client, or of another round, or not what an upload says."""
    told: Mapping[str, Any] = about(content)
    if told.get("client") != client:
        raise ValueError(f"it speaks for client {told.get('client')}")
    if told.get("where") != list(where):
        raise ValueError(f"it is of {' '.join(map(str, told.get('where') or ['no round']))}")
    loss, counts = told.get("loss"), [told.get(key) for key in ("steps", "images", "dropped")]
    if not isinstance(loss, float) or not all(type(n) is int for n in counts):
        raise ValueError("its loss or counts are not numbers")
    steps, images, dropped = counts
    clear, masked = tensors_of(content, SENT), tensors_of(content, MASKED)
    return Upload(client, clear, loss, steps, images, dropped, masked, Home(one_of(content, HOME)))  # type: ignore[arg-type]
