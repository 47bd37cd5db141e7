"""Good inputs harmed, for the readers of `tests.trust.readers`: files that are no run's, and the run that theirs come from."""

from __future__ import annotations

import functools
import io
import shutil
import tempfile
import tomllib
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import tomli_w
import torch

from eval.gate import failing
from fedgc.config import load_config
from fedgc.files import MALFORMED, read_tensors, write_tensors
from fedgc.foreign import save_update
from fedgc.models import build_model, state_tensors
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.training import train
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


def harm_tensors(file: Path, draw: Random) -> None:
    """Bytes, or what they say, are changed."""
    if draw.randrange(5) == 0:
        file.write_bytes(damaged(file.read_bytes(), draw))
        return
    tensors, about = read_tensors(file)
    write_tensors(file, twisted(tensors, draw), about if draw.randrange(2) else changed(about, draw))


def configured(folder: Path, draw: Random) -> None:
    tree = changed(tomllib.loads((good_run() / "config.toml").read_text()), draw)
    _toml(folder / "config.toml", tree, draw)


def gridded(folder: Path, draw: Random) -> None:
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


def updated(folder: Path, draw: Random) -> None:
    tensors, about = _update()
    write_tensors(
        folder / "u.safetensors", twisted(tensors, draw), changed(about, draw) if draw.randrange(2) else about
    )
    if draw.randrange(6) == 0:
        (folder / "u.safetensors").write_bytes(damaged((folder / "u.safetensors").read_bytes(), draw))


def checkpoint(folder: Path, draw: Random) -> None:
    shutil.copy(good_run() / "checkpoints/round-0002.safetensors", folder / "c.safetensors")
    harm_tensors(folder / "c.safetensors", draw)


def pictured(folder: Path, draw: Random) -> None:
    kind = draw.choice(FORMATS)
    image = picture(draw.randrange(4)).convert(
        draw.choice(("RGB", "L") if kind in ("JPEG", "PPM", "WEBP") else ("RGB", "P", "1"))
    )
    data = encoded(image, kind)
    (folder / "photo").write_bytes(damaged(data, draw) if draw.randrange(20) else draw.randbytes(draw.randrange(300)))


def prepared(folder: Path, draw: Random) -> None:
    kept = {"file": "a/1.jpg", "sha256": "00", "output": "a/1.png"}
    dropped = {"file": "a/2.jpg", "sha256": None, "reason": "truncated or damaged"}
    told = {"schema": 1, "size": 32, "kept": [kept], "dropped": [dropped, {"file": "b", "reason": "x"}]}
    (folder / ".prepared.json").write_bytes(text_of(changed(told, draw), draw))
    lines = [{"schema": 1, "size": 32}, kept, dropped]
    journal = b"\n".join(text_of(changed(line, draw) if draw.randrange(3) == 0 else line, draw) for line in lines)
    (folder / ".prepared.jsonl").write_bytes(journal + b"\n")


def gated(folder: Path, draw: Random) -> None:
    gate = damaged(draw.choice(GATES).encode(), draw).decode(errors="replace")
    (folder / "gate").write_text(gate if draw.randrange(9) else str(strange(draw)), errors="replace", encoding="utf-8")


def gate(folder: Path) -> None:
    measured: Mapping[str, Any] = {"auc": {"value": 0.95, "low": None, "high": None}}
    entries = [{"attack": "membership-inference", "threat": "server", "metrics": measured, "refused": None},
               {"run": "x", "utility": measured}]  # fmt: skip
    failing((folder / "gate").read_text(encoding="utf-8"), entries)  # type: ignore[arg-type]


def paired(folder: Path, draw: Random) -> None:
    (folder / "pairs").write_bytes(damaged(PAIRS, draw))


def tomled(folder: Path, draw: Random) -> None:
    (folder / "x.toml").write_bytes(damaged(GRID.encode(), draw))


def answered(folder: Path, draw: Random) -> None:
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


def answer(folder: Path) -> None:
    from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
    from flwr.common.constant import SType

    from fedgc.pipeline.flower.wire import ABOUT, JSON, SENT, content_to_upload

    files = sorted(folder.glob("*.npy"))
    arrays = {f"x{i}": Array("float32", (1,), SType.NUMPY, f.read_bytes()) for i, f in enumerate(files)}
    told = ConfigRecord({JSON: (folder / "told").read_text(errors="replace")})
    content = RecordDict({SENT: ArrayRecord(arrays), ABOUT: told})
    with suppress(*MALFORMED):  # what the server goes on without
        content_to_upload(content, 0, ("round", 1))
