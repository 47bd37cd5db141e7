"""How a transcript is laid out as named tensors and a JSON header; see docs/run-directory.md."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

from torch import Tensor

from fedgc.types import HEAD, ClientUpdate, LocalConstants, ModelSpec, Transcript

STEP = re.compile(r"-step-b(?P<batch>\d+)-(k(?P<steps>\d+)-)?\d+$")


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
    """The inverse of `dataclasses.asdict`."""
    return LocalConstants(**{**told, "spec": ModelSpec(**told["spec"])})


def unpack_transcript(tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> Transcript:
    shared: dict[str, dict[str, Tensor]] = {"broadcast": {}, "released": {}, "carried": {}, "summed": {}}
    private: dict[str, dict[int, dict[str, Tensor]]] = {"sent": {}, "returned": {}, "updates": {}}
    for key, tensor in tensors.items():
        place, rest = key.split("/", 1)
        if place in shared:
            shared[place][rest] = tensor
        else:
            client, name = rest.split("/", 1)
            private[place].setdefault(int(client), {})[name] = tensor
    examples = {int(k): n for k, n in about["examples"].items()}
    return Transcript(
        algorithm=about["algorithm"], round=about["round"], kind=about["kind"], constants=read_constants(about["constants"]),
        broadcast=shared["broadcast"], released=shared["released"], carried=shared["carried"], summed=shared["summed"],
        updates={k: ClientUpdate(k, u, examples[k]) for k, u in private["updates"].items()},
        rows={int(k): tuple(v) for k, v in about["rows"].items()}, owners=tuple(about["owners"]),
        examples=examples, prober=about.get("prober"), masked=about.get("masked", False), sent=private["sent"],
        returned=private["returned"],
    )  # fmt: skip
