"""sweep: a grid of configurations, each trained and attacked in a process of its own, several at a time.

Cells share nothing but the folder: a cell that is finished is found, one that was cut off goes on, one that fails is
recorded and does not stop the others.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedgc.errors import FedgcError, RefusedError, RunError, UsageError, WorkFailedError
from fedgc.files import make_folder, write_json
from fedgc.limits import explained, ran_out
from fedgc.pipeline.grids import Cell
from fedgc.pipeline.processes import processes
from fedgc.pipeline.records import SWEEP_FILE, sweep_in
from fedgc.pipeline.reporting import report
from fedgc.pipeline.watch import Watch, silent
from fedgc.runs import RunDirectory

POLL_SECONDS = 0.5
ATTACK_UNITS = (
    30  # how many rounds the attacks of a cell stand for in progress: some thirty answers, each about a round long
)


def run_sweep(grid: Sequence[Cell], out: Path, *, resume: bool = False, watch: Watch = silent) -> dict[str, Any]:
    """Train, attack and report a grid; returns the report's summary and the cells that failed."""
    with RunDirectory(out).locked():  # another sweep's cells would fail on this one's, and be written down as failed
        return _run_sweep(grid, out, resume, watch)


def _run_sweep(grid: Sequence[Cell], out: Path, resume: bool, watch: Watch) -> dict[str, Any]:
    plan = [cell.identity() for cell in grid]
    known = sweep_in(out)
    if known is not None and known["cells"] != plan:
        raise UsageError(f"{out} holds a sweep over another grid: choose another --out")
    if known is not None and known["status"] != "finished" and not resume:
        raise RunError(f"{out} holds an unfinished sweep: add --resume to go on")
    make_folder(out)
    write_json(out / SWEEP_FILE, {"cells": plan, "status": "running"})
    failed = _play(grid, out, watch)
    write_json(out / SWEEP_FILE, {"cells": plan, "status": "finished" if not failed else "failed", "failed": failed})
    if len(failed) == len(grid):
        raise WorkFailedError(f"every cell of {out} failed; the first: {failed[0]['cell']}: {failed[0]['error']}")
    return report([out], out / "report", watch=watch)


def _play(grid: Sequence[Cell], out: Path, watch: Watch) -> list[dict[str, Any]]:
    workers = max(1, min(os.cpu_count() or 1, len(grid)))
    total = sum(cell.config().federation.rounds + ATTACK_UNITS for cell in grid)
    with processes(workers, _one_thread) as pool:
        waiting = {pool.submit(play_cell, cell, out / cell.name): cell for cell in grid}
        while not all(future.done() for future in waiting):
            time.sleep(POLL_SECONDS)
            finished = sum(future.done() for future in waiting)
            watch("training and attacking", _progress(waiting, out), total, f"{finished} of {len(grid)} runs finished")
    watch("training and attacking", total, total)
    errors = [(cell, future.exception()) for future, cell in waiting.items()]
    return [{"cell": cell.name, **cell.about(), "error": f"{error}"} for cell, error in errors if error is not None]


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
    from fedgc.pipeline.attacking import attack, usual_attacks
    from fedgc.pipeline.training import train

    try:
        train(cell.config(), path, resume=True)
        for name in cell.attacks or usual_attacks(RunDirectory(path)):
            targets = cell.targets if ATTACKS[name].costly else None
            with suppress(RefusedError):  # of the only seat asked for; it is on record like any other refusal
                attack(path, [name], cell.threats, targets=targets, settings=cell.attack_settings)
    except FedgcError as error:
        raise RuntimeError(str(error)) from None  # an exception that any process can unpickle
    except Exception as error:
        if ran_out(error):
            raise RuntimeError(explained(error, "sweep")) from None  # it says little itself, if anything
        raise


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
