"""Sets of faces, from folders and synthetic."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fedgc.data.align import aligned
from fedgc.data.faces import FaceSet, load_faces
from fedgc.errors import DataError
from tests.pictures import picture

ORL = Path(__file__).parents[4] / "shared" / "data" / "orl"


def person(root: Path, name: str, count: int = 2) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    for number in range(count):
        picture(hash_of(name) + number).save(folder / f"{number}.png")
    return folder


def hash_of(name: str) -> int:
    return int.from_bytes(name.encode(), "big") % 2**32


def load(root: Path, **options: object) -> FaceSet:
    return load_faces(str(root), **{"image_size": 16, "align": "none", "seed": 0, **options})  # type: ignore[arg-type]


def test_people_are_sorted_and_images_follow_their_labels(tmp_path: Path) -> None:
    for name in ("bea", "abe", "cyd"):
        person(tmp_path, name, 3)
    seen: list[tuple[int, int]] = []
    faces = load(tmp_path, progress=lambda done, total: seen.append((done, total)))
    assert faces.names == ("abe", "bea", "cyd")
    assert faces.files == tuple(f"{name}/{i}.png" for name in faces.names for i in range(3))
    assert faces.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert faces.images.shape == (9, 3, 16, 16)
    assert faces.images.dtype == torch.uint8
    assert faces.counts().tolist() == [3, 3, 3]
    assert faces.of([2, 0]).tolist() == [6, 7, 8, 0, 1, 2]
    assert faces.of([]).shape == (0,)
    assert seen == [(i, 9) for i in range(1, 10)]
    expected = aligned(Image.open(tmp_path / "bea" / "1.png"), "none", 16)
    assert torch.equal(faces.images[4], torch.from_numpy(expected))
    floats = faces.float_images([4])
    assert floats.dtype == torch.float32
    assert torch.equal((floats[0] * 255).round().to(torch.uint8), faces.images[4])


def test_identities_outside_the_set_are_refused(tmp_path: Path) -> None:
    person(tmp_path, "abe")
    with pytest.raises(IndexError, match=r"0\.\.0"):
        load(tmp_path).of([-1])


def test_the_fingerprint_depends_on_pixels_names_and_labels_only(tmp_path: Path) -> None:
    for name in ("abe", "bea"):
        person(tmp_path / "x", name)
    first = load(tmp_path / "x")
    (tmp_path / "x").rename(tmp_path / "y")
    assert load(tmp_path / "y").fingerprint() == first.fingerprint()
    other_pixel = first.images.clone()
    other_pixel[3, 2, 15, 15] ^= 1
    changed = [
        FaceSet(other_pixel, first.labels, first.names, first.files, ""),
        FaceSet(first.images, first.labels, ("abe", "bob"), first.files, ""),
        FaceSet(first.images, torch.tensor([0, 0, 0, 1]), first.names, first.files, ""),
    ]
    assert len({faces.fingerprint() for faces in [first, *changed]}) == 4


def test_a_lone_image_does_not_shift_the_people_after_it(tmp_path: Path) -> None:
    person(tmp_path, "abe")
    person(tmp_path, "bea", 1)
    cyd = person(tmp_path, "cyd")
    faces = load(tmp_path)
    assert faces.names == ("abe", "cyd")
    expected = [aligned(Image.open(cyd / f"{i}.png"), "none", 16) for i in range(2)]
    assert torch.equal(faces.images[2:], torch.from_numpy(np.stack(expected)))


@pytest.mark.parametrize(
    ("fill", "problem"),
    [
        (None, "there is no folder"),
        ("empty", "is empty"),
        ("file", "is not a folder"),
        ("loose", "has files but no sub-folders"),
        ("single", "nobody with two usable images"),
    ],
)
def test_a_folder_without_people_is_one_clear_error(tmp_path: Path, fill: str | None, problem: str) -> None:
    root = tmp_path / "faces"
    if fill == "file":
        root.write_text("")
    elif fill is not None:
        root.mkdir()
    if fill == "loose":
        picture(1).save(root / "a.png")
    if fill == "single":
        person(root, "abe", 1)
    with pytest.raises(DataError, match=problem) as caught:
        load(root)
    assert str(root) in str(caught.value)


@pytest.mark.parametrize(
    "options", [{"image_size": 4}, {"image_size": 5000}, {"align": "eyes"}, {"center_fraction": 0.0}]
)
def test_arguments_out_of_range_are_refused(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(DataError):
        load(tmp_path, **options)


@pytest.mark.skipif(not ORL.is_dir(), reason="needs ../shared/data/orl")
def test_orl_loads_whole() -> None:
    faces = load(ORL)
    assert faces.counts().tolist() == [10] * 40
    assert faces.skipped == ()
    assert torch.equal(faces.images[:, 0], faces.images[:, 2])


def test_synthetic_sources_follow_their_spec_and_seed() -> None:
    first, again, other = (load_faces("synthetic:3x2", image_size=32, align="mtcnn", seed=s) for s in (1, 1, 2))
    assert first.images.shape == (6, 3, 32, 32)
    assert first.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert first.files[3] == "synthetic/0001/01"
    assert len(first.names) == 3
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


@pytest.mark.parametrize("source", ["synthetic:", "synthetic:3", "synthetic:0x4", "synthetic:3x1", "synthetic:3x-2"])
def test_a_wrong_synthetic_spec_shows_the_right_one(source: str) -> None:
    with pytest.raises(DataError, match="IDENTITIESxIMAGES"):
        load_faces(source, image_size=32, align="none", seed=0)


def test_a_source_too_large_for_memory_is_refused_with_the_figure() -> None:
    with pytest.raises(DataError, match="GiB"):
        load_faces("synthetic:999999x999", image_size=64, align="none", seed=0)
