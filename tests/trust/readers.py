"""Every reader of what strangers write, with a good input that is harmed: it returns something, or says why not, for users.

`READERS` is played by hypothesis (tests/test_readers.py) and by a coverage-guided fuzzer (tests/trust/fuzz.py).
"""

from __future__ import annotations

import hashlib
import json
import shutil
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

from fedgc.config import load_config, read_toml
from fedgc.data.folder import UnusableImageError, decode
from fedgc.data.pair_lists import read_pairs
from fedgc.data.prepared import PreparedFolder
from fedgc.errors import FedgcError
from fedgc.files import read_sealed, read_tensors, sha256
from fedgc.foreign import unpack_update
from fedgc.pipeline.grids import cells
from fedgc.pipeline.initial import read_initial
from fedgc.pipeline.reporting import failures, find_runs, load_result
from fedgc.runs import RunDirectory
from tests.tiny import TINY
from tests.trust.harms import (
    answer,
    answered,
    checkpoint,
    configured,
    gate,
    gated,
    good_run,
    gridded,
    harm_tensors,
    paired,
    pictured,
    prepared,
    tomled,
    updated,
)
from tests.trust.mutations import changed, text_of

REFUSALS = (FedgcError, UnusableImageError)


@dataclass(frozen=True)
class Reader:
    """put: lays a harmed input into an empty folder; read: what the product does with it."""

    name: str
    put: Callable[[Path, Random], Any]
    read: Callable[[Path], Any]

    def complaint(self, folder: Path, draw: Random) -> str | None:
        """What went wrong, in one line with the place in the code; None where the input was read, or refused as it should be."""
        self.put(folder, draw)
        try:
            self.read(folder)
        except REFUSALS as refusal:
            return None if str(refusal).strip() else f"{self.name}: refused without a word"
        except Exception as error:
            frames = [
                f
                for f in traceback.extract_tb(error.__traceback__)
                if "/fedgc/" in f.filename or "/eval/" in f.filename
            ]
            place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "?"
            return f"{self.name}: {type(error).__name__} at {place}: {ascii(str(error))[:160]}"
        return None


# -- files of a run


def _begun(folder: Path, *files: str) -> RunDirectory:
    """A folder with copies of some files of the good run, and run.json always."""
    for name in ("run.json", *files):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(good_run() / name, folder / name)
    return RunDirectory(folder)


def _tensors(name: str, read: Callable[[RunDirectory], Any], *beside: str) -> Reader:
    """Of a safetensors file of a run."""

    def put(folder: Path, draw: Random) -> None:
        _begun(folder, name, *beside)
        harm_tensors(folder / name, draw)

    return Reader(name, put, lambda folder: read(RunDirectory(folder)))


def _json(name: str, read: Callable[[RunDirectory], Any], *beside: str, sealed: bool = False) -> Reader:
    """Of a JSON file of a run; one with a seal gets the seal that its new content needs."""

    def put(folder: Path, draw: Random) -> None:
        _begun(folder, name, *beside)
        file = folder / name
        told = changed(read_sealed(file) if sealed else json.loads(file.read_text()), draw)
        _seal(file, told, draw) if sealed else file.write_bytes(text_of(told, draw))

    return Reader(name, put, lambda folder: read(RunDirectory(folder)))


def _seal(file: Path, told: Any, draw: Random) -> None:
    digest = hashlib.sha256(json.dumps(told).encode()).hexdigest()
    file.write_bytes(text_of({"sha256": digest, "content": told}, draw))


def _state(folder: Path, draw: Random) -> None:
    """A state with the hash beside it that it really has: who writes the one can write the other."""
    name = "state/round-0002"
    _begun(folder, f"{name}.safetensors", f"{name}.json")
    tensors, commit = folder / f"{name}.safetensors", folder / f"{name}.json"
    harm_tensors(tensors, draw)
    told = {**read_sealed(commit), "sha256": sha256(tensors)}
    _seal(commit, told if draw.randrange(3) else changed(told, draw), draw)


