"""Small runs that nobody disturbs, made once and compared with: FedAvg and FedGC, without and with differential privacy."""

from __future__ import annotations

import atexit
import importlib
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch

from benchmarks.resume import IMPORTED, Trial, command
from fedgc.config import Config, load_config
from fedgc.pipeline.training import train

ROUNDS = 4
FEW = (f"federation.rounds={ROUNDS}",)
CONFIGS = tuple((algorithm, defense) for algorithm in ("fedavg", "fedgc") for defense in ("none", "dp-sgd"))


def config_of(case: tuple[str, str]) -> Config:
    """The configuration that the command line makes of the flags of a case."""
    flags = command(case, Path("unused"), settings=FEW)
    return load_config(settings=flags[4:-2:2], flags={"federation.algorithm": case[0]})


@cache
def trial(case: tuple[str, str]) -> Trial:
    """The case's undisturbed run in a folder that is gone at the end of this process."""
    torch.set_num_threads(1)
    for name in IMPORTED:  # so that no fork spends its time on it
        importlib.import_module(name)
    root = Path(tempfile.mkdtemp(prefix="undisturbed-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    train(config_of(case), root / "warm")  # what accounting keeps in memory spares every fork seconds
    return Trial(case, root, FEW)


def in_folder(case: tuple[str, str], folder: Path) -> Trial:
    """The same trial, whose disturbed runs lie in this folder."""
    whole = trial(case)
    here = object.__new__(Trial)
    vars(here).update({**vars(whole), "root": folder})
    return here


def copied(case: tuple[str, str], to: Path) -> Path:
    """A finished run of one's own."""
    shutil.copytree(trial(case).reference, to)
    return to


def first_of(*complaints: Callable[[], str | None]) -> str | None:
    """The first complaint that there is."""
    return next((said for complaint in complaints if (said := complaint()) is not None), None)
