"""What a node remembers from round to round: in Flower's context, and in a folder of its own where it has one."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict
from pathlib import Path

from flwr.app import ConfigRecord, Context
from torch import Tensor

from fedgc.files import PRIVATE, make_folder, read_tensors, write_tensors
from fedgc.pipeline.flower.wire import ONLY, arrays, one_of
from fedgc.types import Charge

ROWS, UPLOADED, NOTES = "class-embeddings", "uploaded", "notes"
KEY, LEDGER = "noise-key", "ledger"


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

    def rows(self, name: str) -> Tensor | None:
        return one_of(self.state, name)

    def keep(self, rows: Tensor | None, uploaded: Tensor | None, charge: Charge | None) -> None:
        """What a round leaves, on disk before it is sent."""
        for name, tensor in ((ROWS, rows), (UPLOADED, uploaded)):
            if tensor is not None:
                self.state[name] = arrays({ONLY: tensor})
        if charge is not None:
            paid = [c for c in self.ledger() if c != charge]  # a round that is played again draws the same noise
            self._note(LEDGER, [asdict(c) for c in (*paid, charge)])
        self._write()

    def ledger(self) -> list[Charge]:
        return [Charge(**c) for c in self.notes().get(LEDGER, [])]  # type: ignore[attr-defined]

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
        tensors = {name: x for name in (ROWS, UPLOADED) if (x := self.rows(name)) is not None}
        write_tensors(make_folder(self.home, private=True) / "memory.safetensors", tensors, self.notes(), PRIVATE)


def key_of_secret(secret: str) -> int:
    """The noise key that clients share who share a secret."""
    return int.from_bytes(hashlib.sha256(secret.encode()).digest(), "big")