def _metrics(folder: Path, draw: Random) -> None:
    _begun(folder)
    lines = [json.loads(line) for line in (good_run() / "metrics.jsonl").read_text().splitlines()]
    told = [text_of(changed(line, draw) if draw.randrange(2) else line, draw) for line in lines]
    (folder / "metrics.jsonl").write_bytes(b"\n".join(told) + b"\n")


def put_result(folder: Path, draw: Random) -> None:
    """A whole run with its attacks, one JSON file of which is changed."""
    shutil.copytree(good_run(), folder / "run", ignore=shutil.ignore_patterns("state", "transcript", "checkpoints"))
    files = [*sorted(folder.glob("run/attacks/*/summary.json")), folder / "run/run.json"]
    file = draw.choice(files)
    file.write_bytes(text_of(changed(json.loads(file.read_text()), draw), draw))


def _sweep(folder: Path, draw: Random) -> None:
    told = {
        "cells": [{"name": "a", "config": "0123456789", "attacked": [[], [], [], None]}, {"name": "b", "config": "0"}],
        "status": "failed",
        "failed": [
            {"cell": "b", "algorithm": "fedgc", "defense": "none", "epsilon": None, "seed": 0, "error": "it broke"}
        ],
    }
    (folder / "sweep.json").write_bytes(text_of(changed(told, draw), draw))


def _swept(folder: Path) -> None:
    failures([folder])
    for run in find_runs([folder]):
        if not run.resolve().is_relative_to(folder.resolve()):
            raise AssertionError(f"a cell outside of the sweep: {run}")


def _begin(folder: Path) -> None:
    init = json.dumps(str(folder / "c.safetensors"))
    read_initial(load_config(settings=(*TINY, f"model.init={init}")))


def _transcript(run: RunDirectory) -> None:
    run.load_transcript(run.transcripts()[0])


STEP = "round-0002-step-b2-0"
READERS = (
    _json("run.json", lambda run: run.finished()),
    _json("state/noise-key.json", lambda run: run.noise_key(None), sealed=True),
    _json("privacy.json", lambda run: run.charge(()), sealed=True),
    _json("private/identities.json", lambda run: run.load_identities()),
    Reader("metrics.jsonl", _metrics, lambda folder: RunDirectory(folder).metrics()),
    Reader("state", _state, lambda folder: RunDirectory(folder).load_state()),
    _tensors("transcript/round-0002.safetensors", _transcript),
    _tensors(f"transcript/{STEP}.safetensors", _transcript),
    _tensors(f"private/{STEP}.safetensors", lambda run: run.load_truth(STEP)),
    _tensors("attacker/knowledge.safetensors", lambda run: run.load_knowledge()),
    _tensors("attacker/canaries.safetensors", lambda run: run.load_canaries()),
    _tensors("private/canaries.safetensors", lambda run: run.load_coins()),
    _tensors("private/bystanders.safetensors", lambda run: run.load_bystanders()),
    _tensors("utility-draws.safetensors", lambda run: run.load_utility_draws()),
    Reader("results of a run", put_result, lambda folder: load_result(folder / "run")),
    Reader("sweep.json", _sweep, _swept),
    Reader("configuration", configured, lambda folder: load_config(folder / "config.toml")),
    Reader("grid", gridded, lambda folder: cells(folder / "grid.toml")),
    Reader("update", updated, lambda folder: unpack_update(*read_tensors(folder / "u.safetensors"), "u")),
    Reader("checkpoint to start from", checkpoint, _begin),
    Reader("pair list", paired, lambda folder: read_pairs(folder / "pairs")),
    Reader("photo", pictured, lambda folder: decode((folder / "photo").read_bytes())),
    Reader("record of a prepared folder", prepared, lambda f: PreparedFolder(f, {"size": 32}).entries()),
    Reader("--fail-if", gated, gate),
    Reader("TOML", tomled, lambda folder: read_toml(folder / "x.toml")),
    Reader("answer of a node", answered, answer),
)
