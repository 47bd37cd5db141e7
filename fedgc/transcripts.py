"""How a transcript is laid out as named tensors and a JSON header; see docs/run-directory.md."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter
from torch import Tensor

from fedgc.algorithms import ALGORITHMS
from fedgc.models import checked_spec, endless
from fedgc.types import HEAD, ClientUpdate, LocalConstants, Tensors, Transcript

SHARED = ("broadcast", "released", "carried", "summed")
CONSTANTS = TypeAdapter(LocalConstants)
STEP = re.compile(r"-step-b(?P<batch>\d+)-(k(?P<steps>\d+)-)?\d+$")


class Header(BaseModel):
    """What stands beside the tensors of a transcript."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)
    algorithm: str
    round: int = Field(ge=1)
    kind: Literal["round", "step"]
    rows: dict[int, tuple[int, ...]]
    owners: tuple[int, ...]
    examples: dict[int, int]
    prober: int | None = None
    masked: bool = False


def transcript_name(round: int, batch: int | None = None, number: int = 0, steps: int = 1) -> str:
    """round-0010; round-0010-step-b4-0 for a recorded single step, round-0010-step-b4-k5-0 for five local steps."""
    if batch is None:
        return f"round-{round:04d}"
    return f"round-{round:04d}-step-b{batch}-" + (f"k{steps}-" if steps > 1 else "") + str(number)


def round_of(name: str) -> int:
    """The round of a transcript of that name."""
    return int(name.split("-")[1])


def step_of(name: str) -> str:
    """What names a recorded step in every round ("b4-0" of "round-0002-step-b4-0"); empty for a whole round."""
    return name.partition("-step-")[2]


def size_of(name: str) -> tuple[int, int] | None:
    """(photos, local steps) behind each update of a recorded step of that name; None for a whole round."""
    found = STEP.search(name)
    return None if found is None else (int(found["batch"]), int(found["steps"] or 1))


def rows_read(t: Transcript, read: Callable[[Tensor], Tensor]) -> Transcript:
    """The transcript with class embeddings, and changes of them, as ``read`` makes of what was on the wire."""
    opened = lambda tensors: {n: read(x) if n == HEAD else x for n, x in tensors.items()}  # noqa: E731
    return replace(
        t,
        sent={k: opened(message) for k, message in t.sent.items()},
        updates={k: replace(u, tensors=opened(u.tensors)) for k, u in t.updates.items()},
        returned={k: opened(message) for k, message in t.returned.items()},
    )


