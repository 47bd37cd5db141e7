"""Every reader of what strangers write, with a good input to harm: it returns something, or says why not in words for users.

`READERS` is played by hypothesis (tests/test_readers.py) and by a coverage-guided fuzzer (tests/trust/fuzz.py).
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import shutil
import tempfile
import tomllib
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tomli_w
import torch

from eval.gate import failing
from fedgc.config import load_config, read_toml
from fedgc.data.folder import UnusableImageError, decode
from fedgc.data.pair_lists import read_pairs
from fedgc.data.prepared import PreparedFolder
from fedgc.errors import FedgcError
from fedgc.files import MALFORMED, read_sealed, read_tensors, sha256, write_tensors
from fedgc.foreign import save_update, unpack_update
from fedgc.models import build_model, state_tensors
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.grids import cells
from fedgc.pipeline.initial import read_initial
from fedgc.pipeline.reporting import failures, find_runs, load_result
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from fedgc.types import HEAD, ModelSpec
from tests.pictures import encoded, picture
from tests.tiny import TINY
from tests.trust.mutations import changed, damaged, strange, text_of, twisted

FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "PPM", "GIF", "TIFF")
PAIRS = b"2\t2\nAda\t1\t2\nBob\t1\t3\nAda\t1\tBob\t2\nBob\t1\tEve\t1\nAda\t1\t2\nBob\t2\t3\nAda\t2\tBob\t2\nBob\t1\tEve\t1\n"
GRID = """seed = 3
[sweep]
seeds = 2
attacks = ["label-inference"]
threats = ["server"]
targets = 2
settings = ["gradient-inversion.iterations=3"]
[sweep.over]
"federation.algorithm" = ["fedavg", "fedgc"]
"defense.epsilon" = ["none", 8]
"""
GATES = ("membership-inference@server.auc > 0.9", "utility.auc < 0.8")
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


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fedgc-readers-")


@functools.cache
def good_run() -> Path:
    """A finished run with canaries and a few attacks, made once."""
    run = Path(_home().name) / "run"
    train(load_config(settings=(*TINY, "audit.canaries=6", "defense.name=dp-sgd", "defense.noise_multiplier=1")), run)
    attack(run, ["label-inference", "membership-inference", "gradient-inversion"], ["server"], targets=1,
           settings=["gradient-inversion.iterations=1"])  # fmt: skip
    return run


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
        _harm(folder / name, draw)

    return Reader(name, put, lambda folder: read(RunDirectory(folder)))


def _harm(file: Path, draw: Random) -> None:
    """Bytes, or what they say, are changed."""
    if draw.randrange(5) == 0:
        file.write_bytes(damaged(file.read_bytes(), draw))
        return
    tensors, about = read_tensors(file)
    write_tensors(file, twisted(tensors, draw), about if draw.randrange(2) else changed(about, draw))


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
    _harm(tensors, draw)
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


# -- other files


def _configured(folder: Path, draw: Random) -> None:
    tree = changed(tomllib.loads((good_run() / "config.toml").read_text()), draw)
    _toml(folder / "config.toml", tree, draw)


def _gridded(folder: Path, draw: Random) -> None:
    _toml(folder / "grid.toml", changed(tomllib.loads(GRID), draw), draw)


def _toml(file: Path, tree: Any, draw: Random) -> None:
    """What TOML cannot say is said as text."""
    try:
        text = tomli_w.dumps(tree).encode(errors="surrogatepass")
    except (TypeError, ValueError, AttributeError, RecursionError):
        text = repr(tree).encode(errors="surrogatepass")
    file.write_bytes(damaged(text, draw) if draw.randrange(4) == 0 else text)


@functools.cache
def _update() -> tuple[dict[str, torch.Tensor], Any]:
    spec = ModelSpec("small", "group", 32, 32, "none", 0.0, 16.0)
    model = build_model(spec, 3, 0)
    before = {name: t.clone() for name, t in state_tensors(model).items()} | {HEAD: torch.ones(3, 32)}
    after = {name: t + 0.01 for name, t in before.items()}
    file = Path(_home().name) / "update.safetensors"
    save_update(file, before, after, spec, lr=0.1, batch_size=2, classes=(4, 5, 9))
    return read_tensors(file)


def _updated(folder: Path, draw: Random) -> None:
    tensors, about = _update()
    write_tensors(
        folder / "u.safetensors", twisted(tensors, draw), changed(about, draw) if draw.randrange(2) else about
    )
    if draw.randrange(6) == 0:
        (folder / "u.safetensors").write_bytes(damaged((folder / "u.safetensors").read_bytes(), draw))


def _checkpoint(folder: Path, draw: Random) -> None:
    shutil.copy(good_run() / "checkpoints/round-0002.safetensors", folder / "c.safetensors")
    _harm(folder / "c.safetensors", draw)


def _pictured(folder: Path, draw: Random) -> None:
    kind = draw.choice(FORMATS)
    image = picture(draw.randrange(4)).convert(
        draw.choice(("RGB", "L") if kind in ("JPEG", "PPM", "WEBP") else ("RGB", "P", "1"))
    )
    data = encoded(image, kind)
    (folder / "photo").write_bytes(damaged(data, draw) if draw.randrange(20) else draw.randbytes(draw.randrange(300)))


def _prepared(folder: Path, draw: Random) -> None:
    kept = {"file": "a/1.jpg", "sha256": "00", "output": "a/1.png"}
    dropped = {"file": "a/2.jpg", "sha256": None, "reason": "truncated or damaged"}
    told = {"schema": 1, "size": 32, "kept": [kept], "dropped": [dropped, {"file": "b", "reason": "x"}]}
    (folder / ".prepared.json").write_bytes(text_of(changed(told, draw), draw))
    lines = [{"schema": 1, "size": 32}, kept, dropped]
    journal = b"\n".join(text_of(changed(line, draw) if draw.randrange(3) == 0 else line, draw) for line in lines)
    (folder / ".prepared.jsonl").write_bytes(journal + b"\n")


def _gated(folder: Path, draw: Random) -> None:
    gate = damaged(draw.choice(GATES).encode(), draw).decode(errors="replace")
    (folder / "gate").write_text(gate if draw.randrange(9) else str(strange(draw)), errors="replace", encoding="utf-8")


def _gate(folder: Path) -> None:
    measured: Mapping[str, Any] = {"auc": {"value": 0.95, "low": None, "high": None}}
    entries = [{"attack": "membership-inference", "threat": "server", "metrics": measured, "refused": None},
               {"run": "x", "utility": measured}]  # fmt: skip
    failing((folder / "gate").read_text(encoding="utf-8"), entries)  # type: ignore[arg-type]


def _tomled(folder: Path, draw: Random) -> None:
    (folder / "x.toml").write_bytes(damaged(GRID.encode(), draw))


def _answered(folder: Path, draw: Random) -> None:
    """What a node sends back, its arrays as NumPy writes them and its text as JSON."""
    told = {"client": 0, "where": ["round", 1], "loss": 0.5, "steps": 2, "images": 8, "dropped": 0}
    (folder / "told").write_bytes(text_of(changed(told, draw) if draw.randrange(2) else told, draw))
    tensors = {"backbone.x": torch.ones(2, 3), "head.weight": torch.ones(4, 3)}
    for number, tensor in enumerate((twisted(tensors, draw) if draw.randrange(2) else tensors).values()):
        stream = io.BytesIO()
        np.save(stream, tensor.float().numpy() if tensor.dtype == torch.bfloat16 else tensor.numpy())
        data = stream.getvalue()
        lies = (data, damaged(data, draw), data.replace(b"(2, 3)", b"(9" + b"9" * 12 + b",)"), b"PK\3\4" + data)
        (folder / f"{number}.npy").write_bytes(draw.choice(lies))


def _answer(folder: Path) -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
    from flwr.common.constant import SType

    from fedgc.pipeline.flower.wire import ABOUT, JSON, SENT, content_to_upload

    files = sorted(folder.glob("*.npy"))
    arrays = {f"x{i}": Array("float32", (1,), SType.NUMPY, f.read_bytes()) for i, f in enumerate(files)}
    told = ConfigRecord({JSON: (folder / "told").read_text(errors="replace")})
    content = RecordDict({SENT: ArrayRecord(arrays), ABOUT: told})
    with suppress(*MALFORMED):  # what the server goes on without
        content_to_upload(content, 0, ("round", 1))


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
    Reader("configuration", _configured, lambda folder: load_config(folder / "config.toml")),
    Reader("grid", _gridded, lambda folder: cells(folder / "grid.toml")),
    Reader("update", _updated, lambda folder: unpack_update(*read_tensors(folder / "u.safetensors"), "u")),
    Reader("checkpoint to start from", _checkpoint, _begin),
    Reader(
        "pair list", lambda f, draw: (f / "pairs").write_bytes(damaged(PAIRS, draw)), lambda f: read_pairs(f / "pairs")
    ),
    Reader("photo", _pictured, lambda folder: decode((folder / "photo").read_bytes())),
    Reader("record of a prepared folder", _prepared, lambda f: PreparedFolder(f, {"size": 32}).entries()),
    Reader("--fail-if", _gated, _gate),
    Reader("TOML", _tomled, lambda folder: read_toml(folder / "x.toml")),
    Reader("answer of a node", _answered, _answer),
)
