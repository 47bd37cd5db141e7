"""Where a report's figures come from: the faces, and what it takes to repeat the runs."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import PurePath
from typing import Any

from eval.results import RunResult, flatten


def data(runs: Sequence[RunResult]) -> list[dict[str, Any]]:
    """The faces behind the runs, each data set and split once."""
    seen: dict[str, dict[str, Any]] = {}
    for run in runs:
        about = run.about
        key = f"{about.get('dataset')}{about.get('splits')}"
        entry = {
            k: about.get(k)
            for k in ("source", "dataset", "people", "splits", "skipped", "classes", "images", "clients")
        }
        seen.setdefault(key, {**entry, "synthetic": str(about.get("source", "")).partition(":")[0] == "synthetic"})
    return list(seen.values())


def short_names(runs: Sequence[RunResult]) -> dict[str, str]:
    """The last part of each path, or as many parts as tell the runs apart."""
    paths = {run.path: PurePath(run.path).parts for run in runs}
    for depth in range(1, max(map(len, paths.values())) + 1):
        names = {path: "/".join(parts[-depth:]) for path, parts in paths.items()}
        if len(set(names.values())) == len(names):
            break
    return names


def reproduction(runs: Sequence[RunResult], commands: Sequence[str]) -> dict[str, Any]:
    """Commands, versions and settings: those that all runs share once, those that differ by run."""
    flat = {run.path: flatten(run.config) for run in runs}
    keys = list(dict.fromkeys(k for settings in flat.values() for k in settings))
    shared = [k for k in keys if len({str(s.get(k)) for s in flat.values()}) == 1]
    names = short_names(runs)
    lines = list(commands) or [
        f"fedgc-priv {shlex.join(map(str, r.about['argv']))}" for r in runs if r.about.get("argv")
    ]
    first = runs[0].about if runs else {}
    return {
        "commands": lines,
        "shared": [(k, flat[runs[0].path][k]) for k in shared] if runs else [],
        "runs": [
            {"name": names[r.path], "seed": r.seed, "digest": r.about.get("config_digest", ""),
             "own": [(k, flat[r.path][k]) for k in keys if k not in shared and k in flat[r.path]],
             "started": r.about.get("started", ""), "seconds": r.about.get("seconds"), "device": r.about.get("device", ""),
             "machine": r.about.get("machine", ""), "victims": r.about.get("victims", "")}
            for r in runs
        ],
        "tool": first.get("tool", ""), "python": first.get("python", ""), "libraries": first.get("libraries", {}),
    }  # fmt: skip
