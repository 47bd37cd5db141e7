"""Readers of what strangers write, by harm that hypothesis draws: a value, or words for users, and nothing else."""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedgc.errors import FedgcError, RunError
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.records import sweep_in
from fedgc.pipeline.reporting import load_result, report
from tests.trust.harms import good_run, harm_tensors
from tests.trust.readers import READERS, Reader, put_result

NEEDS = {"answer of a node": "flwr"}
COMMON = {
    "deadline": None, "database": None, "derandomize": True, "print_blob": False,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}  # fmt: skip


def named(reader: Reader) -> object:
    package = NEEDS.get(reader.name)
    absent = package is not None and importlib.util.find_spec(package) is None
    return pytest.param(reader, id=reader.name, marks=pytest.mark.skipif(absent, reason=f"needs {package}"))


def played(reader: Reader, draw: Random) -> None:
    with tempfile.TemporaryDirectory() as folder:
        complaint = reader.complaint(Path(folder), draw)
    assert complaint is None, complaint


@pytest.mark.parametrize("reader", map(named, READERS))
@settings(max_examples=8, **COMMON)
@given(draw=st.randoms(use_true_random=False))
def test_a_harmed_input_is_read_or_refused(reader: Reader, draw: Random) -> None:
    played(reader, draw)


@pytest.mark.slow
@pytest.mark.parametrize("reader", map(named, READERS))
@settings(max_examples=400, **COMMON)
@given(draw=st.randoms(use_true_random=False))
def test_many_harmed_inputs_are_read_or_refused(reader: Reader, draw: Random) -> None:
    played(reader, draw)


@pytest.mark.parametrize(
    "seeds", [range(4), pytest.param(range(4, 60), marks=pytest.mark.slow)], ids=lambda seeds: f"{len(seeds)}"
)
def test_harmed_results_make_a_report_or_words(seeds: range, tmp_path: Path) -> None:
    """What load_result lets through, a report can be made of."""
    for seed in seeds:
        folder = tmp_path / str(seed)
        folder.mkdir()
        put_result(folder, Random(seed))
        try:
            load_result(folder / "run")
        except RunError:
            continue
        report([folder / "run"], folder / "report")


@pytest.mark.parametrize(
    "seeds", [range(5), pytest.param(range(5, 200), marks=pytest.mark.slow)], ids=lambda seeds: f"{len(seeds)}"
)
def test_a_harmed_run_is_attacked_or_refused(seeds: range, tmp_path: Path) -> None:
    """What is read of a run without complaint, attacks can work with."""
    names = ("label-inference", "embedding-recovery", "identity-linkage")
    for seed in seeds:
        draw, run = Random(seed), tmp_path / str(seed)
        shutil.copytree(good_run(), run, ignore=shutil.ignore_patterns("attacks"))
        files = sorted(
            path for folder in ("transcript", "private", "attacker") for path in run.glob(f"{folder}/*.safetensors")
        )
        harm_tensors(draw.choice(files), draw)
        with suppress(FedgcError):
            attack(run, names, ("server", "client", "outsider"), targets=2)
        shutil.rmtree(run)


def test_a_good_input_is_read(tmp_path: Path) -> None:
    """Without this, a reader that refuses everything would pass."""
    result = load_result(good_run())
    assert {entry["attack"] for entry in result.attacks} == {
        "label-inference",
        "membership-inference",
        "gradient-inversion",
    }
    assert any(result.pictures(entry) for entry in result.attacks)
    assert report([good_run()], tmp_path / "report")["runs"] == 1


def test_a_reader_with_a_hole_is_found(tmp_path: Path) -> None:
    def hole(folder: Path) -> None:
        raise KeyError("what a stranger left out")

    found = Reader("hole", lambda folder, draw: None, hole).complaint(tmp_path, Random(0))
    assert found is not None
    assert "KeyError" in found


@pytest.mark.parametrize("cell", ["..", ".", "/etc", "a/b", "a\\b", "a\0b", "", "../../elsewhere"])
def test_a_sweep_names_no_folder_outside(tmp_path: Path, cell: str) -> None:
    (tmp_path / "sweep.json").write_text(json.dumps({"cells": [{"name": cell}], "status": "finished"}))
    with pytest.raises(RunError, match=r"sweep\.json"):
        sweep_in(tmp_path)


def test_a_link_is_no_cell(tmp_path: Path) -> None:
    (tmp_path / "sweep.json").write_text('{"cells": [{"name": "a"}], "status": "finished"}')
    assert sweep_in(tmp_path)
    (tmp_path / "a").symlink_to("/")
    with pytest.raises(RunError, match="'a' is no folder of that sweep"):
        sweep_in(tmp_path)
