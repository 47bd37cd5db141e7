"""What a run needs to go on: state, metrics, privacy ledger and noise key of the rounds that are complete.

A round is complete when its ``state/round-NNNN.json`` exists; everything else of the round was written before it, so that
after a crash the last complete round is found by looking, and a half-written one is written again, byte for byte.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from fedgc.errors import RunError
from fedgc.files import (
    MALFORMED,
    PRIVATE,
    read_sealed,
    read_tensors,
    remove,
    sha256,
    write_sealed,
    write_tensors,
    write_text,
)
from fedgc.types import HEAD, Charge, ModelSpec, State

MOMENTUM = "momentum."  # of the server: in state files only, never in a checkpoint
PROBES = "probes."  # of a probing client: likewise
KEPT = "kept."  # by clients at home: likewise
KEYS = 2**256
ROUND = re.compile(r"round-([0-9]{4,9})\.json")


class Rounds:
    """The rounds of the run in the folder ``path``."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").exists()

    def save_round(self, state: State, metrics: Mapping[str, Any], spec: ModelSpec) -> None:
        """Checkpoint, state and metrics of a complete round; the JSON of the state is the commit."""
        t = state.round
        write_tensors(self.checkpoint_path(t), state.backbone, {"round": t, "spec": asdict(spec)})
        momentum = {MOMENTUM + name: tensor for name, tensor in state.momentum.items()}
        probes = {PROBES + name: tensor for name, tensor in state.probes.items()}
        kept = {KEPT + name: tensor for name, tensor in state.kept.items()}
        tensors = {**state.backbone, HEAD: state.rows, **momentum, **probes, **kept}
        digest = write_tensors(self._state(t, "safetensors"), tensors, {"round": t}, PRIVATE)
        ledger = [asdict(charge) for charge in state.ledger]
        commit = {"round": t, "sha256": digest, "metrics": dict(metrics), "ledger": ledger}
        write_sealed(self._state(t, "json"), commit, PRIVATE)
        self._write_metrics([*self._metrics_lines()[: t - 1], json.dumps(dict(metrics))])
        self._thin_out()

    def _thin_out(self) -> None:
        """Keep the tensors of the first and of the last two states."""
        for old in self.rounds()[1:-2]:
            remove(self._state(old, "safetensors"))

    def rounds(self) -> list[int]:
        """Those whose state is committed; a file of another name is none of them."""
        names = (ROUND.fullmatch(p.name) for p in (self.path / "state").glob("round-*.json"))
        return sorted(int(name[1]) for name in names if name)

    def last_round(self) -> int:
        return max(self.rounds(), default=0)

    def load_state(self, round: int | None = None) -> State | None:
        """The state after ``round``, or after the last complete round whose files are intact; None before the first."""
        for t in [round] if round is not None else reversed(self.rounds()):
            path = self._state(t, "safetensors")
            with suppress(RunError, OSError, *MALFORMED):
                commit = read_sealed(self._state(t, "json"))
                if sha256(path) != commit["sha256"]:
                    continue
                tensors, _ = read_tensors(path)
                rows = tensors.pop(HEAD)
                momentum, probes, kept = (_popped(tensors, prefix) for prefix in (MOMENTUM, PROBES, KEPT))
                ledger = ledger_of(commit["ledger"])
                return State(t, tensors, rows, ledger, momentum, probes, kept)
        return None

    def forget_after(self, round: int) -> None:
        """Drop what a crash left of later rounds, so that they are played again, and finish what it left undone of the others."""
        found = {}
        for line in self._metrics_lines():
            with suppress(*MALFORMED):
                found[json.loads(line)["round"]] = line
        for t in reversed(self.rounds()):
            if t > round:
                remove(self._state(t, "json"))
                continue
            with suppress(RunError, *MALFORMED):  # the line stands for a damaged commit of an earlier round
                found[t] = json.dumps(read_sealed(self._state(t, "json"))["metrics"])
        lines = [found[t] for t in range(1, round + 1) if t in found]
        if lines != self._metrics_lines():
            self._write_metrics(lines)
        self._thin_out()

    def metrics(self) -> list[dict[str, Any]]:
        """Of every complete round, in order. Raises RunError where a line is damaged."""
        try:
            lines = [json.loads(line) for line in self._metrics_lines()]
            return [{**line, "round": int(line["round"])} for line in lines]
        except MALFORMED as error:
            raise RunError(f"{self.path / 'metrics.jsonl'} is damaged ({error}); restore it or train again") from None

    def _metrics_lines(self) -> list[str]:
        path = self.path / "metrics.jsonl"
        return path.read_text(errors="replace").splitlines() if path.exists() else []

    def _write_metrics(self, lines: list[str]) -> None:
        write_text(self.path / "metrics.jsonl", "".join(f"{line}\n" for line in lines))

    def checkpoint_path(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:04d}.safetensors"

    def _state(self, round: int, suffix: str) -> Path:
        return self.path / "state" / f"round-{round:04d}.{suffix}"

    def noise_key(self, fixed: int | None) -> int:
        """The secret behind this run's noise: drawn once from the operating system, kept owner-only; or a fixed seed.

        It is drawn before the run begins. A run that lost it is refused (RunError): other noise on a round that was played
        already would be a second release that nobody accounts for.
        """
        if fixed is not None:
            return fixed
        path = self.path / "state" / "noise-key.json"
        if not path.exists() and not self.exists:
            write_sealed(path, int.from_bytes(os.urandom(32), "big"), PRIVATE)
        try:
            key = read_sealed(path)
            if type(key) is not int or not 0 <= key < KEYS:
                raise RunError(f"{path} holds no key")
            return key
        except RunError:
            raise RunError(
                f"{path} is lost or damaged: this run cannot go on without the noise it began with; train again"
            ) from None

    def charge(self, ledger: tuple[Charge, ...]) -> tuple[Charge, ...]:
        """Write privacy costs ahead of the release that causes them; returns all that this run was ever charged.

        ledger: every charge up to that release. A round replayed with the same noise is one release and is charged once; what
        differs is added. A ``privacy.json`` that was lost or damaged is made again: all it can have held beside ``ledger``
        is of rounds that a crash made undone, which are played, and charged, again.
        """
        path = self.path / "privacy.json"
        known: list[Charge] = []
        with suppress(RunError, *MALFORMED):
            known = list(ledger_of(read_sealed(path)))
        held = set(known)
        fresh = [charge for charge in ledger if charge not in held]
        if fresh:
            write_sealed(path, [asdict(charge) for charge in known + fresh])
        return tuple(known + fresh)


def ledger_of(told: Any) -> tuple[Charge, ...]:
    """Charges as they lie in a file. Raises ValueError, TypeError where one of them costs no number."""
    charges = tuple(Charge(**charge) for charge in told)
    for c in charges:
        counts, amounts = (c.client, c.round, c.steps, c.photos), (c.noise_multiplier, c.sample_rate)
        if any(type(n) is not int or n < 0 for n in counts):
            raise ValueError(f"{c} counts by what is no whole number")
        if not all(type(x) in (int, float) and 0 <= x < math.inf for x in amounts) or c.sample_rate > 1:
            raise ValueError(f"{c} is by numbers that no mechanism has")
    return charges


def _popped(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of that prefix, taken out and without it."""
    return {name.removeprefix(prefix): tensors.pop(name) for name in list(tensors) if name.startswith(prefix)}
