"""Splits by person: disjoint, reproducible, and of the promised sizes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedgc.data.faces import FaceSet
from fedgc.data.splits import Splits, many_to_move, partition, split_identities
from fedgc.errors import DataError

LFW = Path(__file__).parents[4] / "shared" / "data" / "lfw-devtrain"


def people(counts: Sequence[int]) -> FaceSet:
    """A set whose person i has counts[i] one-pixel images."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    files = tuple(f"{label}/{number}" for number, label in enumerate(labels.tolist()))
    pixels = torch.zeros(len(labels), 3, 1, 1, dtype=torch.uint8)
    return FaceSet(pixels, labels, tuple(map(str, range(len(counts)))), files, "made up")


def sizes(splits: Splits) -> tuple[int, ...]:
    return tuple(map(len, (splits.train, splits.calibration, splits.test, splits.auxiliary)))


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(1, 15), min_size=8, max_size=80),
    st.integers(2, 12),
    st.integers(0, 5),
    st.integers(0, 9),
)
def test_sets_are_disjoint_and_complete(counts: list[int], fewest: int, held_out: int, seed: int) -> None:
    faces = people(counts)
    usable = [person for person, count in enumerate(counts) if count >= 2]
    many = {person for person in usable if counts[person] >= fewest}
    try:
        splits = split_identities(faces, min_images=fewest, held_out=held_out, seed=seed)
    except DataError:
        assert len(usable) < 8 or len(many) < 2
        return
    together = [*splits.train, *splits.calibration, *splits.test, *splits.auxiliary]
    assert sorted(together) == usable
    assert set(splits.train) <= many
    assert min(sizes(splits)) >= 1
    assert min(sizes(splits)[:3]) >= 2
    photos = torch.cat([splits.train_images, splits.gallery_images])
    assert sorted(photos.tolist()) == faces.of(splits.train).tolist()
    for person in splits.train:
        gallery = int((faces.labels[splits.gallery_images] == person).sum())
        assert gallery == min(held_out, counts[person] // 3)


def test_people_with_few_images_are_not_trained_on_and_nobody_is_moved_when_they_suffice() -> None:
    splits = split_identities(people([12] * 50 + [4] * 100), min_images=10, seed=3)
    assert splits.train == tuple(range(50))
    assert sizes(splits) == (50, 30, 40, 30)
    assert len(splits.gallery_images) == 50 * 3


@pytest.mark.parametrize(
    ("many", "few", "expected"),
    [
        (120, 0, (60, 18, 24, 18)),
        (400, 0, (300, 30, 40, 30)),
        (200, 50, (150, 30, 40, 30)),
        (20, 60, (20, 18, 24, 18)),
        (8, 0, (3, 2, 2, 1)),
        (2, 6, (2, 2, 3, 1)),
    ],
)
def test_sizes(many: int, few: int, expected: tuple[int, ...]) -> None:
    assert sizes(split_identities(people([12] * many + [4] * few), min_images=10, seed=0)) == expected


def test_moving_never_takes_more_than_half_of_ten_or_more_people() -> None:
    for total in range(10, 500):
        for few in range(0, total, 7):
            moved = many_to_move(total - few, few)
            assert moved == 0 or few + moved == min(100, total // 2)


def test_a_seed_fixes_the_splits_and_another_changes_them() -> None:
    faces = people([6] * 40)
    first, again, other = (split_identities(faces, min_images=5, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.hashes(faces) == again.hashes(faces) != other.hashes(faces)


def test_the_splits_of_a_seed_never_change() -> None:
    splits = split_identities(people([6] * 10), min_images=5, seed=7)
    assert splits.train == (1, 2, 3, 4, 5)
    assert (splits.calibration, splits.test, splits.auxiliary) == ((0, 7), (6, 8), (9,))
    assert splits.gallery_images.tolist() == [8, 10, 12, 14, 19, 21, 24, 25, 32, 34]
    assert partition(range(7), 3, 5) == ((1, 2, 4), (0, 3), (5, 6))


def test_json_there_and_back() -> None:
    splits = split_identities(people([6] * 12), min_images=5, seed=0)
    assert Splits.from_json(json.loads(json.dumps(splits.to_json()))) == splits


@pytest.mark.parametrize("damage", ["missing", "text", "negative", "overlap", "shared image"])
def test_damaged_json_is_refused(damage: str) -> None:
    stored = split_identities(people([6] * 12), min_images=5, seed=0).to_json()
    if damage == "missing":
        del stored["test"]
    elif damage == "text":
        stored["test"] = ["1"]  # type: ignore[list-item]
    elif damage == "negative":
        stored["test"] = [-1]
    elif damage == "overlap":
        stored["test"].append(stored["train"][0])
    else:
        stored["gallery_images"].append(stored["train_images"][0])
    with pytest.raises(DataError, match="split the data again"):
        Splits.from_json(stored)


def test_hashes_name_each_set_and_notice_a_renamed_file() -> None:
    faces = people([6] * 12)
    splits = split_identities(faces, min_images=5, seed=0)
    before = splits.hashes(faces)
    assert set(before) == {"train", "calibration", "test", "auxiliary", "gallery"}
    assert len(set(before.values())) == 5
    files = list(faces.files)
    files[int(faces.of(splits.test)[0])] = "renamed"
    after = splits.hashes(FaceSet(faces.images, faces.labels, faces.names, tuple(files), ""))
    assert {key for key in before if before[key] != after[key]} == {"test"}


@pytest.mark.parametrize(
    ("counts", "fewest", "message"),
    [
        ([9] * 7, 5, "7 people have two images or more, and 8 are needed"),
        ([9] * 7 + [1] * 20, 5, "7 people"),
        ([9] * 20, 10, r"0 of 20 people have data.min_images=10.*lower data.min_images to 9"),
        ([30] + [4] * 20, 10, r"1 of 21 people.*lower data.min_images to 4"),
        ([9] * 20, 1, "min_images of at least 2"),
    ],
)
def test_too_few_people_is_an_error_with_counts_and_a_way_out(counts: list[int], fewest: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        split_identities(people(counts), min_images=fewest, seed=0)


@given(st.integers(1, 60), st.integers(1, 60), st.integers(0, 5))
def test_each_person_goes_to_one_client_and_clients_are_even(count: int, clients: int, seed: int) -> None:
    train = [3 * person for person in range(count)]
    if clients > count:
        with pytest.raises(DataError, match=r"federation\.clients"):
            partition(train, clients, seed)
        return
    parts = partition(train, clients, seed)
    assert sorted(person for part in parts for person in part) == train
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert partition(train[::-1], clients, seed) == parts


def test_no_clients_is_an_error() -> None:
    with pytest.raises(DataError, match=r"federation\.clients=0"):
        partition([1, 2], 0, 0)


def test_partitions_depend_on_the_seed() -> None:
    assert partition(range(40), 4, 0) != partition(range(40), 4, 1)


@pytest.mark.skipif(not LFW.is_dir(), reason="needs ../shared/data/lfw-devtrain")
def test_lfw_trains_on_the_111_people_with_ten_images() -> None:
    counts = [len(list(folder.iterdir())) for folder in sorted(LFW.iterdir())]
    splits = split_identities(people(counts), min_images=10, seed=0)
    assert sizes(splits) == (111, 96, 128, 95)
    assert all(counts[person] >= 10 for person in splits.train)


@pytest.mark.parametrize("unevenness", [0.5, 1.0, 3.0])
def test_uneven_clients_hold_everybody_once(unevenness: float) -> None:
    parts = partition(range(111), 37, 0, unevenness)
    assert sorted(p for part in parts for p in part) == list(range(111))
    assert min(map(len, parts)) >= 1
    assert partition(range(111), 37, 0, unevenness) == parts
    assert partition(range(111), 37, 1, unevenness) != parts


def test_unevenness_spreads_the_sizes() -> None:
    spread = [max(map(len, partition(range(400), 20, 0, u))) for u in (0.0, 0.5, 1.5)]
    assert spread[0] == 20 < spread[1] < spread[2]


def test_as_many_clients_as_people_hold_one_each() -> None:
    for unevenness in (0.0, 1.0):
        assert {len(part) for part in partition(range(9), 9, 3, unevenness)} == {1}
