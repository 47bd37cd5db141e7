"""report: finished runs and their attacks become a page. Reads results only."""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from eval.gate import failing, unjudged
from eval.report import build
from eval.results import Failure, RunResult
from fedgc.config import read_toml
from fedgc.errors import GateError, RunError
from fedgc.files import read_json, read_tensors
from fedgc.pipeline.verdicts import with_verdict
from fedgc.pipeline.watch import Watch, silent
from fedgc.runs import RunDirectory

SWEEP_FILE = "sweep.json"


def report(
    paths: Sequence[Path], out: Path, *, originals: bool = True, commands: Sequence[str] = (), watch: Watch = silent
) -> dict[str, Any]:
    """Write the report folder; returns its summary, with the path of the page under "report" and cells without a
    result under "failed"."""
    runs = [load_result(path) for path in find_runs(paths)]
    watch("writing the report", 0, 1)
    failed = failures(paths)
    known = [
        Failure(f["run"], *(f[key] for key in ("algorithm", "defense", "epsilon", "seed", "error"))) for f in failed
    ]
    summary = build(runs, out, originals=originals, commands=commands, failures=known)
    watch("writing the report", 1, 1)
    return {**summary, "failed": failed, "report": str(out / "report.html")}


def check_gates(paths: Sequence[Path], expressions: Sequence[str]) -> list[str]:
    """Raise GateError naming every ``--fail-if`` expression that is true of these runs.

    Returns a line for each result that a gate names and that was refused or has no value: it trips nothing, and says nothing.
    """
    runs = [load_result(path) for path in find_runs(paths)]
    entries = [entry for run in runs for entry in [*run.attacks, {"run": run.path, "utility": run.about["utility"]}]]
    tripped = [message for expression in expressions for message in failing(expression, entries)]
    if tripped:
        raise GateError("; ".join(tripped))
    return [line for expression in expressions for line in unjudged(expression, entries)]


def find_runs(paths: Sequence[Path]) -> list[Path]:
    """The runs themselves, and those inside folders of runs; of a sweep in the order of its grid, without cells that failed."""
    found = []
    for path in paths:
        inside = _cells_of(path) or sorted(p.parent for p in path.glob("*/run.json"))
        if (path / "run.json").exists() or not inside:
            RunDirectory(path).about()
            found.append(path)
        else:
            found += inside
    if not found:
        raise RunError("no run to report: give run directories, or a folder that holds some")
    return found


def _cells_of(path: Path) -> list[Path]:
    """Runs of a sweep that did not fail; none where there is no sweep."""
    if not (path / SWEEP_FILE).exists():
        return []
    sweep = read_json(path / SWEEP_FILE)
    failed = {f["cell"] for f in sweep.get("failed", [])}
    return [path / cell["name"] for cell in sweep["cells"] if cell["name"] not in failed]


def failures(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Cells of sweeps that ended without a result, as the sweep recorded them, each with the path that its run would have."""
    return [
        {**cell, "run": str(path / cell["cell"])}
        for path in paths if (path / SWEEP_FILE).exists() for cell in read_json(path / SWEEP_FILE).get("failed", [])
    ]  # fmt: skip


def load_result(path: Path) -> RunResult:
    run = RunDirectory(path)
    about = run.finished()
    attacks = [with_verdict(p.parent, read_json(p)) for p in sorted((path / "attacks").glob("*/summary.json"))]
    return RunResult(
        str(path),
        about,
        read_toml(path / "config.toml"),
        attacks,
        pictures_of(path),
        run.load_utility_draws,
        samples_of(path),
    )


def pictures_of(path: Path) -> Callable[[dict[str, Any]], tuple[Tensor, Tensor] | None]:
    def pictures(entry: dict[str, Any]) -> tuple[Tensor, Tensor] | None:
        file = path / str(entry.get("folder", "")) / "pictures.safetensors"
        if not entry.get("folder") or not file.exists():
            return None
        tensors, _ = read_tensors(file)
        return tensors["originals"], tensors["found"]

    return pictures


def samples_of(path: Path) -> Callable[[dict[str, Any]], Sequence[dict[str, Any]]]:
    """Rows of an entry's targets: in the entry, or, of attacks whose targets are people, in the owner-only samples.csv."""

    def samples(entry: dict[str, Any]) -> Sequence[dict[str, Any]]:
        file = path / str(entry.get("folder", "")) / "samples.csv"
        if entry.get("samples") or not entry.get("folder") or not file.exists():
            return list(entry.get("samples") or ())
        with open(file, newline="", encoding="utf-8") as lines:
            return [{name: _read(text) for name, text in row.items()} for row in csv.DictReader(lines)]

    return samples


def _read(text: str) -> float | str | None:
    """What the text of a cell stands for: a number, a truth value as 0 or 1, nothing, or itself."""
    known: dict[str, float | None] = {"": None, "True": 1.0, "False": 0.0}
    if text in known:
        return known[text]
    try:
        return float(text)
    except ValueError:
        return text
