"""What `inspect` tells about a folder."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedgc.data.faces import LONE, load_faces
from fedgc.data.folder import EMPTY, FOREIGN
from fedgc.data.inspection import inspect
from fedgc.data.splits import split_identities
from fedgc.errors import DataError

ORL = Path(__file__).parents[4] / "shared" / "data" / "orl"


def fill(root: Path, counts: dict[str, int]) -> None:
    rng = np.random.default_rng(0)
    for name, count in counts.items():
        (root / name).mkdir(parents=True)
        for number in range(count):
            pixels = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{number}.png")


def test_counts_sizes_and_formats(tmp_path: Path) -> None:
    fill(tmp_path, {"abe": 2, "bea": 3, "cyd": 7})
    Image.new("L", (20, 30)).save(tmp_path / "abe" / "grey.jpg")
    seen: list[tuple[int, int]] = []
    found = inspect(str(tmp_path), progress=lambda done, total: seen.append((done, total)))
    assert (found["people"], found["images"]) == (3, 13)
    assert found["images_per_person"] == {"min": 3, "median": 3, "max": 7}
    assert found["sizes"] == [
        {"width": 16, "height": 12, "images": 12},
        {"width": 20, "height": 30, "images": 1},
    ]
    assert found["formats"] == {"PNG": 12, "JPEG": 1}
    assert found["skipped"] == {}
    assert seen[-1] == (13, 13)
    assert json.loads(json.dumps(found)) == found


def test_skipped_entries_are_counted_by_reason_with_a_few_examples(tmp_path: Path) -> None:
    fill(tmp_path, {"abe": 2, "one": 1})
    for number in range(4):
        (tmp_path / "abe" / f"note{number}.txt").write_text("not an image")
    (tmp_path / "abe" / "empty.jpg").touch()
    found = inspect(str(tmp_path), examples=2)
    assert found["skipped"] == {
        EMPTY: {"count": 1, "examples": ["abe/empty.jpg"]},
        FOREIGN: {"count": 4, "examples": ["abe/note0.txt", "abe/note1.txt"]},
        LONE: {"count": 1, "examples": ["one/0.png"]},
    }
    assert found["people_with_one_image"] == 1
    loaded = load_faces(str(tmp_path), image_size=16, align="none", seed=0)
    assert sum(entry["count"] for entry in found["skipped"].values()) == len(loaded.skipped)


def test_copies_are_reported_under_one_person_and_under_several(tmp_path: Path) -> None:
    fill(tmp_path, {"abe": 2, "bea": 2})
    data = (tmp_path / "abe" / "0.png").read_bytes()
    (tmp_path / "bea" / "copy.png").write_bytes(data)
    (tmp_path / "bea" / "again.png").write_bytes((tmp_path / "bea" / "1.png").read_bytes())
    found = inspect(str(tmp_path))
    assert found["duplicates"] == {
        "across_people": {"count": 1, "examples": [["abe/0.png", "bea/copy.png"]]},
        "within_people": {"count": 1, "examples": [["bea/1.png", "bea/again.png"]]},
    }
    assert sum(line.startswith("warning") for line in found["suggestions"]) == 2
    assert found["images"] == 6  # reported, not dropped


@pytest.mark.parametrize("many", [2, 6, 30])
def test_the_suggestions_are_what_a_split_does(tmp_path: Path, many: int) -> None:
    fill(tmp_path, {f"p{i:02d}": 10 if i < many else 4 for i in range(30)})
    faces = load_faces(str(tmp_path), image_size=8, align="none", seed=0)
    found = {split["min_images"]: split for split in inspect(str(tmp_path))["splits"]}
    for fewest in (5, 10):
        trained = len(split_identities(faces, min_images=fewest, seed=0).train)
        assert (found[fewest]["trained_on"], found[fewest]["others"]) == (trained, 30 - trained)
    assert found[20]["trained_on"] == 0
    assert "lower data.min_images" in found[20]["why"]


def test_a_folder_where_nothing_is_usable_is_described(tmp_path: Path) -> None:
    (tmp_path / "abe").mkdir()
    found = inspect(str(tmp_path))
    assert found["people"] == 0
    assert found["images_per_person"] is None
    assert all("not possible" in line for line in found["suggestions"][1:])


def test_a_missing_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no folder"):
        inspect(str(tmp_path / "nowhere"))


def test_a_synthetic_source_is_described_without_being_drawn() -> None:
    found = inspect("synthetic:100000x50")
    assert (found["people"], found["images"]) == (100_000, 5_000_000)


@pytest.mark.skipif(not ORL.is_dir(), reason="needs ../shared/data/orl")
def test_orl() -> None:
    found = inspect(str(ORL))
    assert (found["people"], found["images"]) == (40, 400)
    assert found["formats"] == {"PPM": 400}
    assert found["sizes"] == [{"width": 92, "height": 112, "images": 400}]
