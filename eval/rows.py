"""Results as rows: the lines of results.csv, and what a gate judges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from eval.results import Entry, Failure, RunResult

FAILED = "none: the run failed"

COLUMNS = (
    "run", "algorithm", "defense", "epsilon", "seed", "threat", "attack", "batch_size", "metric", "value", "low", "high",
    "n", "chance", "ceiling", "baseline", "refused", "why", "round", "targets", "far", "note", "local_steps",
    "judge",
)  # fmt: skip


def gate_entries(runs: Sequence[RunResult]) -> list[Entry]:
    """Everything a gate can judge: attack entries, and each run's utility as an entry named "utility"."""
    out: list[Entry] = []
    for run in runs:
        measured = {k: v for k, v in run.about.get("utility", {}).items() if isinstance(v, Mapping)}
        out.append({"attack": "utility", "threat": None, "run": run.path, "refused": None, "metrics": measured})
        out += [{**entry, "run": run.path} for entry in run.entries]
    return out


def table(runs: Sequence[RunResult], failures: Sequence[Failure] = ()) -> list[dict[str, Any]]:
    """One row per run, seat, attack and metric, utility and baselines included, and one per failed run; keys are `COLUMNS`."""
    rows: list[dict[str, Any]] = [
        {"run": f.path, **{key: getattr(f, key) for key in ("algorithm", "defense", "epsilon", "seed")}, "attack": FAILED,
         "why": f.why} for f in failures
    ]  # fmt: skip
    for run in runs:
        about = {"run": run.path, **{key: getattr(run, key) for key in ("algorithm", "defense", "epsilon", "seed")}}
        rows += _rows({**about, "attack": "utility"}, run.about.get("utility", {}), run.about.get("baselines", {}))
        for entry in run.entries:
            keys = ("threat", "attack", "batch_size", "local_steps", "round", "targets", "refused")
            head = {**about, **{key: entry.get(key) for key in keys}, "judge": (entry.get("judge") or {}).get("name")}
            if entry.get("refused"):
                rows.append(head)
            rows += _rows(head, entry["metrics"], entry.get("baselines", {}))
    return [{column: row.get(column) for column in COLUMNS} for row in rows]


def _rows(
    head: Mapping[str, Any], metrics: Mapping[str, Any], baselines: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    for baseline, measured in ((None, metrics), *baselines.items()):
        for metric, value in measured.items():
            if isinstance(value, Mapping):
                yield {**value, **head, "baseline": baseline, "metric": metric}
