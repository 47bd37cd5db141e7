"""The run directory: what training leaves behind, and the only thing that later stages read."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedgc import __version__
from fedgc.canaries import Planting
from fedgc.errors import RunError, UsageError
from fedgc.files import (
    PRIVATE,
    holding,
    is_temporary,
    make_folder,
    read_json,
    read_tensors,
    remove,
    require_tensor,
    write_json,
    write_tensors,
    write_text,
    writing,
)
from fedgc.rounds import Rounds
from fedgc.threats import Knowledge
from fedgc.transcripts import pack_transcript, unpack_transcript
from fedgc.types import Canaries, Gallery, Transcript, Truth

SCHEMA = 1
SHARED_FOLDERS = ("checkpoints", "transcript", "attacks")
FACES = ("photos", "people")
UTILITY_DRAWS = "utility-draws.safetensors"
PRIVATE_FOLDERS = ("state", "private", "attacker")


class RunDirectory(Rounds):
    """Paths and formats of one run; see docs/run-directory.md."""

    # -- the run as a whole

    def create(self, config_toml: str) -> None:
        """The folders; `begin` makes it a run once everything that training does not write again is in them."""
        # first the configuration: by it a start that was cut off is known again
        write_text(make_folder(self.path) / "config.toml", config_toml)
        for name in SHARED_FOLDERS:
            make_folder(self.path / name)
        for name in PRIVATE_FOLDERS:
            make_folder(self.path / name, private=True)

    def begin(self, about: Mapping[str, Any]) -> None:
        header = {"schema": SCHEMA, "status": "running", "argv": sys.argv[1:], **provenance(), **about}
        write_json(self.path / "run.json", header)

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

    def finished_with(self, config_digest: str) -> bool:
        """Whether this very configuration was trained to its end."""
        if not self.exists:
            return False
        about = self.about()
        return about.get("config_digest") == config_digest and about["status"] == "finished"

    def update(self, **changes: Any) -> None:
        write_json(self.path / "run.json", {**self.about(), **changes})

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process and clear away what a killed one left half-written; a second holder is refused."""
        path = make_folder(self.path) / ".lock"
        with writing(path):
            file = open(path, "w")  # noqa: SIM115
        with file:
            with writing(path):
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise RunError(
                        f"{self.path} is in use by another process: wait for it, or choose another --out"
                    ) from None
            for folder in ("", *SHARED_FOLDERS, *PRIVATE_FOLDERS):
                for half in filter(is_temporary, (self.path / folder).glob(".*")):
                    remove(half)
            yield

    # -- transcripts, truth and what the attacker owns

    def save_transcript(self, name: str, transcript: Transcript) -> None:
        """What crossed the wire; what clients alone know of their own messages goes to a file of its own, owner-only."""
        if transcript.masked:
            own = {f"{k}/{n}": x for k, tensors in transcript.own.items() for n, x in tensors.items()}
            write_tensors(self._own(name), own, None, PRIVATE)
        write_tensors(self.path / "transcript" / f"{name}.safetensors", *pack_transcript(transcript))

    def load_transcript(self, name: str) -> Transcript:
        path = self.path / "transcript" / f"{name}.safetensors"
        with holding(path):
            transcript = unpack_transcript(*read_tensors(path))
        if not transcript.masked:
            return transcript
        own: dict[int, dict[str, Tensor]] = {}
        with holding(self._own(name)):
            for key, tensor in read_tensors(self._own(name))[0].items():
                client, parameter = key.split("/", 1)
                own.setdefault(int(client), {})[parameter] = tensor
        return replace(transcript, own=own)

    def _own(self, name: str) -> Path:
        return self.path / "attacker" / f"own-{name}.safetensors"

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
            clients = tuple(int(k) for k in about["clients"])
            images = require_tensor(tensors, "images", torch.uint8, len(clients), None, 3, None, None)
            labels = require_tensor(tensors, "labels", torch.int64, *images.shape[:2])
            return Truth(clients, images.float() / 255, labels)

    def save_knowledge(self, auxiliary: tuple[Tensor, Tensor], gallery: tuple[Tensor, Tensor]) -> None:
        """uint8 photos that attackers own, and a number for each person: of strangers, and of the gallery."""
        named = {
            "auxiliary": auxiliary[0],
            "auxiliary_people": auxiliary[1],
            "gallery": gallery[0],
            "people": gallery[1],
        }
        write_tensors(self.path / "attacker" / "knowledge.safetensors", named, None, PRIVATE)

    def load_knowledge(self) -> Knowledge:
        path = self.path / "attacker" / "knowledge.safetensors"
        with holding(path):
            tensors, _ = read_tensors(path)
            auxiliary = require_tensor(tensors, "auxiliary", torch.uint8, None, 3, None, None)
            people = "auxiliary_people"
            known = require_tensor(tensors, people, torch.int64, len(auxiliary)) if people in tensors else None
            return Knowledge(auxiliary.float() / 255, _gallery(tensors, "gallery", "people"), auxiliary_people=known)

    def save_bystanders(self, calibration: tuple[Tensor, Tensor], strangers: tuple[Tensor, Tensor]) -> None:
        """uint8 photos and numbers of people who are not trained on, for scoring alone: those whose comparisons set a judge's
        thresholds, and those who stand beside the trained ones where membership is guessed."""
        named = {"calibration": calibration, "strangers": strangers}
        tensors = {f"{who}/{what}": t for who, pair in named.items() for what, t in zip(FACES, pair, strict=True)}
        write_tensors(self.path / "private" / "bystanders.safetensors", tensors, None, PRIVATE)

    def load_bystanders(self) -> tuple[Gallery, Gallery]:
        """(calibration people, strangers)."""
        path = self.path / "private" / "bystanders.safetensors"
        if not path.exists():
            raise RunError(
                f"{path} is missing: {self.path} was written by an earlier version; train again to judge people"
            )
        with holding(path):
            tensors, _ = read_tensors(path)
            calibration, strangers = (
                _gallery(tensors, f"{who}/photos", f"{who}/people") for who in ("calibration", "strangers")
            )
            return calibration, strangers

    def save_canaries(self, planting: Planting) -> None:
        """The candidates where an attacker finds them, and which of them were put into training where scoring alone looks."""
        named = {"photos": planting.photos, "classes": planting.classes, "clients": planting.clients}
        write_tensors(self.path / "attacker" / "canaries.safetensors", named, None, PRIVATE)
        coins = {"inside": planting.inside.to(torch.uint8)}
        write_tensors(self.path / "private" / "canaries.safetensors", coins, None, PRIVATE)

    def load_canaries(self) -> Canaries | None:
        """None of a run that was trained without."""
        path = self.path / "attacker" / "canaries.safetensors"
        if not path.exists():
            return None
        with holding(path):
            tensors, _ = read_tensors(path)
            photos = require_tensor(tensors, "photos", torch.uint8, None, 3, None, None)
            classes, clients = (require_tensor(tensors, n, torch.int64, len(photos)) for n in ("classes", "clients"))
            return Canaries(photos.float() / 255, classes, clients)

    def load_coins(self) -> Tensor:
        """bool (m,): which candidates were trained on."""
        path = self.path / "private" / "canaries.safetensors"
        with holding(path):
            return require_tensor(read_tensors(path)[0], "inside", torch.uint8, None).bool()

    def save_utility_draws(self, draws: Mapping[str, Mapping[str, NDArray[np.float64]]]) -> None:
        """What each utility figure of each net is in each draw of test and calibration people, (draws,) each. Runs of one seed
        and the same people share their draws, so that a report can pair them; nothing of a person is in it."""
        tensors = {f"{net}/{name}": torch.from_numpy(x).float() for net, d in draws.items() for name, x in d.items()}
        write_tensors(self.path / UTILITY_DRAWS, tensors)

    def load_utility_draws(self) -> dict[str, NDArray[np.float64]]:
        """By "net/figure"; empty for a run of an earlier version."""
        path = self.path / UTILITY_DRAWS
        if not path.exists():
            return {}
        with holding(path):
            tensors, _ = read_tensors(path)
            return {name: require_tensor(tensors, name, torch.float32, None).double().numpy() for name in tensors}

    def save_identities(self, value: Mapping[str, Any]) -> None:
        """The private names: who class c is, and which person of the gallery."""
        write_json(self.path / "private" / "identities.json", value, PRIVATE)

    def load_identities(self) -> dict[str, Any]:
        path = self.path / "private" / "identities.json"
        with holding(path):
            return dict(read_json(path))


def _gallery(tensors: Mapping[str, Tensor], photos: str, people: str) -> Gallery:
    images = require_tensor(tensors, photos, torch.uint8, None, 3, None, None)
    return Gallery(images.float() / 255, require_tensor(tensors, people, torch.int64, len(images)))


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
    if run.path.exists() and any(p.name != ".lock" and not is_temporary(p) for p in run.path.iterdir()):
        raise UsageError(f"{run.path} is not empty and not a run directory: choose another --out")
