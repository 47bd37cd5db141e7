"""What a node remembers from round to round: in Flower's context, and in a folder of its own where it has one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from flwr.app import ConfigRecord, Context
from torch import Tensor

from fedgc.errors import UsageError
from fedgc.files import PRIVATE, make_folder, read_tensors, write_tensors
from fedgc.pipeline.flower.wire import ONLY, arrays, one_of
from fedgc.types import HEAD, Charge
from fedgc.uploads import Order

ROWS, UPLOADED, BEFORE, NOTES = "class-embeddings", "uploaded", "before-", "notes"
KEY, LEDGER, ORDERS, LAST = "noise-key", "ledger", "orders", "last"


class Memory:
    """Class embeddings, ledger and noise key of one node in one training. home: survives the node's process, owner-only; a
    context that is empty is filled from it."""

    def __init__(self, context: Context, home: Path | None = None) -> None:
        self.state, self.home = context.state, home
        if home is not None and NOTES not in self.state and (home / "memory.safetensors").exists():
            tensors, notes = read_tensors(home / "memory.safetensors")
            for name, tensor in tensors.items():
                self.state[name] = arrays({ONLY: tensor})
            self.state[NOTES] = ConfigRecord({"json": json.dumps(notes)})

    def notes(self) -> dict[str, object]:
        return dict(json.loads(str(self.state.config_records[NOTES]["json"]))) if NOTES in self.state else {}

    def rows(self, t: int) -> tuple[Tensor | None, Tensor | None]:
        """Class embeddings as kept and as uploaded last, before round ``t``: of one that is played again, as they were then."""
        again = BEFORE if self.notes().get(LAST) == t else ""
        return one_of(self.state, again + ROWS), one_of(self.state, again + UPLOADED)

    def keep(self, t: int, rows: Tensor | None, uploaded: Tensor | None, charge: Charge | None) -> None:
        """What round ``t`` leaves, on disk before it is sent."""
        for name, tensor, before in zip((ROWS, UPLOADED), (rows, uploaded), self.rows(t), strict=True):
            for key, x in ((name, tensor), (BEFORE + name, before)):
                if x is not None:
                    self.state[key] = arrays({ONLY: x})
        self._note(LAST, t)
        if charge is not None:
            paid = [c for c in self.ledger() if c != charge]  # a round that is played again draws the same noise
            self._note(LEDGER, [asdict(c) for c in (*paid, charge)])
        self._write()

    def ledger(self) -> list[Charge]:
        return [Charge(**c) for c in self.notes().get(LEDGER, [])]  # type: ignore[attr-defined]

    def require_same(self, order: Order) -> None:
        """Raises UsageError where this round was answered for other tensors before: the noise would be the same, and a server
        could subtract it."""
        digest, t = digest_of(order), str(order.where[1])
        asked = dict(self.notes().get(ORDERS, {}))  # type: ignore[call-overload]
        if asked.get(t, digest) != digest:
            raise UsageError(f"round {t} was answered before, for other weights: its noise is used up")
        self._note(ORDERS, {**asked, t: digest})
        self._write()

    def noise_key(self) -> int:
        """Drawn once from the operating system."""
        if KEY not in self.notes():
            self._note(KEY, str(int.from_bytes(os.urandom(32), "big")))
            self._write()
        return int(str(self.notes()[KEY]))

    def _note(self, name: str, value: object) -> None:
        self.state[NOTES] = ConfigRecord({"json": json.dumps({**self.notes(), name: value})})

    def _write(self) -> None:
        if self.home is None:
            return
        names = [before + name for before in ("", BEFORE) for name in (ROWS, UPLOADED)]
        tensors = {name: x for name in names if (x := one_of(self.state, name)) is not None}
        write_tensors(make_folder(self.home, private=True) / "memory.safetensors", tensors, self.notes(), PRIVATE)


def digest_of(order: Order) -> str:
    """SHA-256 of the tensors of an order."""
    digest = hashlib.sha256()
    rows = {} if order.rows is None else {HEAD: order.rows}
    for name, tensor in sorted({**order.backbone, **rows}.items()):
        digest.update(name.encode() + repr(tuple(tensor.shape)).encode())
        digest.update(tensor.contiguous().numpy().tobytes())
    return digest.hexdigest()


def key_of_secret(secret: str) -> int:
    """The noise key that clients share who share a secret."""
    return int.from_bytes(hashlib.sha256(secret.encode()).digest(), "big")
