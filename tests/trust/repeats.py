"""The same configuration ten times: bit-identical weights, messages, metrics (but for seconds) and epsilon, on one machine and
with one thread.

Four configurations (FedAvg and FedGC, without and with differential privacy), and what is around them varies: this process or a
fork, what the process did before, global random numbers, the name of the folder, interruptions, another run at the same time, a
cell of a sweep whose cells share the cores. There are no loader workers to vary; in their place, faces are prepared by one
process and by two (`data prepare --jobs`).
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from benchmarks.resume import differences
from fedgc.data.synthetic import synthetic_faces
from fedgc.pipeline.grids import Cell
from fedgc.pipeline.sweeping import run_sweep
from fedgc.pipeline.training import train
from tests.trust.cases import Case, Child, command, shown
from tests.trust.undisturbed import CONFIGS, ROUNDS, config_of, trial

PEOPLE, PHOTOS, SIDE = 24, 6, 32
Scheme = tuple[str, str]  # algorithm, defense


def compared(case: Scheme, out: Path) -> str | None:
    return ", ".join(differences(out, trial(case).reference)[:6]) or None


def played(case: Scheme, out: Path, hook: Callable[[], object] | None = None) -> str | None:
    outcome = command(*trial(case).command(out), hook=hook)
    return f"exit code {outcome.code}: {shown(outcome.err)}" if outcome.code else compared(case, out)


def forked(case: Scheme, folder: Path) -> str | None:
    return played(case, folder / "run")


def under_another_name(case: Scheme, folder: Path) -> str | None:
    return played(case, folder / "another folder" / ("ü" * 40))


def here(case: Scheme, folder: Path) -> str | None:
    train(config_of(case), folder / "run")
    return compared(case, folder / "run")


def here_twice(case: Scheme, folder: Path) -> str | None:
    train(config_of(case), folder / "first")
    train(config_of(case), folder / "second")
    return compared(case, folder / "first") or compared(case, folder / "second")


def after_another(case: Scheme, folder: Path) -> str | None:
    other = CONFIGS[(CONFIGS.index(case) + 1) % len(CONFIGS)]
    return played(case, folder / "run", partial(train, config_of(other), folder / "other"))


def with_other_numbers(case: Scheme, folder: Path) -> str | None:
    """Global random numbers are elsewhere: nothing may draw from them."""

    def move() -> None:
        torch.manual_seed(random.Random(folder.name).getrandbits(32))
        np.random.seed(7)
        random.seed(7)

    return played(case, folder / "run", move)


def round_by_round(case: Scheme, folder: Path) -> str | None:
    """Cut off after every round but the last."""

    def cut() -> None:
        raise KeyboardInterrupt

    for _ in range(ROUNDS - 1):
        try:
            train(config_of(case), folder / "run", resume=True, after_round=cut)
        except KeyboardInterrupt:
            continue
    train(config_of(case), folder / "run", resume=True)
    return compared(case, folder / "run")


def side_by_side(case: Scheme, folder: Path) -> str | None:
    both = [Child(*trial(case).command(folder / name)) for name in ("a", "b")]
    codes = [child.outcome().code for child in both]
    return f"exit codes {codes}" if any(codes) else compared(case, folder / "a") or compared(case, folder / "b")


@cache
def sweep() -> Path:
    """All four as cells of one sweep, which share the cores."""
    out = trial(CONFIGS[0]).root / "grid"
    trees = {case: config_of(case).model_dump(mode="json", exclude_none=True) for case in CONFIGS}
    seat = {"attacks": ("identity-linkage",), "threats": ("outsider",)}
    run_sweep([Cell("-".join(case), tree, **seat) for case, tree in trees.items()], out)  # type: ignore[arg-type]
    return out


def as_a_cell(case: Scheme, folder: Path) -> str | None:
    return compared(case, sweep() / "-".join(case))


@cache
def prepared(jobs: int) -> Path:
    """The same photos, prepared by so many processes, as a folder that is to be moved to where it is used."""
    root = trial(CONFIGS[0]).root
    if not (root / "photos").exists():
        photos, labels = synthetic_faces(PEOPLE, PHOTOS, SIDE, 0)
        for n, (photo, label) in enumerate(zip(photos, labels.tolist(), strict=True)):
            (root / "photos" / f"p{label:02d}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(photo.permute(1, 2, 0).numpy()).save(root / "photos" / f"p{label:02d}" / f"{n}.png")
    out = root / f"prepared-{jobs}"
    words = ("data", "prepare", root / "photos", out, "--align", "center", "--size", str(SIDE), "--jobs", str(jobs))
    outcome = command(*words)
    assert outcome.code == 0, outcome.err
    return out


def from_prepared(case: Scheme, folder: Path) -> str | None:
    """Faces that one process prepared, and two: the same run, and from the same place."""
    for jobs in (1, 2):
        shutil.copytree(prepared(jobs), folder / "faces")
        words = [*trial(case).command(folder / f"run-{jobs}"), "--set", f"data.source={folder / 'faces'}"]
        outcome = command(*words)
        if outcome.code:
            return f"exit code {outcome.code}: {shown(outcome.err)}"
        shutil.rmtree(folder / "faces")
    return ", ".join(differences(folder / "run-1", folder / "run-2")[:6]) or None


WAYS: dict[str, Callable[[Scheme, Path], str | None]] = {
    "in a fork": forked, "in a folder of another name": under_another_name, "in this process": here,
    "twice in this process": here_twice, "after a run of another kind": after_another,
    "with other global random numbers": with_other_numbers, "cut off after every round": round_by_round,
    "two at the same time": side_by_side, "as a cell of a sweep": as_a_cell,
    "from faces prepared by one process and by two": from_prepared,
}  # fmt: skip


def _cases() -> Iterator[Case]:
    for case in CONFIGS:
        for name, way in WAYS.items():
            yield Case(f"{', '.join(case)}: {name}", partial(way, case))


REPEATS = tuple(_cases())
