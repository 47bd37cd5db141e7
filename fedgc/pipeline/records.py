"""What earlier stages wrote of results, checked as it is read back: a run, an attack or a sweep may come from a stranger.

Values keep their place and form; what is checked is that each is of the kind that later stages count on, and that no name or
path leads elsewhere: the folder of an attack is where its summary was found, whatever the summary says.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from fedgc.errors import RunError
from fedgc.files import holding, read_json, read_tensors, require_tensor
from fedgc.runs import RunDirectory

Name = Annotated[
    str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,60}$")
]  # of an attack, a seat, a scheme: part of files' names
Inside = Annotated[str, Field(pattern=r"^[^/\\\x00-\x1f]{1,255}$")]  # a folder in a folder
Scalar = str | int | float | bool | None
SWEEP_FILE = "sweep.json"


class Checked(BaseModel):
    """Fields that are not named are kept as they are, and no later stage counts on them."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class Measured(Checked):
    """A figure with its interval, or why there is none."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    chance: float | None = None
    far: float | None = None
    ceiling: float | None = None
    exact: int | None = None
    delta: float | None = None
    note: str | None = None
    why: str | None = None
    claim: dict[str, Scalar] | None = None


Metrics = dict[str, Measured]


class Judged(Checked):
    name: str
    people: int
    auc: Measured
    thresholds: Metrics = {}


class Result(Checked):
    """What one attack found from one seat at one batch size. Samples: one flat row a target."""

    targets: Annotated[int, Field(ge=0)]
    seconds: float
    refused: str | None
    metrics: Metrics
    baselines: dict[str, Metrics]
    samples: list[dict[str, Scalar]]
    judge: Judged | None = None


class Summary(Result):
    """summary.json of an attack."""

    attack: Name
    threat: Name
    granted: list[str]
    round: Annotated[int, Field(ge=0)]
    rounds: list[int] = []
    batch_size: Annotated[int, Field(ge=1)] | None
    local_steps: Annotated[int, Field(ge=1)] = 1
    settings: dict[str, Any]
    failed: int = 0
    variants: dict[Annotated[str, Field(pattern=r"^[a-z_]+=[a-z0-9_]+(,[a-z_]+=[a-z0-9_]+)*$")], Result] = {}


class Verdict(Checked):
    """verdict-*.json of a judge."""

    judge: Judged
    metrics: Metrics
    baselines: dict[str, Metrics]
    similarity: list[float | None]


class Privacy(Checked):
    """The promise of a run; epsilon is absent where none can be stood by, and why."""

    epsilon: Annotated[float, Field(ge=0)] | None
    delta: Annotated[float, Field(gt=0, lt=1)]
    unit: str
    why: str | None = None
    target_epsilon: float | None = None
    epsilon_pld: float | None = None
    epsilon_identity: float | None = None
    profile: list[list[float]] | None = None


class Named(Checked):
    name: Name


class Trained(Checked):
    """run.json of a finished run."""

    algorithm: Name
    seed: int
    rounds: Annotated[int, Field(ge=1)]
    classes: Annotated[int, Field(ge=1)]
    images: Annotated[int, Field(ge=1)]
    source: str
    dataset: str
    people: dict[str, int]
    splits: dict[str, str]
    libraries: dict[str, str]
    argv: list[str]
    defense: Named
    utility: dict[str, Measured | int]
    baselines: dict[str, dict[str, Measured | int]]
    privacy: Privacy | None
    notes: list[str] = []
    seconds: float


class SweptCell(Checked):
    name: Inside


class FailedCell(Checked):
    cell: Inside
    algorithm: Name
    defense: Name
    epsilon: float | None
    seed: int
    error: str


class Sweep(Checked):
    cells: list[SweptCell]
    status: Literal["running", "finished", "failed"]
    failed: list[FailedCell] = []


def checked(kind: type[Checked], path: Path) -> dict[str, Any]:
    """The JSON document at ``path``. Raises RunError, with the first thing that is wrong, where it is not of that kind."""
    return valid(kind, read_json(path), path)


def valid(kind: type[Checked], told: Any, path: Path) -> dict[str, Any]:
    """What was read at ``path``, likewise."""
    try:
        kind.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "it"
        raise RunError(
            f"{path}: {where}: {first['msg']}: no result of this tool; restore it, or make it again"
        ) from None
    return dict(told)


def summary_of(folder: Path, run: Path) -> dict[str, Any]:
    """The summary in an attack's folder."""
    told = checked(Summary, folder / "summary.json")
    return {**told, "folder": str(folder.relative_to(run))} if "folder" in told else told


def trained(run: RunDirectory) -> dict[str, Any]:
    """run.json of a finished run, all of it checked."""
    return valid(Trained, run.finished(), run.path / "run.json")


def sweep_in(folder: Path) -> dict[str, Any] | None:
    """The record of a sweep, or None where there was none. Its cells are folders of that folder, and no links out of it."""
    if not (folder / SWEEP_FILE).exists():
        return None
    told = checked(Sweep, folder / SWEEP_FILE)
    for name in [cell["name"] for cell in told["cells"]] + [cell["cell"] for cell in told.get("failed", [])]:
        if name in (".", "..") or (folder / name).is_symlink():
            raise RunError(f"{folder / SWEEP_FILE}: the cell {name!r} is no folder of that sweep")
    return told


def pictures_in(folder: Path) -> tuple[Tensor, Tensor] | None:
    """(originals, found), float32 (n, 3, H, W), of an attack that rebuilt photos; None where it did not."""
    file = folder / "pictures.safetensors"
    if not file.exists():
        return None
    with holding(file):
        tensors, _ = read_tensors(file)
        originals = require_tensor(tensors, "originals", torch.float32, None, 3, None, None)
        return originals, require_tensor(tensors, "found", torch.float32, None, 3, *originals.shape[2:])


def pictures_of(run: Path) -> Callable[[dict[str, Any]], tuple[Tensor, Tensor] | None]:
    return lambda entry: pictures_in(run / entry["folder"]) if entry.get("folder") else None


def samples_of(run: Path) -> Callable[[dict[str, Any]], list[dict[str, Any]]]:
    """Rows of an entry's targets: in the entry, or, of attacks whose targets are people, in the owner-only samples.csv."""

    def samples(entry: dict[str, Any]) -> list[dict[str, Any]]:
        file = run / str(entry.get("folder", "")) / "samples.csv"
        if entry.get("samples") or not entry.get("folder") or not file.exists():
            return list(entry.get("samples") or ())
        try:
            with open(file, newline="", encoding="utf-8") as lines:
                return [
                    {name: read_cell(text) for name, text in row.items()} for row in csv.DictReader(lines, strict=True)
                ]
        except (csv.Error, ValueError, OSError) as error:
            raise RunError(f"{file} cannot be read as CSV ({error}): attack again with --force") from None

    return samples


def read_cell(text: Any) -> float | str | None:
    """What the text of a cell stands for: a number, a truth value as 0 or 1, nothing, or itself."""
    known: Mapping[Any, float | None] = {"": None, None: None, "True": 1.0, "False": 0.0}
    if isinstance(text, list) or text in known:
        return None if isinstance(text, list) else known[text]
    try:
        return float(text)
    except ValueError:
        return str(text)