def pack_transcript(t: Transcript) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All but ``own``, which never crossed the wire."""
    tensors = {f"broadcast/{name}": x for name, x in t.broadcast.items()}
    tensors |= {f"released/{name}": x for name, x in t.released.items()}
    tensors |= {f"carried/{name}": x for name, x in t.carried.items()}
    tensors |= {f"summed/{name}": x for name, x in t.summed.items()}
    for place, messages in (("sent", t.sent), ("returned", t.returned)):
        tensors |= {f"{place}/{k}/{name}": x for k, message in messages.items() for name, x in message.items()}
    tensors |= {f"updates/{k}/{name}": x for k, u in t.updates.items() for name, x in u.tensors.items()}
    about = {
        "algorithm": t.algorithm, "round": t.round, "kind": t.kind, "constants": asdict(t.constants),
        "rows": {str(k): list(v) for k, v in t.rows.items()}, "owners": list(t.owners),
        "examples": {str(k): n for k, n in t.examples.items()}, "prober": t.prober,
        "masked": t.masked,
    }  # fmt: skip
    return tensors, about


def read_constants(told: Mapping[str, Any]) -> LocalConstants:
    """The inverse of `dataclasses.asdict`. Raises ValueError, TypeError where it is not that, UsageError for no such network."""
    spec = checked_spec(told["spec"], "public constants")
    constants = LocalConstants(**{**CONSTANTS.validate_python(told).__dict__, "spec": spec})
    if told.keys() - constants.__dict__.keys():
        raise ValueError(f"public constants know no {min(told.keys() - constants.__dict__.keys())}")
    amounts = (constants.lr, constants.head_lr_factor, constants.momentum, constants.weight_decay, constants.server_lr)
    if not all(0 <= x < math.inf for x in amounts) or constants.batch_size < 1 or (constants.steps or 1) < 1:
        raise ValueError("public constants are not those of any training")
    return constants


def unpack_transcript(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Transcript:
    """The inverse of `pack_transcript`. Raises KeyError, TypeError, ValueError for what it would not have packed: nothing that
    an attack reads is of another kind, shape or owner than its name says, and all of it is finite."""
    transcript = _unpacked(tensors, Header.model_validate(about), about)
    _require_known(transcript)
    for place, message, rows in _messages(transcript):
        _require_message(place, message, rows, transcript)
    return transcript


def _unpacked(tensors: Mapping[str, Tensor], told: Header, about: Mapping[str, Any]) -> Transcript:
    shared: dict[str, dict[str, Tensor]] = {place: {} for place in SHARED}
    private: dict[str, dict[int, dict[str, Tensor]]] = {"sent": {}, "returned": {}, "updates": {}}
    for key, tensor in tensors.items():
        place, rest = key.split("/", 1)
        if place in shared:
            shared[place][rest] = tensor
        else:
            client, name = rest.split("/", 1)
            private[place].setdefault(int(client), {})[name] = tensor
    examples = told.examples
    return Transcript(
        algorithm=told.algorithm, round=told.round, kind=told.kind, constants=read_constants(about["constants"]),
        broadcast=shared["broadcast"], released=shared["released"], carried=shared["carried"], summed=shared["summed"],
        updates={k: ClientUpdate(k, u, examples[k]) for k, u in private["updates"].items()},
        rows=told.rows, owners=told.owners, examples=examples, prober=told.prober, masked=told.masked,
        sent=private["sent"], returned=private["returned"],
    )  # fmt: skip


def _require_known(t: Transcript) -> None:
    """Clients are those who took part or own a class, and classes those that somebody owns."""
    if t.algorithm not in ALGORITHMS:
        raise ValueError(f"no algorithm {t.algorithm!r}")
    if not t.examples or min(t.examples.values()) < 0 or sum(t.examples.values()) < 1:
        raise ValueError("nobody took part")
    if strangers := (t.sent.keys() | t.updates.keys() | t.returned.keys() | t.rows.keys()) - {*t.owners, *t.examples}:
        raise ValueError(f"client {min(strangers)} owns no class and took no part")
    if any(not 0 <= c < len(t.owners) for rows in t.rows.values() for c in rows):
        raise ValueError("a row is of no class")


def _messages(t: Transcript) -> Iterator[tuple[str, Tensors, int | None]]:
    """Each message with its name, and how many class embeddings it may hold; None for all classes."""
    for place in SHARED:
        yield place, getattr(t, place), None
    for place, messages in (("sent", t.sent), ("returned", t.returned)):
        yield from ((f"{place}/{k}", message, len(t.rows.get(k, ()))) for k, message in messages.items())
    yield from ((f"updates/{k}", u.tensors, len(t.rows.get(k, ()))) for k, u in t.updates.items())


def _require_message(place: str, message: Tensors, rows: int | None, t: Transcript) -> None:
    for name, tensor in message.items():
        known = t.broadcast.get(name)
        head = (len(t.owners) if rows is None else rows, t.constants.spec.embedding_size)
        shape = head if name == HEAD else known.shape if known is not None else None
        if shape is None or tuple(tensor.shape) != tuple(shape):
            raise ValueError(f"{place}/{name} is {tuple(tensor.shape)}, and {shape and tuple(shape)} is due")
        if not tensor.is_floating_point() or (known is not None and tensor.dtype != known.dtype):
            raise ValueError(f"{place}/{name} is {tensor.dtype}")
    if (bad := endless(message)) is not None:
        raise ValueError(f"{place}/{bad} is not finite")
