"""Model files of strangers (S1): pickles that would run code, and safetensors that are not what they say."""

from __future__ import annotations

import functools
import hashlib
import shutil
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

from fedgc.files import read_sealed, sha256, write_sealed
from tests.tiny import TINY
from tests.trust.abuses import ABUSES, Abuse
from tests.trust.cases import Case, command, refused, unwritten
from tests.trust.pickles import CANARY, PICKLES

STATE, COMMIT, CHECKPOINT = (
    "state/round-0002.safetensors",
    "state/round-0002.json",
    "checkpoints/round-0002.safetensors",
)
SMALL = tuple(word for setting in TINY for word in ("--set", setting))
LARGE = (
    "--data", "synthetic:24x6", "--set", "model.backbone=inception-resnet-v1", "--set", "model.embedding_size=512",
    "--set", "data.image_size=80", "--set", "model.norm=frozen",
)  # fmt: skip
UNCHECKED = {"TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}  # how PyTorch is told to run what a file says


@functools.cache
def _home() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="fedgc-trust-")


@functools.cache
def _finished() -> Path:
    """A finished run, trained once."""
    run = Path(_home().name) / "run"
    outcome = command("train", *SMALL, "--out", run)
    if outcome.code:
        raise RuntimeError(f"a run to do harm to could not be trained: {outcome.err}")
    return run


def _started_from(file: Path, settings: tuple[str, ...] = SMALL, names: tuple[str, ...] = ()) -> str | None:
    """train from that file is refused, and writes nothing."""
    out = file.parent / "out"
    outcome = command(
        "train", *settings, "--set", f"model.init={file}", "--out", out, inside=file.parent, environment=UNCHECKED
    )
    return refused(outcome, names=(file.name, *names)) or unwritten(out)


def _attacked(file: Path) -> str | None:
    """attack on that file is refused, and writes nothing."""
    outcome = command("attack", file, inside=file.parent)
    beside = [path.name for path in file.parent.iterdir() if path not in (file, file.parent / "out")]
    return refused(outcome, names=(file.name,)) or (f"wrote {beside[0]}" if beside else None)


def _evaluated(file: Path) -> str | None:
    """The file in the place of a run's last state, with the right hash beside it: evaluate refuses, and changes nothing."""
    run = file.parent / "run"
    shutil.copytree(_finished(), run)
    shutil.copy(file, run / STATE)
    write_sealed(run / COMMIT, {**read_sealed(run / COMMIT), "sha256": sha256(file)})
    before = _content(run)
    outcome = command("evaluate", run, inside=file.parent)
    changed = _content(run) != before
    return refused(outcome, names=(str(run), "no intact state")) or ("evaluate changed the run" if changed else None)


def _begun_with(file: Path) -> str | None:
    """The file in the place of the last checkpoint of a run that others start from."""
    run, out = file.parent / "run", file.parent / "out"
    shutil.copytree(_finished(), run)
    shutil.copy(file, run / CHECKPOINT)
    outcome = command(
        "train", *SMALL, "--set", "seed=7", "--set", f"model.init={run}", "--out", out, inside=file.parent
    )
    return refused(outcome, names=(str(run / CHECKPOINT),)) or unwritten(out)


def _content(run: Path) -> dict[str, str]:
    return {str(path): sha256(path) for path in sorted(run.rglob("*")) if path.is_file()}


def _published(file: Path) -> str | None:
    """As a publisher's weights, with the hash that the file really has: nothing but the restricted reader stands between."""
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return _started_from(file, (*LARGE, "--set", f"model.init_sha256={digest}"), ("not loaded",))


def _unvouched(file: Path) -> str | None:
    """As a publisher's weights, and nobody says what hash they have: refused before anything looks inside, with the hash."""
    return _started_from(file, LARGE, (sha256(file), "model.init_sha256"))


def _both(first: Callable[[Path], str | None], second: Callable[[Path], str | None], file: Path) -> str | None:
    return first(file) or second(file)


def _pickled(name: str, form: str, meets: Callable[[Path], str | None], folder: Path) -> str | None:
    """A file that creates ``canary`` when somebody unpickles it meets a command; it must not appear."""
    file = folder / "files" / name
    file.parent.mkdir()
    PICKLES[form](file, folder / CANARY)
    complaint = meets(file)
    return "the code in the file has run" if (folder / CANARY).exists() else complaint


def _abused(form: str, folder: Path) -> str | None:
    """A file that is no checkpoint, as the start of training, and then under attack."""
    file = folder / "files" / "hostile.safetensors"
    file.parent.mkdir()
    abuse: Abuse | None = ABUSES[form]
    complaint = None
    while abuse is not None and complaint is None:
        abuse.write(file)
        complaint = _started_from(file, names=abuse.says) or (None if abuse.a_checkpoint else _attacked(file))
        abuse = abuse.also
    return complaint


def _pickle(title: str, name: str, form: str, *meets: Callable[[Path], str | None]) -> Case:
    chain = meets[0] if len(meets) == 1 else partial(_both, *meets)
    return Case(title, partial(_pickled, name, form, chain))


MODELS = (
    _pickle("pickle: torch.save", "hostile.pt", "zip", _unvouched),
    _pickle("pickle: torch.save of old", "hostile.pt", "legacy", _published),
    _pickle("pickle: bare", "hostile.pth", "bare", _published),
    _pickle("pickle: torch.save named safetensors", "hostile.safetensors", "zip", _started_from, _attacked),
    _pickle(
        "pickle: torch.save of old named safetensors, as a run's state", "hostile.safetensors", "legacy", _evaluated
    ),
    _pickle("pickle: bare named safetensors, as a run's checkpoint", "hostile.safetensors", "bare", _begun_with),
    _pickle("pickle: in a state dict", "hostile.pth", "nested", _published),
    _pickle("pickle: compressed, as joblib writes", "hostile.pt", "gzip", _published),
    _pickle("pickle: NumPy array of objects", "hostile.npy", "npy", _started_from, _attacked),
    _pickle("pickle: NumPy archive of objects", "hostile.npz", "npz", _started_from, _attacked),
    _pickle("pickle: TorchScript", "hostile.pt", "torchscript", _published),
    _pickle("pickle: fallback trap", "hostile.pt", "trap", _published),
    *(Case(f"safetensors: {form}", partial(_abused, form)) for form in ABUSES),
)
