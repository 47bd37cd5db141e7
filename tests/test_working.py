"""A costly attack in parts: on several processes or one, in one go or cut off, the answer is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedgc.config import load_config
from fedgc.errors import WorkFailedError
from fedgc.pipeline import working
from fedgc.pipeline.attacking import attack, make_attack
from fedgc.pipeline.training import train
from fedgc.pipeline.working import Job, kept, observed, reconstruct
from fedgc.runs import RunDirectory
from tests.tiny import TINY

STEP = "round-0001-step-b1-0"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    path = tmp_path_factory.mktemp("working") / "run"
    train(load_config(settings=[*TINY, "record.rounds='all'"]), path)
    return RunDirectory(path)


def job(**settings: object) -> Job:
    chosen = make_attack("gradient-inversion", [f"gradient-inversion.{k}={v}" for k, v in settings.items()])
    return Job(chosen, "server", (STEP,), (1,), 1, None)


def found(run: RunDirectory, this: Job, ticks: list[tuple[int, int]] | None = None):
    observation, _ = observed(run, this, STEP, None, run.load_knowledge())
    note = (lambda done, total: ticks.append((done, total))) if ticks is not None else (lambda *_: None)
    return reconstruct(run, this, {STEP: observation}, note)[STEP]


def test_processes_find_what_one_process_finds(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working.os, "cpu_count", lambda: 2)
    ticks: list[tuple[int, int]] = []
    shared = found(run, job(iterations=4, components=10, copies=1), ticks)
    assert ticks[-1][0] == ticks[-1][1]
    monkeypatch.setattr(working.os, "cpu_count", lambda: 1)
    alone = found(run, job(iterations=4, components=10, copies=1, tolerance=1e-30))  # another folder, the same search
    assert shared.sources == alone.sources
    assert torch.equal(shared.images, alone.images)


def test_what_was_found_is_not_searched_for_again(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(working.os, "cpu_count", lambda: 1)
    this = job(iterations=3, components=10, copies=1)
    whole = found(run, this)
    folder = run.path / "attacks" / this.folder() / "parts"
    files = sorted(folder.iterdir())
    files[0].write_bytes(files[0].read_bytes()[:100])  # half a file is none
    files[1].unlink()
    calls: list[int] = []
    part = working.part

    def counted(path: Path, *rest) -> None:
        calls.append(rest[2])
        part(path, *rest)

    monkeypatch.setattr(working, "part", counted)
    again = found(run, this)
    assert calls == [0, 1]
    assert torch.equal(whole.images, again.images)
    assert all(kept(file) is not None for file in files)
    assert all(file.stat().st_mode & 0o077 == 0 for file in files)


def test_a_process_that_fails_ends_the_attack_with_its_words(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(working.os, "cpu_count", lambda: 2)
    folder = run.path / "attacks" / (this := job(iterations=5, components=10, copies=1)).folder()
    folder.mkdir(parents=True)
    (folder / "parts").write_text("a file where a folder belongs")
    with pytest.raises(WorkFailedError, match="parts could not be written"):
        found(run, this)


def test_an_attack_leaves_no_parts_and_says_where_its_search_fell_short(run: RunDirectory) -> None:
    settings = [f"gradient-inversion.{k}={v}" for k, v in {"iterations": 2, "components": 5, "copies": 1}.items()]
    entry = next(e for e in attack(run.path, ["gradient-inversion"], ["server"], settings=settings))
    assert entry["optimisation_limited"] > 0  # two iterations end above the loss at the truth, which is zero
    assert "search fell short in" in entry["metrics"]["psnr_gain"]["note"]
    assert not (run.path / entry["folder"] / "parts").exists()
    assert attack(run.path, ["gradient-inversion"], ["server"], settings=settings) == [entry]
