"""report: finished runs and their attacks become a page. Reads results only."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.gate import failing, unjudged
from eval.report import build
from eval.results import Failure, RunResult
from fedgc.config import read_toml
from fedgc.errors import GateError, RunError, WorkFailedError
from fedgc.files import MALFORMED
from fedgc.limits import require_address_space
from fedgc.pipeline.records import pictures_of, samples_of, summary_of, sweep_in, trained
from fedgc.pipeline.verdicts import with_verdict
from fedgc.pipeline.watch import Watch, silent
from fedgc.runs import RunDirectory


def report(
    paths: Sequence[Path], out: Path, *, originals: bool = True, commands: Sequence[str] = (), watch: Watch = silent
) -> dict[str, Any]:
    """Write the report folder; returns its summary, with the path of the page under "report" and cells without a
    result under "failed"."""
    require_address_space()
    runs = [load_result(path) for path in find_runs(paths)]
    watch("writing the report", 0, 1)
    failed = failures(paths)
    known = [
        Failure(f["run"], *(f[key] for key in ("algorithm", "defense", "epsilon", "seed", "error"))) for f in failed
    ]
    try:
        summary = build(runs, out, originals=originals, commands=commands, failures=known)
    except MALFORMED as error:  # what is checked as it is read is less than all that a report looks at
        raise WorkFailedError(
            f"no report can be made of {', '.join(run.path for run in runs)} ({error!r}): leave out runs that others may have "
            "changed; if it is of your own making, that is a mistake of this tool (`fedgc-priv -v report ...` shows where)"
        ) from error
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
    if (sweep := sweep_in(path)) is None:
        return []
    failed = {f["cell"] for f in sweep.get("failed", [])}
    return [path / cell["name"] for cell in sweep["cells"] if cell["name"] not in failed]


def failures(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Cells of sweeps that ended without a result, as the sweep recorded them, each with the path that its run would have."""
    return [
        {**cell, "run": str(path / cell["cell"])}
        for path in paths for cell in (sweep_in(path) or {}).get("failed", [])
    ]  # fmt: skip


def load_result(path: Path) -> RunResult:
    run = RunDirectory(path)
    about = trained(run)
    folders = [p.parent for p in sorted((path / "attacks").glob("*/summary.json"))]
    attacks = [with_verdict(folder, summary_of(folder, path)) for folder in folders]
    return RunResult(
        str(path),
        about,
        read_toml(path / "config.toml"),
        attacks,
        pictures_of(path),
        run.load_utility_draws,
        samples_of(path),
    )
