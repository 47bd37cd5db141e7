"""Lists of pairs: what is read, what is refused and on which line, and which photos they find."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from fedgc.data import pair_lists
from fedgc.data.folder import OUTSIDE, scan
from fedgc.data.pair_lists import ABSENT, SEVERAL, Pair, PairList, Photo, locate, read_pairs
from fedgc.errors import UsageError

VIEW_1 = "2\nAnn\t1\t2\nBob Ray\t3\t12\nAnn\t1\tBob Ray\t3\nCy\t4\tAnn\t2\n"


def written(listed: PairList) -> str:
    """The inverse of `read_pairs`."""
    size = len(listed.pairs) // listed.folds // 2
    lines = [str(size) if listed.folds == 1 else f"{listed.folds}\t{size}"]
    for pair in listed.pairs:
        (a, i), (b, j) = pair.photos
        lines.append(f"{a}\t{i}\t{j}" if a == b else f"{a}\t{i}\t{b}\t{j}")
    return "\n".join(lines) + "\n"


def save(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "pairs.txt"
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def test_a_view_1_list(tmp_path: Path) -> None:
    listed = read_pairs(save(tmp_path, VIEW_1))
    assert listed == PairList(
        1,
        (
            Pair(Photo("Ann", 1), Photo("Ann", 2), 0),
            Pair(Photo("Bob Ray", 3), Photo("Bob Ray", 12), 0),
            Pair(Photo("Ann", 1), Photo("Bob Ray", 3), 0),
            Pair(Photo("Cy", 4), Photo("Ann", 2), 0),
        ),
    )
    assert Photo("Bob Ray", 12).stem == "Bob Ray/Bob Ray_0012"


@pytest.mark.parametrize("folds", [1, 3, 10])
def test_round_trip(tmp_path: Path, folds: int) -> None:
    pairs = []
    for fold in range(folds):
        pairs += [Pair(Photo(f"P{fold}", 1), Photo(f"P{fold}", n), fold) for n in (2, 3)]
        pairs += [Pair(Photo(f"P{fold}", n), Photo("É_Q", 9), fold) for n in (2, 3)]
    listed = PairList(folds, tuple(pairs))
    text = written(listed)
    assert read_pairs(save(tmp_path, text)) == listed
    assert read_pairs(save(tmp_path, text.replace("\n", "\r\n") + "\r\n\r\n")) == listed


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("", 1, "how a list begins"),
        ("10 300\n", 1, "how a list begins"),
        ("ten\n", 1, "how a list begins"),
        ("-1\n", 1, "how a list begins"),
        ("99999999\n", 1, "how a list begins"),
        ("0\n", 1, "0 pairs"),
        ("0\t300\n", 1, "0 folds"),
        ("101\t1\n", 1, "101 folds"),
        ("9999999\n", 1, "split a longer list"),
        ("2\nAnn\t1\t2\n", 2, "ends here"),
        (VIEW_1 + "Ann\t1\t3\n", 6, "more than the 4 pairs"),
        (VIEW_1.replace("Cy\t4\tAnn\t2", "Cy\t4\t2"), 5, "name1<TAB>i<TAB>name2<TAB>j"),
        (VIEW_1.replace("Ann\t1\t2", "Ann\t1\tCy\t2", 1), 2, "name<TAB>i<TAB>j"),
        (VIEW_1.replace("Ann\t1\t2", "Ann 1 2", 1), 2, "name<TAB>i<TAB>j"),
        (VIEW_1.replace("Ann\t1\t2", "", 1), 2, "name<TAB>i<TAB>j"),
        (VIEW_1.replace("Ann\t1\t2", "Ann\t1\t1", 1), 2, "with itself"),
        (VIEW_1.replace("Cy\t4\tAnn", "Ann\t4\tAnn"), 5, "name two people"),
        (VIEW_1.replace("3\t12", "3\t0"), 3, "photo's number"),
        (VIEW_1.replace("3\t12", "3\t1e3"), 3, "photo's number"),
        (VIEW_1.replace("3\t12", "3\t\u0663"), 3, "photo's number"),
        (VIEW_1.replace("3\t12", "3\t" + "9" * 5000), 3, "photo's number"),
        (VIEW_1.replace("Cy", "../Cy"), 5, "not the name"),
        (VIEW_1.replace("Cy", ".."), 5, "not the name"),
        (VIEW_1.replace("Cy", "/etc"), 5, "not the name"),
        (VIEW_1.replace("Cy", "a\\b"), 5, "not the name"),
        (VIEW_1.replace("Cy", "C\0y"), 5, "not the name"),
        (VIEW_1.replace("Cy", "C\x1b[2Jy"), 5, "not the name"),
        (VIEW_1.replace("Cy", ""), 5, "not the name"),
        (VIEW_1.replace("Cy", "C" * 256), 5, "not the name"),
        (VIEW_1.encode().replace(b"Cy", b"C\xff"), 5, "UTF-8"),
    ],
)
def test_damage_is_named_with_its_line(tmp_path: Path, text: str | bytes, line: int, words: str) -> None:
    path = save(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        read_pairs(path)
    message = str(caught.value)
    assert f"{path}, line {line}: " in message
    assert words in message
    assert message.isprintable()
    assert len(message) < len(str(path)) + 250


def test_a_list_must_be_a_file_of_modest_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_pairs(tmp_path / "none.txt")
    with pytest.raises(UsageError, match="not a file"):
        read_pairs(tmp_path)
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(UsageError, match="not a file"):
        read_pairs(tmp_path / "fifo")
    monkeypatch.setattr(pair_lists, "MAX_BYTES", 10)
    with pytest.raises(UsageError, match="more than"):
        read_pairs(save(tmp_path, VIEW_1))


def test_photos_are_found_by_number_whatever_the_extension(tmp_path: Path) -> None:
    root = tmp_path / "faces"
    (root / "Ann").mkdir(parents=True)
    for name in ("Ann_0001.png", "Ann_0002.jpg", "Ann_0002.png"):
        Image.new("RGB", (16, 16)).save(root / "Ann" / name)
    (tmp_path / "secret.png").write_bytes(b"x")
    (root / "Ann" / "Ann_0003.png").symlink_to(tmp_path / "secret.png")
    photos = [Photo("Ann", n) for n in (1, 2, 3, 4)] + [Photo("Nobody", 1)]
    found, missing = locate(photos, scan(str(root)))
    assert found == {photos[0]: "Ann/Ann_0001.png"}
    assert missing == {photos[1]: SEVERAL, photos[2]: OUTSIDE, photos[3]: ABSENT, photos[4]: ABSENT}
