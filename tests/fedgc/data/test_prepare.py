"""Alignment once: the same bytes however often it was interrupted, and nothing of anybody else's touched."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fedgc.data import preparation as module
from fedgc.data.faces import load_faces
from fedgc.data.folder import EMPTY, FOREIGN, JOURNAL, LOOSE
from fedgc.data.inspection import inspect
from fedgc.data.preparation import Task, prepare
from fedgc.data.prepared import MANIFEST, Entry, PreparedFolder, distinct
from fedgc.errors import DataError, UsageError

LFW = Path(__file__).parents[4] / "shared" / "data" / "lfw-devtrain"
SETTINGS: dict[str, Any] = {"align": "center", "size": 16, "jobs": 1}


def photo(path: Path, seed: int, size: tuple[int, int] = (40, 30)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Three people with three photos each, one of them no photo at all, and a file that lies about."""
    root = tmp_path / "photos"
    for person in range(3):
        for number in range(3):
            photo(root / f"p{person}" / f"{number}.jpg", 10 * person + number)
    (root / "p1" / "notes.jpg").write_text("not a picture")
    (root / "p2" / "nothing.png").touch()
    (root / "loose.txt").touch()
    return root


def tree(root: Path) -> dict[str, bytes]:
    """Every file with its bytes; the absolute path of the source, which differs between copies, is left out."""
    found = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}
    manifest = json.loads(found[MANIFEST])
    return {**found, MANIFEST: json.dumps({**manifest, "source": ""}).encode()}


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that were done."""
    done: list[str] = []
    call = Task.__call__

    def counting(self: Task) -> Entry:
        entry = call(self)
        done.append(self.file)
        return entry

    monkeypatch.setattr(Task, "__call__", counting)
    return done


def test_the_prepared_folder_is_the_aligned_one(source: Path, tmp_path: Path) -> None:
    made = prepare(str(source), tmp_path / "out", **SETTINGS)
    direct = load_faces(str(source), image_size=16, align="center", seed=0)
    again = load_faces(str(tmp_path / "out"), image_size=16, align="none", seed=0)
    assert torch.equal(direct.images, again.images)
    assert direct.names == again.names
    assert again.skipped == ()
    assert (made["people"], made["kept"], made["dropped"], made["reused"]) == (3, 9, 3, 0)
    assert {why: about["count"] for why, about in made["reasons"].items()} == {EMPTY: 1, FOREIGN: 1, LOOSE: 1}
    looked = inspect(str(tmp_path / "out"))
    assert (looked["images"], looked["formats"], looked["skipped"]) == (9, {"PNG": 9}, {})


def test_the_manifest_names_every_file(source: Path, tmp_path: Path) -> None:
    prepare(str(source), tmp_path / "out", **SETTINGS)
    manifest = json.loads((tmp_path / "out" / MANIFEST).read_text())
    assert manifest["settings"] == {"align": "center", "size": 16, "center_fraction": 0.52}
    assert manifest["counts"] == {"people": 3, "kept": 9, "dropped": 3}
    first = manifest["kept"][0]
    assert (first["file"], first["output"]) == ("p0/0.jpg", "p0/0.png")
    assert first["sha256"] == hashlib.sha256((source / "p0/0.jpg").read_bytes()).hexdigest()
    assert {e["file"]: e["reason"] for e in manifest["dropped"]} == {
        "p1/notes.jpg": FOREIGN, "p2/nothing.png": EMPTY, "loose.txt": LOOSE,
    }  # fmt: skip


def test_faces_are_for_their_owner_only(source: Path, tmp_path: Path) -> None:
    prepare(str(source), tmp_path / "out", **SETTINGS)
    for path in [tmp_path / "out", *(tmp_path / "out").rglob("*")]:
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path


def test_killed_at_any_instant_it_ends_with_the_same_bytes(
    source: Path, tmp_path: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (source / "p2" / "nothing.png").unlink()  # what cannot be read is looked at again every time
    prepare(str(source), tmp_path / "whole", **SETTINGS)
    expected, files = tree(tmp_path / "whole"), len(counted)
    real: dict[str, Callable[..., Any]] = {"replace": os.replace, "unlink": os.unlink}
    instant = 0
    while True:
        instant += 1
        left = [instant]

        def killing(name: str, left: list[int] = left) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise KeyboardInterrupt
                if left[0] < 0:  # dead: it cleans nothing up either
                    return None
                return real[name](*arguments, **options)

            return call

        counted.clear()
        out = tmp_path / f"cut-{instant}"
        with monkeypatch.context() as patch:
            for name in real:
                patch.setattr(os, name, killing(name))
            try:
                prepare(str(source), out, **SETTINGS)
                break
            except KeyboardInterrupt:
                before = list(counted)
        prepare(str(source), out, **SETTINGS)
        assert tree(out) == expected, instant
        assert len(counted) <= files + 1, (instant, before)  # at most the one that was under way is repeated
    assert instant > files


def test_what_is_done_is_not_done_again(source: Path, tmp_path: Path, counted: list[str]) -> None:
    prepare(str(source), tmp_path / "out", **SETTINGS)
    counted.clear()
    assert prepare(str(source), tmp_path / "out", **SETTINGS)["reused"] == 10
    assert counted == ["p2/nothing.png"]


def test_a_source_that_changed_is_followed(source: Path, tmp_path: Path, counted: list[str]) -> None:
    out = tmp_path / "out"
    prepare(str(source), out, **SETTINGS)
    photo(source / "p0/0.jpg", 99)
    photo(source / "p0/1.bmp", 98)  # 1.png is its name now, since it comes before 1.jpg
    (source / "p1/0.jpg").unlink()
    (source / "p1/1.jpg").write_bytes(b"spoilt")
    shutil.rmtree(source / "p2")
    (out / "p1/2.png").unlink()
    counted.clear()
    prepare(str(source), out, **SETTINGS)
    assert sorted(counted) == ["p0/0.jpg", "p0/1.bmp", "p0/1.jpg", "p1/1.jpg", "p1/2.jpg"]
    prepare(str(source), tmp_path / "fresh", **SETTINGS)
    assert tree(out) == tree(tmp_path / "fresh")
    assert not (out / "p2").exists()


def test_processes_change_no_byte(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FILES_PER_WORKER", 1)
    prepare(str(source), tmp_path / "one", **SETTINGS)
    seen: list[tuple[str, int, int]] = []
    prepare(str(source), tmp_path / "two", **{**SETTINGS, "jobs": 2}, progress=lambda *step: seen.append(step))
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert seen[-1] == ("preparing faces", 11, 11)


def test_equal_output_names_stay_apart(tmp_path: Path) -> None:
    for number, name in enumerate(("a.jpg", "a.png", "A.bmp", "b.png")):
        photo(tmp_path / "in" / "Ann" / name, number)
    photo(tmp_path / "in" / "ann" / "a.jpg", 9)
    prepare(str(tmp_path / "in"), tmp_path / "out", **SETTINGS)
    names = [p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*.png")]
    assert len({name.casefold() for name in names}) == 5
    assert len({(tmp_path / "out" / name).read_bytes() for name in names}) == 5


def test_distinct_names() -> None:
    assert distinct(["x", "y"]) == {"x": "x", "y": "y"}
    assert distinct(["a.jpg", "a.png", "a.png.bmp"], ".png") == {
        "a.jpg": "a.png", "a.png": "a.png.png", "a.png.bmp": "a.png.bmp.png",
    }  # fmt: skip
    assert len(set(map(str.casefold, distinct(["É", "é", "e\u0301"]).values()))) == 3
    long = distinct(["ü" * 120 + ".jpg", "ü" * 121 + ".jpg"], ".png").values()
    assert len(set(long)) == 2
    assert all(len(name.encode()) < 200 for name in long)


@pytest.mark.parametrize("place", ["photos", "photos/p0/in", "."])
def test_source_and_destination_stay_apart(
    source: Path, place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="inside one another"):
        prepare(str(source), Path(place), **SETTINGS)


def test_other_peoples_files_are_left_alone(source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    (out / "holiday").mkdir(parents=True)
    (out / "holiday" / "1.png").write_bytes(b"mine")
    with pytest.raises(DataError, match="holds something else"):
        prepare(str(source), out, **SETTINGS)
    assert (out / "holiday" / "1.png").read_bytes() == b"mine"
    shutil.rmtree(out)
    prepare(str(source), out, **SETTINGS)
    (out / "p0" / "mine.png").write_bytes(b"mine")
    with pytest.raises(DataError, match=r"p0/mine\.png"):
        prepare(str(source), out, **SETTINGS)
    (tmp_path / "file").touch()
    with pytest.raises(DataError, match="is a file"):
        prepare(str(source), tmp_path / "file", **SETTINGS)


def test_other_settings_or_another_source_are_refused(source: Path, tmp_path: Path) -> None:
    prepare(str(source), tmp_path / "out", **SETTINGS)
    with pytest.raises(DataError, match=r"prepared with settings = .*choose another folder"):
        prepare(str(source), tmp_path / "out", **{**SETTINGS, "size": 24})
    shutil.copytree(source, tmp_path / "copy")
    with pytest.raises(DataError, match="prepared with source"):
        prepare(str(tmp_path / "copy"), tmp_path / "out", **SETTINGS)


def test_a_forged_record_deletes_nothing(source: Path, tmp_path: Path) -> None:
    out, precious = tmp_path / "out", tmp_path / "precious.png"
    prepare(str(source), out, **SETTINGS)
    precious.write_bytes(b"mine")
    manifest = json.loads((out / MANIFEST).read_text())
    manifest["kept"][0] |= {"output": "../precious.png", "sha256": "0"}
    (out / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="is damaged"):
        prepare(str(source), out, **SETTINGS)
    assert precious.exists()


def test_half_a_folder_is_not_trained_on(source: Path, tmp_path: Path) -> None:
    prepare(str(source), tmp_path / "out", **SETTINGS)
    (tmp_path / "out" / JOURNAL).touch()
    with pytest.raises(DataError, match="not completely prepared"):
        load_faces(str(tmp_path / "out"), image_size=16, align="none", seed=0)


def test_two_at_a_time_are_refused(source: Path, tmp_path: Path) -> None:
    with PreparedFolder(tmp_path / "out", {}).locked(), pytest.raises(DataError, match="another process"):
        prepare(str(source), tmp_path / "out", **SETTINGS)


def test_nothing_usable_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "in" / "ann").mkdir(parents=True)
    (tmp_path / "in" / "ann" / "a.jpg").write_text("no")
    with pytest.raises(DataError, match="no photo of"):
        prepare(str(tmp_path / "in"), tmp_path / "out", **SETTINGS)


@pytest.mark.parametrize(
    ("change", "word"),
    [({"size": 4}, "pixels"), ({"align": "x"}, "choose one of"), ({"center_fraction": 0.0}, "fraction"), ({"jobs": 0}, "jobs")],
)  # fmt: skip
def test_settings_out_of_range(source: Path, tmp_path: Path, change: dict[str, Any], word: str) -> None:
    with pytest.raises(UsageError, match=word):
        prepare(str(source), tmp_path / "out", **{**SETTINGS, **change})
    assert not (tmp_path / "out").exists()


def test_the_command(source: Path, tmp_path: Path, cli: Callable[..., Any]) -> None:
    out = tmp_path / "out"
    made = json.loads(cli("data", "prepare", source, out, "--align", "center", "--size", 32, "--json").out)
    assert (made["kept"], made["settings"]["size"]) == (9, 32)
    shown = cli("data", "prepare", source, out, "--align", "center", "--size", 32)
    assert shown.code == 0
    for word in ("kept", FOREIGN, "next: fedgc-priv train --data"):
        assert word in shown.out
    assert cli("data", "prepare", source, out).code == 2
    assert json.loads(cli("data", "inspect", out, "--json").out)["skipped"] == {}


@pytest.mark.slow
@pytest.mark.skipif(not LFW.is_dir(), reason="needs ../shared/data/lfw-devtrain")
def test_mtcnn_finds_the_faces_of_a_few_people(tmp_path: Path) -> None:
    for person in sorted(LFW.iterdir())[:3]:
        shutil.copytree(person, tmp_path / "in" / person.name)
    made = prepare(str(tmp_path / "in"), tmp_path / "out", align="mtcnn", size=64, jobs=1)
    direct = load_faces(str(tmp_path / "in"), image_size=64, align="mtcnn", seed=0)
    again = load_faces(str(tmp_path / "out"), image_size=64, align="none", seed=0)
    assert made["dropped"] == 0
    assert torch.equal(direct.images, again.images)
