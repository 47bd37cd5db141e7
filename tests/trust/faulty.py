"""A disk that fails at one write, what must be readable whatever failed, and what must be equal in the end."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path
from typing import Any

from fedgc.files import read_tensors
from fedgc.pipeline.evaluation import document
from fedgc.runs import RunDirectory

FAULTS = (("fdopen", errno.ENOSPC), ("fsync", errno.EIO), ("replace", errno.ENOSPC), ("chmod", errno.EROFS))


def same(run: Path, other: Path) -> None:
    """Bit-identical weights and messages, the same ledger, epsilon, utility and metrics; nothing left half-written."""
    for folder in ("checkpoints", "transcript", "private", "attacker"):
        names = sorted(p.name for p in (other / folder).iterdir())
        assert sorted(p.name for p in (run / folder).iterdir()) == names
        assert all((run / folder / n).read_bytes() == (other / folder / n).read_bytes() for n in names)
    states = sorted(p.name for p in (other / "state").glob("*.safetensors"))
    assert sorted(p.name for p in (run / "state").glob("*.safetensors")) == states
    assert all((run / "state" / n).read_bytes() == (other / "state" / n).read_bytes() for n in states)
    assert (run / "privacy.json").read_bytes() == (other / "privacy.json").read_bytes()
    a, b = (document(RunDirectory(path)) for path in (run, other))
    assert (a["privacy"], a["utility"]) == (b["privacy"], b["utility"])
    a, b = ([{**m, "seconds": 0} for m in RunDirectory(path).metrics()] for path in (run, other))
    assert a == b
    assert not list(run.rglob(".*.tmp"))


def readable(run: Path) -> None:
    """Whatever failed, what was complete before can be read."""
    directory = RunDirectory(run)
    last = directory.last_round()
    state = directory.load_state()
    assert (state.round if state else 0) == last
    for t in range(1, last + 1):
        assert read_tensors(directory.checkpoint_path(t))
    if (run / "metrics.jsonl").exists():
        lines = (run / "metrics.jsonl").read_text().split("\n")
        assert [json.loads(line)["round"] for line in lines[:-1]] == list(range(1, len(lines)))
        assert lines[-1] == ""


class Faulty:
    """The module os, one call of which fails at its n-th use and ever after."""

    def __init__(self, call: str, after: int, number: int) -> None:
        self.call, self.left, self.number = call, after, number

    def __getattr__(self, name: str) -> Any:
        if name == self.call:
            self.left -= 1
            if self.left < 0:
                raise OSError(self.number, os.strerror(self.number))
        return getattr(os, name)
