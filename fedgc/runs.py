"""The run directory: what training leaves behind, and the only thing that later stages read.

A round is complete when its ``state/round-NNNN.json`` exists; everything else of the round was written before it, so that
after a crash the last complete round is found by looking, and a half-written one is written again, byte for byte.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgc import __version__
from fedgc.errors import RunError, UsageError
from fedgc.files import (
    PRIVATE,
    make_folder,
    read_json,
    read_tensors,
    sha256,
    write_json,
    write_tensors,
    write_text,
)
from fedgc.transcripts import pack_transcript, unpack_transcript
from fedgc.types import (
    HEAD,
    Charge,
    Gallery,
    ModelSpec,
    State,
    Transcript,
    Truth,
)

SCHEMA = 1


class RunDirectory:
    """Paths and formats of one run; see docs/run-directory.md."""

    def __init__(self, path: Path) -> None:
        self.path = path

    # -- the run as a whole

    def create(self, config_toml: str) -> None:
        """The folders; `begin` makes it a run once everything that training does not write again is in them."""
        for name in ("checkpoints", "transcript", "attacks"):
            make_folder(self.path / name)
        for name in ("state", "private", "attacker"):
            make_folder(self.path / name, private=True)
        write_text(self.path / "config.toml", config_toml)

    def begin(self, about: Mapping[str, Any]) -> None:
        header = {"schema": SCHEMA, "status": "running", "argv": sys.argv[1:], **provenance(), **about}
        write_json(self.path / "run.json", header)

    @property
    def exists(self) -> bool:
        return (self.path / "run.json").exists()

    def about(self) -> dict[str, Any]:
        """run.json, checked. Raises RunError where it is missing, damaged or of another schema."""
        if not self.exists:
            raise RunError(
                f"{self.path} is not a run directory (no run.json); train one with `fedgc-priv train --out {self.path}`"
            )
        about = read_json(self.path / "run.json")
        if not isinstance(about, dict) or about.get("schema") != SCHEMA or "status" not in about:
            raise RunError(
                f"{self.path} was written with schema {about.get('schema') if isinstance(about, dict) else '?'}, this "
                f"version reads schema {SCHEMA}: use the version that wrote it, or train again"
            )
        return about

    def finished(self) -> dict[str, Any]:
        """run.json of a finished run; an unfinished one is an error that says how to go on."""
        about = self.about()
        if about["status"] != "finished":
            done = self.last_round()
            raise RunError(
                f"{self.path} stopped after round {done} of {about.get('rounds')}: continue with "
                f"`fedgc-priv train --out {self.path} --resume`"
            )
        return about

    def update(self, **changes: Any) -> None:
        write_json(self.path / "run.json", {**self.about(), **changes})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process; a second one is refused."""
        with open(make_folder(self.path) / ".lock", "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise RunError(
                    f"{self.path} is in use by another process: wait for it, or choose another --out"
                ) from None
            yield

    # -- state and metrics

    def save_round(self, state: State, metrics: Mapping[str, Any], spec: ModelSpec) -> None:
        """Checkpoint, state and metrics of a complete round; the JSON of the state is the commit."""
        t = state.round
        write_tensors(self.checkpoint_path(t), state.backbone, {"round": t, "spec": asdict(spec)})
        tensors = {**state.backbone, HEAD: state.rows}
        digest = write_tensors(self._state(t, "safetensors"), tensors, {"round": t}, PRIVATE)
        ledger = [asdict(charge) for charge in state.ledger]
        commit = {"round": t, "sha256": digest, "metrics": dict(metrics), "ledger": ledger}
        write_json(self._state(t, "json"), commit, PRIVATE)
        self._add_metrics(t, metrics)
        for old in self.rounds()[1:-2]:  # the first and the last two are kept whole
            self._state(old, "safetensors").unlink(missing_ok=True)

    def _add_metrics(self, round: int, metrics: Mapping[str, Any]) -> None:
        """One line more; all of them from the commits where a crash left the file short, or long."""
        path = self.path / "metrics.jsonl"
        lines = path.read_text().splitlines()[: round - 1] if path.exists() else []
        if len(lines) < round - 1:
            lines = [json.dumps(m) for m in self.metrics()[:-1]]
        write_text(path, "\n".join([*lines, json.dumps(dict(metrics))]) + "\n")

    def rounds(self) -> list[int]:
        return sorted(int(p.stem.removeprefix("round-")) for p in (self.path / "state").glob("round-*.json"))

    def last_round(self) -> int:
        return max(self.rounds(), default=0)

    def load_state(self, round: int | None = None) -> State | None:
        """The state after ``round``, or after the last complete round whose files are intact; None before the first."""
        for t in [round] if round is not None else reversed(self.rounds()):
            path = self._state(t, "safetensors")
            if not path.exists():
                continue
            try:
                commit = read_json(self._state(t, "json"))
            except RunError:
                continue
            if sha256(path) != commit["sha256"]:
                continue
            tensors, _ = read_tensors(path)
            rows = tensors.pop(HEAD)
            return State(t, tensors, rows, tuple(Charge(**charge) for charge in commit["ledger"]))
        return None

    def forget_after(self, round: int) -> None:
        """Drop what a crash left of later rounds, so that they are played again."""
        for t in self.rounds():
            if t > round:
                self._state(t, "json").unlink()

    def metrics(self) -> list[dict[str, Any]]:
        return [read_json(self._state(t, "json"))["metrics"] for t in self.rounds()]

    def checkpoint_path(self, round: int) -> Path:
        return self.path / "checkpoints" / f"round-{round:04d}.safetensors"

    def _state(self, round: int, suffix: str) -> Path:
        return self.path / "state" / f"round-{round:04d}.{suffix}"

    def noise_key(self, fixed: int | None) -> int:
        """The secret behind this run's noise: drawn once from the operating system, kept owner-only; or a fixed seed."""
        if fixed is not None:
            return fixed
        path = self.path / "state" / "noise-key.json"
        if not path.exists():
            if self.rounds():  # other noise on the same rounds would be a second release that nobody accounts for
                raise RunError(f"{path} is lost: this run cannot go on with the noise it began with; train again")
            write_json(path, int.from_bytes(os.urandom(32), "big"), PRIVATE)
        return int(read_json(path))

    def charge(self, charges: tuple[Charge, ...]) -> None:
        """Write privacy costs ahead of the release that causes them. A round replayed with the same noise is one release."""
        path = self.path / "privacy.json"
        known = read_json(path) if path.exists() else []
        fresh = [c for c in map(asdict, charges) if c not in known]
        if fresh:
            write_json(path, known + fresh)

    # -- transcripts, truth and what the attacker owns

    def save_transcript(self, name: str, transcript: Transcript) -> None:
        write_tensors(self.path / "transcript" / f"{name}.safetensors", *pack_transcript(transcript))

    def load_transcript(self, name: str) -> Transcript:
        path = self.path / "transcript" / f"{name}.safetensors"
        with holding(path):
            return unpack_transcript(*read_tensors(path))

    def transcripts(self) -> list[str]:
        return sorted(p.stem for p in (self.path / "transcript").glob("*.safetensors"))

    def save_truth(self, name: str, truth: Truth) -> None:
        tensors = {"images": (truth.images * 255).round().to(torch.uint8), "labels": truth.labels}
        path = self.path / "private" / f"{name}.safetensors"
        write_tensors(path, tensors, {"clients": truth.clients}, PRIVATE)

    def load_truth(self, name: str) -> Truth:
        path = self.path / "private" / f"{name}.safetensors"
        with holding(path):
            tensors, about = read_tensors(path)
            return Truth(tuple(about["clients"]), tensors["images"].float() / 255, tensors["labels"])

    def save_knowledge(self, auxiliary: Tensor, gallery: Tensor, people: Tensor) -> None:
        """uint8 photos that attackers own: strangers, and candidates with their number in the gallery."""
        tensors = {"auxiliary": auxiliary, "gallery": gallery, "people": people}
        write_tensors(self.path / "attacker" / "knowledge.safetensors", tensors, None, PRIVATE)

    def load_knowledge(self) -> tuple[Tensor, Gallery]:
        path = self.path / "attacker" / "knowledge.safetensors"
        with holding(path):
            tensors, _ = read_tensors(path)
            return tensors["auxiliary"].float() / 255, Gallery(tensors["gallery"].float() / 255, tensors["people"])

    def save_identities(self, value: Mapping[str, Any]) -> None:
        """The private names: who class c is, and which person of the gallery."""
        write_json(self.path / "private" / "identities.json", value, PRIVATE)

    def load_identities(self) -> dict[str, Any]:
        return dict(read_json(self.path / "private" / "identities.json"))


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Turn what reading a well-formed file of something else runs into, into an error that names the file."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{path} does not hold what its place in the run says ({error!r}): restore it or train again"
        ) from None


def provenance() -> dict[str, Any]:
    """Versions and machine behind a result."""
    libraries = ("torch", "opacus", "numpy", "scipy", "facenet-pytorch", "safetensors", "pillow")
    return {
        "tool": f"fedgc-priv {__version__}",
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "libraries": {name: metadata.version(name) for name in libraries},
    }


def require_new(run: RunDirectory, config_toml: str, digest: str) -> None:
    """A folder that holds something else is never written over; a start that was cut off is started again."""
    if run.exists:
        about = run.about()
        if about.get("config_digest") != digest:
            raise UsageError(
                f"{run.path} holds a run of another configuration: choose another --out, or delete it first"
            )
        raise RunError(
            f"{run.path} stopped after round {run.last_round()} of {about.get('rounds')}: add --resume to go on"
        )
    if run.path.exists() and not run.path.is_dir():
        raise UsageError(f"{run.path} is a file: --out needs a folder that does not exist yet")
    begun = run.path / "config.toml"
    if begun.exists() and begun.read_text() == config_toml:
        return
    if run.path.exists() and any(p.name != ".lock" for p in run.path.iterdir()):
        raise UsageError(f"{run.path} is not empty and not a run directory: choose another --out")
