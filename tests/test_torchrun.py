"""Several processes that share the batches of each client train what one does."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import TINY

from fedgc.config import load_config
from fedgc.files import read_tensors
from fedgc.pipeline.training import train

ROOT = Path(__file__).parent.parent
FLAGS = [part for setting in TINY for part in ("--set", setting)]


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "-m",
        "fedgc.cli",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run([*command, *arguments], capture_output=True, text=True, env=environment, check=False)


def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    train(load_config(settings=TINY), tmp_path / "one")
    done = torchrun("train", *FLAGS, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    for folder in ("checkpoints", "transcript"):
        names = sorted(p.name for p in (tmp_path / "one" / folder).glob("*.safetensors"))
        assert names == sorted(p.name for p in (tmp_path / "two" / folder).glob("*.safetensors")) != []
        for name in names:
            ours, theirs = (read_tensors(tmp_path / run / folder / name)[0] for run in ("one", "two"))
            assert all(torch.allclose(x, theirs[key], rtol=1e-5, atol=1e-6) for key, x in ours.items())
    again = torchrun("train", *FLAGS, "--out", str(tmp_path / "two"))
    assert again.returncode == 0, again.stderr  # found, not repeated, and nobody waits


def test_what_cannot_be_shared_is_refused(tmp_path: Path) -> None:
    private = ("--set", "defense.name=dp-sgd", "--set", "defense.noise_multiplier=1")
    done = torchrun("train", *FLAGS, *private, "--out", str(tmp_path / "run"))
    assert done.returncode != 0
    assert "looks at whole batches" in done.stderr
