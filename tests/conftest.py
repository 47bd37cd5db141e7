"""Shared by all tests: one thread, tiny runs made once, the command line in-process."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tiny import TINY, Outcome


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """Run the command line in this process: cli("train", "--json") -> exit code, stdout, stderr."""
    from fedgc import cli as module

    monkeypatch.setattr(module, "stop_on_signals", lambda: None)

    def run(*arguments: object) -> Outcome:
        monkeypatch.setattr(sys, "argv", ["fedgc-priv", *map(str, arguments)])
        capsys.readouterr()
        code = 0
        try:
            module.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capsys.readouterr()
        return Outcome(code, out, err)

    return run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished tiny run of each algorithm, and one under differential privacy. Tests read them, or copy them."""
    from fedgc.config import load_config
    from fedgc.pipeline.training import train

    root = tmp_path_factory.mktemp("runs")
    made = {}
    for algorithm in ("centralized", "fedavg", "fedpe", "fedgc"):
        made[algorithm] = root / algorithm
        train(load_config(settings=TINY, flags={"federation.algorithm": algorithm}), made[algorithm])
    made["dp"] = root / "dp"
    private = ("defense.name=dp-sgd", "defense.epsilon=50", "defense.noise_seed=1")
    train(load_config(settings=(*TINY, *private)), made["dp"])
    return made
