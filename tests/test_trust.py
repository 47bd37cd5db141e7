"""Hostile inputs: model files, paths, images and configurations; and that the inputs would do harm where nobody refuses."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch

from fedgc.cli import in_one_line
from fedgc.config import load_config
from fedgc.pipeline.initial import read_initial
from tests.tiny import TINY
from tests.trust.abuses import checkpoint
from tests.trust.cases import Case, Outcome, command, refused
from tests.trust.configs import CONFIGS
from tests.trust.images import IMAGES
from tests.trust.models import MODELS
from tests.trust.paths import PATHS
from tests.trust.pickles import PICKLES

GROUPS = {"models": MODELS, "paths": PATHS, "images": IMAGES, "configs": CONFIGS}
QUICK_MODELS = {
    "pickle: torch.save",
    "pickle: bare",
    "pickle: TorchScript",
    "pickle: fallback trap",
    "safetensors: header of 2^63 bytes",
    "safetensors: shape that overflows",
    "safetensors: a tensor twice",
    "safetensors: tensors missing",
}
SLOW = {case.name for case in MODELS} - QUICK_MODELS | {"a hundred thousand empty files"}


def test_there_are_as_many_as_promised() -> None:
    assert {name: len(cases) for name, cases in GROUPS.items()} == {
        "models": 24,
        "paths": 12,
        "images": 25,
        "configs": 20,
    }
    for cases in GROUPS.values():
        assert len({case.name for case in cases}) == len(cases)
    assert {case.name for case in MODELS} > QUICK_MODELS


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{group}-{case.name}", marks=[pytest.mark.slow] if case.name in SLOW else [])
        for group, cases in GROUPS.items()
        for case in cases
    ],
)
def test_a_hostile_input_is_handled_as_documented(case: Case, tmp_path: Path) -> None:
    assert case.run(tmp_path) is None


def _scripted(file: Path) -> Any:
    with zipfile.ZipFile(file) as archive:
        return pickle.loads(archive.read("hostile/data.pkl"))  # noqa: S301


TRUSTING: dict[str, Callable[[Path], Any]] = {
    "bare": lambda file: pickle.loads(file.read_bytes()),  # noqa: S301
    "gzip": joblib.load,
    "npy": partial(np.load, allow_pickle=True),
    "npz": lambda file: np.load(file, allow_pickle=True)["weights"],
    "torchscript": _scripted,
}


@pytest.mark.parametrize("form", PICKLES)
def test_a_reader_that_trusts_runs_the_code(form: str, tmp_path: Path) -> None:
    """Without this, a file that harms nobody would pass for one that was refused."""
    PICKLES[form](tmp_path / "file.npy" if form == "npy" else tmp_path / "file", tmp_path / "canary")
    assert not (tmp_path / "canary").exists()
    file = next(path for path in tmp_path.iterdir())
    TRUSTING.get(form, partial(torch.load, weights_only=False))(file)
    assert (tmp_path / "canary").exists()


def test_a_good_checkpoint_is_taken(tmp_path: Path) -> None:
    checkpoint(tmp_path / "good.safetensors")
    assert read_initial(load_config(settings=(*TINY, f"model.init={tmp_path / 'good.safetensors'}"))) is not None


def test_a_command_that_works_is_no_refusal(tmp_path: Path) -> None:
    outcome = command("list", "threats", "--json", inside=tmp_path)
    assert outcome.code == 0
    assert outcome.out.startswith("[")
    assert refused(outcome) is not None


@pytest.mark.parametrize(
    ("outcome", "names", "complaint"),
    [
        (Outcome(2, "", "no: x.pt\n", 0.1, 1.0), ("x.pt",), None),
        (Outcome(1, "", "no: x.pt\n", 0.1, 1.0), (), "exit code 1"),
        (Outcome(2, "{}", "no: x.pt\n", 0.1, 1.0), (), "printed"),
        (Outcome(2, "", "no\nx.pt\n", 0.1, 1.0), (), "not one line"),
        (Outcome(2, "", "no: \x1b[31m\n", 0.1, 1.0), (), "control characters"),
        (Outcome(2, "", "no\n", 0.1, 1.0), ("x.pt",), "does not say 'x.pt'"),
        (Outcome(2, "", "no\n", 99.0, 1.0, 30.0), (), "30.0 s"),
        (Outcome(2, "", "no\n", 0.1, 3000.0), (), "3000 MiB"),
    ],
)
def test_what_counts_as_a_refusal(outcome: Outcome, names: tuple[str, ...], complaint: str | None) -> None:
    found = refused(outcome, names=names)
    assert found is None if complaint is None else complaint in (found or "")


def test_an_error_is_one_line_that_paints_nothing() -> None:
    assert in_one_line(ValueError("backbone.\x1b[31m\nhead, é, \0")) == "backbone.\\x1b[31m head, é, \\x00"
