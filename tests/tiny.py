"""The smallest run that has every part."""

from __future__ import annotations

from typing import NamedTuple

TINY = (
    "data.source=synthetic:24x6", "data.image_size=32", "federation.clients=2", "federation.rounds=2",
    "federation.local_epochs=1", "record.victims=2", "record.batch_sizes=[1, 2]", "model.embedding_size=32",
)  # fmt: skip


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
