"""Durable files: whole or absent, never half; owner-only where they hold faces or secrets."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor

from fedgc.errors import RunError, UsageError, WorkFailedError
from fedgc.limits import raise_if_short, require_room

PRIVATE = 0o600
SHARED = 0o644
TEMPORARY = ".tmp"
# what a well-formed file of something else makes its reader run into
MALFORMED = (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, RecursionError)


@contextmanager
def holding(path: Path) -> Iterator[None]:
    """Turn what reading a well-formed file of something else runs into, into an error that names the file."""
    try:
        yield
    except (*MALFORMED, UsageError) as error:
        why = " ".join(repr(error).split())[:300]
        raise RunError(
            f"{path} does not hold what its place in the run says ({why}): restore it or train again"
        ) from None


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn what the system says of a full, read-only or failing disk into one line that names the file."""
    try:
        yield
    except OSError as error:
        raise WorkFailedError(
            f"{path} could not be written ({error}); nothing in its place is half-written: put that right, then go on"
        ) from error


def make_folder(path: Path, private: bool = False) -> Path:
    with writing(path):
        path.mkdir(parents=True, exist_ok=True)
        if private:
            path.chmod(0o700)
    return path


def write_bytes(path: Path, data: bytes, mode: int = SHARED) -> None:
    """Temporary file in the same folder, flush, fsync, replace, fsync of the folder."""
    with writing(path):
        handle, name = tempfile.mkstemp(TEMPORARY, f".{path.name}.", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(name, mode)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def remove(path: Path) -> None:
    """Remove a file that may be gone already."""
    with writing(path):
        path.unlink(missing_ok=True)


def is_temporary(path: Path) -> bool:
    """A half-written file that a killed process left behind."""
    return path.name.startswith(".") and path.suffix == TEMPORARY


def _sync_folder(path: Path) -> None:
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def write_text(path: Path, text: str, mode: int = SHARED) -> None:
    write_bytes(path, text.encode(), mode)


def write_json(path: Path, value: Any, mode: int = SHARED) -> None:
    write_text(path, json.dumps(value, indent=1, allow_nan=False) + "\n", mode)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise RunError(f"{path} is missing: this is not a complete run directory") from None
    except (OSError, ValueError, RecursionError) as error:
        raise_if_short(error)
        raise RunError(f"{path} is damaged ({error}); restore it or train again") from None


def write_sealed(path: Path, value: Any, mode: int = SHARED) -> None:
    """JSON with its own SHA-256, where a changed digit would pass for another value."""
    write_json(path, {"sha256": _seal(value), "content": value}, mode)


def read_sealed(path: Path) -> Any:
    """What `write_sealed` wrote; raises RunError where it is missing or not that any more."""
    document = read_json(path)
    if not isinstance(document, dict) or document.get("sha256") != _seal(document.get("content")):
        raise RunError(f"{path} is damaged (its checksum does not hold); restore it or train again")
    return document["content"]


def _seal(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Any = None, mode: int = SHARED) -> str:
    """Write named tensors with a JSON description; returns the SHA-256 of the file."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    size = sum(tensor.nbytes for tensor in plain.values())
    require_room(size, size)  # safetensors has the bytes twice, and its Rust panics where it cannot
    data = safetensors.torch.save(plain, metadata={"about": json.dumps(about)})
    write_bytes(path, data, mode)
    return hashlib.sha256(data).hexdigest()


def read_tensors(path: Path) -> tuple[dict[str, Tensor], Any]:
    """Named tensors and their description. Only safetensors is read: such a file cannot carry code."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = (file.metadata() or {}).get("about")
        _require_each_once(path)
        return tensors, json.loads(about) if about else None
    except FileNotFoundError:
        raise RunError(f"{path} is missing: the run is incomplete, or this is not the file you meant") from None
    except (OSError, safetensors.SafetensorError, ValueError, RecursionError) as error:
        raise_if_short(error)
        raise RunError(f"{path} is not a readable safetensors file ({error}); no other format is loaded") from None


def _require_each_once(path: Path) -> None:
    """Raise ValueError where the header of a well-formed file names something twice: readers differ in which they take."""

    def once(pairs: list[tuple[str, Any]]) -> None:
        if len({name for name, _ in pairs}) < len(pairs):
            raise ValueError("its header names something twice")

    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")), object_pairs_hook=once)


def require_tensor(tensors: Mapping[str, Tensor], name: str, kind: torch.dtype, *shape: int | None) -> Tensor:
    """The tensor of that name; raises ValueError where it is of another kind or shape. None stands for any size."""
    tensor = tensors[name]
    fits = len(shape) == tensor.ndim and all(
        want in (None, have) for want, have in zip(shape, tensor.shape, strict=True)
    )
    if tensor.dtype != kind or not fits:
        due = ", ".join("any" if size is None else str(size) for size in shape)
        raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, and {kind} ({due}) is due")
    return tensor


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
