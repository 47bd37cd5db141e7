"""Little memory: commands that finish or say so, errors that pass for nothing else, and nothing marked complete that is not."""

from __future__ import annotations

import errno
import json
import os
import sys
from collections import Counter
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import pytest
from PIL import Image, ImageOps
from tiny import TINY, Outcome

from fedgc.config import load_config
from fedgc.data.faces import load_faces
from fedgc.data.folder import DAMAGED, UnusableImageError, decode
from fedgc.errors import WorkFailedError
from fedgc.files import read_tensors, write_tensors
from fedgc.pipeline.grids import Cell
from fedgc.pipeline.processes import processes
from fedgc.pipeline.sweeping import play_cell
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from fedgc.showing import say_unforeseen
from tests.pictures import encoded, picture
from tests.trust.folders import people
from tests.trust.limits import CRASHED, FINISHED, LIMITS, RAN_OUT, REFUSED, SIZES, WORKS, ended, played

Cli = Callable[..., Outcome]
FLAGS = [part for setting in TINY for part in ("--set", setting)]
HOOKS = ("--set", "defense.name=dp-sgd", "--set", "defense.noise_multiplier=1.0", "--set", "defense.mode=hooks")
on_linux = pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="the address space is limited on Linux alone"
)


def short(*_: Any, **__: Any) -> None:
    raise MemoryError


# -- the address space is limited


@on_linux
def test_little_room_is_too_little_and_costs_nothing(tmp_path: Path) -> None:
    assert len(LIMITS) == len(set(SIZES)) == 10
    (tmp_path / "asked").mkdir()
    assert played(16, tmp_path / "asked") is None
    assert {ended[work.name, 16] for work in WORKS} == {REFUSED}


@on_linux
@pytest.mark.slow
def test_every_room_is_enough_or_is_said_to_be_too_little(tmp_path: Path) -> None:
    for case in LIMITS:
        (tmp_path / case.name).mkdir()
        assert case.run(tmp_path / case.name) is None, case.name
    for work in WORKS:  # a limit that nobody feels shows nothing, nor does one that nobody survives
        how = Counter(ended[work.name, room] for room in SIZES)
        assert how[REFUSED] >= 3, work.name
        assert how[FINISHED] >= 3, work.name


@on_linux
@pytest.mark.slow
def test_without_the_question_before_it_nothing_is_lost_either(tmp_path: Path) -> None:
    """What runs out in the midst of work. Compiled code of PyTorch's backward pass may not survive a refused allocation, and
    CPython's loop may turn in circles where the last bytes are gone, which `command` ends: that is why it is asked for before."""
    for room in (0, 8, 16, 32, 128):
        (tmp_path / str(room)).mkdir()
        complaint = played(room, tmp_path / str(room), least=0)
        assert complaint is None or CRASHED in complaint, room
    assert RAN_OUT in ended.values()


# -- it is said to be too little before the run


def test_a_run_that_cannot_fit_is_refused_and_leaves_nothing(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedgc.client.available", lambda device: 2**20)
    outcome = cli("train", *FLAGS, *HOOKS, "--out", tmp_path / "run")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "1.0 MiB are available" in outcome.err
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


# -- it shows in the midst of work


@pytest.mark.parametrize(
    "error",
    [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 2048 bytes.")],
    ids=repr,
)
def test_the_end_of_memory_is_one_line(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr("fedgc.client.train_locally", fail)
        outcome = cli("train", *FLAGS, "--out", out)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (1, "", 1)
    assert "train ran out of memory (in " in outcome.err
    assert "--resume" in outcome.err
    assert RunDirectory(out).about()["status"] == "running"
    assert cli("train", "--out", out, "--resume").code == 0


def test_it_is_said_even_where_there_is_no_memory_to_say_it(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fedgc.showing.explained", short)
    say_unforeseen(MemoryError())
    assert capfd.readouterr().err.startswith("fedgc-priv: out of memory; nothing unfinished is marked complete")


# -- it passes for nothing else


def photos(root: Path) -> str:
    return str(people(root / "faces"))


@pytest.mark.parametrize("error", [MemoryError(), OSError("out of memory error when reading image file")], ids=repr)
def test_a_good_photo_is_not_left_out_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise error

    source = photos(tmp_path)
    monkeypatch.setattr(Image.Image, "convert", fail)
    monkeypatch.setattr("fedgc.data.folder._upright", fail)
    with pytest.raises(MemoryError):
        load_faces(source, image_size=32, align="none", seed=0)


def test_a_decoder_that_says_damage_for_want_of_memory_is_not_believed(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(picture(1, (200, 200)), "WEBP")[:-600]
    with pytest.raises(UnusableImageError, match=DAMAGED):
        decode(data)
    monkeypatch.setattr("fedgc.data.folder.require_room", short)
    with pytest.raises(MemoryError):
        decode(data)


def test_a_photo_is_not_left_lying_on_its_side_for_want_of_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = photos(tmp_path)
    monkeypatch.setattr(ImageOps, "exif_transpose", short)
    with pytest.raises(MemoryError):
        load_faces(source, image_size=32, align="none", seed=0)


def test_a_good_state_is_not_taken_for_a_damaged_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(tmp_path / "run")
    train(load_config(settings=TINY), run.path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    monkeypatch.setattr("safetensors.safe_open", fail)
    with pytest.raises(MemoryError):
        read_tensors(run.checkpoint_path(1))
    with pytest.raises(MemoryError):
        run.load_state()


def test_tensors_are_written_where_there_is_room_for_them_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise safetensors prints a panic of its own."""
    monkeypatch.setattr("fedgc.files.require_room", short)
    monkeypatch.setattr("safetensors.torch.save", None)
    with pytest.raises(MemoryError):
        write_tensors(tmp_path / "x.safetensors", {})
    assert not list(tmp_path.iterdir())


def test_a_cell_that_ran_out_of_memory_failed_and_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedgc.client.train_locally", short)
    tree = json.loads(load_config(settings=TINY).model_dump_json())
    with pytest.raises(RuntimeError, match="ran out of memory"):
        play_cell(Cell("only", tree), tmp_path / "only")
    assert RunDirectory(tmp_path / "only").about()["status"] == "running"


def test_a_worker_that_the_system_ended_is_one_line() -> None:
    with pytest.raises(WorkFailedError, match="want of memory"), processes(1):
        raise BrokenProcessPool("A process in the process pool was terminated abruptly")
