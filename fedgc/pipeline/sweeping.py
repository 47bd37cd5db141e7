"""sweep: a grid of configurations, each trained and attacked in a process of its own, several at a time.

Cells share nothing but the folder: a cell that is finished is found, one that was cut off goes on, one that fails is
recorded and does not stop the others.
"""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedgc.config import Config, environment_settings, parse_value, put, read_toml, validated
from fedgc.errors import FedgcError, RunError, UsageError, WorkFailedError
from fedgc.files import make_folder, read_json, write_json
from fedgc.pipeline.processes import processes
from fedgc.pipeline.reporting import report
from fedgc.pipeline.watch import Watch, silent

POLL_SECONDS = 0.5
ATTACK_UNITS = (
    30  # how many rounds the attacks of a cell stand for in progress: some thirty answers, each about a round long
)


@dataclass(frozen=True)
class Cell:
    """One configuration of a grid, with the attack settings that go with it; targets: photos for a costly attack."""

    name: str
    tree: Mapping[str, Any]
    attack_settings: tuple[str, ...] = ()
    targets: int | None = None

    def config(self) -> Config:
        return validated(self.tree, self.name)


def cells(
    file: Path | None, over: Sequence[str], seeds: int = 1, environment: Mapping[str, str] | None = None
) -> list[Cell]:
    """Every combination of the axes ``KEY=V1,V2,...`` on top of a file; `none` in defense.epsilon means no defense."""
    axes = [_axis(text) for text in over]
    base = read_toml(file) if file else {}
    for key, value in environment_settings(environment or {}).items():
        put(base, key, value)
    out = []
    for values in itertools.product(*(values for _, values in axes)):
        for offset in range(seeds):
            tree = _copy(base)
            named = []
            for (key, _), value in zip(axes, values, strict=True):
                _put_axis(tree, key, value)
                named.append(f"{key.rpartition('.')[2]}={value}")
            if seeds > 1:
                put(tree, "seed", int(base.get("seed", 0)) + offset)
                named.append(f"seed={tree['seed']}")
            cell = Cell("_".join(named).replace("/", "-") or "only", tree)
            cell.config()  # every cell is checked before any work
            out.append(cell)
    return out


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise UsageError(f"--over {text!r}: write KEY=V1,V2,..., for example --over defense.epsilon=none,50,8")
    return key.strip(), [parse_value(v.strip()) for v in values.split(",")]


def _put_axis(tree: dict[str, Any], key: str, value: Any) -> None:
    if key == "defense.epsilon" and value in ("none", "inf", float("inf")):
        tree["defense"] = {"name": "none"}
        return
    if key == "defense.epsilon" and tree.get("defense", {}).get("name", "none") == "none":
        put(tree, "defense.name", "dp-sgd")
    put(tree, key, value)


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}


def run_sweep(grid: Sequence[Cell], out: Path, *, resume: bool = False, watch: Watch = silent) -> dict[str, Any]:
    """Train, attack and report a grid; returns the report's summary and the cells that failed."""
    plan = [{"name": cell.name, "config": cell.config().digest()} for cell in grid]
    known = read_json(out / "sweep.json") if (out / "sweep.json").exists() else None
    if known is not None and known["cells"] != plan:
        raise UsageError(f"{out} holds a sweep over another grid: choose another --out")
    if known is not None and known["status"] != "finished" and not resume:
        raise RunError(f"{out} holds an unfinished sweep: add --resume to go on")
    make_folder(out)
    write_json(out / "sweep.json", {"cells": plan, "status": "running"})
    failed = _play(grid, out, watch)
    write_json(out / "sweep.json", {"cells": plan, "status": "finished" if not failed else "failed", "failed": failed})
    done = [out / cell.name for cell in grid if not any(f["cell"] == cell.name for f in failed)]
    if not done:
        raise WorkFailedError(f"every cell of {out} failed; the first: {failed[0]['cell']}: {failed[0]['error']}")
    summary = report(done, out / "report", watch=watch)
    return {**summary, "failed": failed}


def _play(grid: Sequence[Cell], out: Path, watch: Watch) -> list[dict[str, str]]:
    workers = max(1, min(os.cpu_count() or 1, len(grid)))
    total = sum(cell.config().federation.rounds + ATTACK_UNITS for cell in grid)
    with processes(workers, _one_thread) as pool:
        waiting = {pool.submit(play_cell, cell, out / cell.name): cell for cell in grid}
        while not all(future.done() for future in waiting):
            time.sleep(POLL_SECONDS)
            finished = sum(future.done() for future in waiting)
            watch("training and attacking", _progress(waiting, out), total, f"{finished} of {len(grid)} runs finished")
    watch("training and attacking", total, total)
    errors = [(waiting[future].name, future.exception()) for future in waiting]
    return [{"cell": name, "error": f"{error}"} for name, error in errors if error is not None]


def _progress(waiting: Mapping[Future[None], Cell], out: Path) -> int:
    """Units of work done, read off the run directories so that workers need no line back."""
    done = 0
    for future, cell in waiting.items():
        rounds = cell.config().federation.rounds
        played = len(list((out / cell.name / "state").glob("round-*.json")))
        attacked = len(list((out / cell.name / "attacks").glob("*/summary.json")))
        done += rounds + ATTACK_UNITS if future.done() else played + min(attacked, ATTACK_UNITS)
    return done


def play_cell(cell: Cell, path: Path) -> None:
    """Train one cell, or find it trained, and attack it from every seat."""
    from attacks.registry import ATTACKS
    from fedgc.pipeline.attacking import attack
    from fedgc.pipeline.training import train

    try:
        train(cell.config(), path, resume=True)
        for name, kind in ATTACKS.items():
            attack(path, [name], targets=cell.targets if kind.costly else None, settings=cell.attack_settings)
    except FedgcError as error:
        raise RuntimeError(str(error)) from None  # an exception that any process can unpickle


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
