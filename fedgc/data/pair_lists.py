"""Lists of photo pairs in the formats of Labeled Faces in the Wild (Huang et al. 2007), and their photos on disk.

``pairs.txt`` (View 2) begins with ``FOLDS<TAB>N``; each fold is N matched pairs ``name<TAB>i<TAB>j``, then N mismatched
pairs ``name1<TAB>i<TAB>name2<TAB>j``. A View-1 list begins with ``N`` and is one fold. Photo i of a person is the file
``name/name_%04d`` with any extension.
"""

from __future__ import annotations

import re
import stat
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple, NoReturn

from fedgc.data.folder import Folder
from fedgc.errors import UsageError

MAX_BYTES = 16_000_000  # a hundred times LFW's pairs.txt
MAX_FOLDS = 100
MAX_PAIRS = 50_000
MAX_NAME = 255  # characters; what a file system takes

ABSENT = "there is no such photo"
SEVERAL = "more than one file of that name"

_FORMATS = "LFW's pairs.txt (first line FOLDS<TAB>N) or a View-1 list (first line N)"


class Photo(NamedTuple):
    person: str
    number: int

    @property
    def stem(self) -> str:
        """Its path in the data folder, without the extension."""
        return f"{self.person}/{self.person}_{self.number:04d}"


@dataclass(frozen=True)
class Pair:
    first: Photo
    second: Photo
    fold: int

    @property
    def photos(self) -> tuple[Photo, Photo]:
        return self.first, self.second

    @property
    def people(self) -> set[str]:
        return {self.first.person, self.second.person}


@dataclass(frozen=True)
class PairList:
    """The pairs in the order of the list, folds ascending from 0."""

    folds: int
    pairs: tuple[Pair, ...]


def read_pairs(path: Path) -> PairList:
    """Read a list as if a stranger had written it; its names never lead out of the data folder.

    Raises:
        UsageError: the file is missing, too large, or not such a list; the message names the line.
    """
    lines = _lines(path)
    folds, size = _header(path, lines)
    promised = 1 + 2 * folds * size
    if len(lines) < promised:
        _refuse(
            path, len(lines), f"the list ends here, but its first line promises {promised - 1} pairs; restore the rest"
        )
    if len(lines) > promised:
        _refuse(
            path, promised + 1, f"more than the {promised - 1} pairs that the first line promises; correct one of them"
        )
    pairs = []
    for at, line in enumerate(lines[1:]):
        fold, within = divmod(at, 2 * size)
        pairs.append(_pair(path, at + 2, line, fold, matched=within < size))
    return PairList(folds, tuple(pairs))


def locate(photos: Iterable[Photo], folder: Folder) -> tuple[dict[Photo, str], dict[Photo, str]]:
    """(path in the folder of each photo found, reason for each of the others). Only what the scan listed is found."""
    listed: dict[str, list[str]] = {}
    for person in folder.people:
        for file in person.files:
            path = f"{person.name}/{file}"
            listed.setdefault(_stem(path), []).append(path)
    refused = {_stem(entry.path): entry.reason for entry in folder.skipped}
    found: dict[Photo, str] = {}
    missing: dict[Photo, str] = {}
    for photo in photos:
        paths = listed.get(photo.stem, [])
        if len(paths) == 1:
            found[photo] = paths[0]
        else:
            missing[photo] = SEVERAL if paths else _why_absent(photo, refused)
    return found, missing


def _why_absent(photo: Photo, refused: Mapping[str, str]) -> str:
    return refused.get(photo.stem, ABSENT)


def _stem(path: str) -> str:
    return PurePosixPath(path).with_suffix("").as_posix()


def _lines(path: Path) -> list[str]:
    """The lines without their ends; empty lines at the end of the file are dropped."""
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):
            raise UsageError(f"the pair list {path} is not a file: give {_FORMATS}")
        if about.st_size > MAX_BYTES:
            raise UsageError(f"the pair list {path} has more than {MAX_BYTES // 1_000_000} MB: give {_FORMATS}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES)
    except (OSError, ValueError) as error:
        raise UsageError(f"the pair list {path} cannot be read ({error}): give {_FORMATS}") from None
    lines = []
    for number, raw in enumerate(data.rstrip(b"\r\n").split(b"\n"), 1):
        try:
            lines.append(raw.removesuffix(b"\r").decode())
        except UnicodeDecodeError:
            _refuse(path, number, "not UTF-8 text; save the list as UTF-8")
    return lines


def _header(path: Path, lines: list[str]) -> tuple[int, int]:
    """Folds, and pairs of each kind in a fold."""
    match = re.fullmatch(r"(?:([0-9]{1,7})\t)?([0-9]{1,7})", lines[0])
    if match is None:
        _refuse(path, 1, f"{_shown(lines[0])} is not how a list begins: give {_FORMATS}")
    folds, size = int(match[1] or 1), int(match[2])
    if not 1 <= folds <= MAX_FOLDS:
        _refuse(path, 1, f"{folds} folds; 1 to {MAX_FOLDS} are possible")
    if not 1 <= 2 * folds * size <= MAX_PAIRS:
        _refuse(path, 1, f"{2 * folds * size} pairs; 2 to {MAX_PAIRS} are possible, split a longer list")
    return folds, size


def _pair(path: Path, number: int, line: str, fold: int, *, matched: bool) -> Pair:
    fields = line.split("\t")
    if len(fields) != (3 if matched else 4):
        form = "name<TAB>i<TAB>j for a matched pair" if matched else "name1<TAB>i<TAB>name2<TAB>j for a mismatched pair"
        _refuse(path, number, f"{_shown(line)} must be {form}; check this line and the counts of the first")
    second_name = fields[0] if matched else fields[2]
    first, second = (
        Photo(_name(path, number, name), _number(path, number, photo))
        for name, photo in ((fields[0], fields[1]), (second_name, fields[-1]))
    )
    if first == second:
        _refuse(path, number, f"a pair of the photo {_shown(first.stem)} with itself; name two photos")
    if not matched and first.person == second.person:
        _refuse(path, number, f"a mismatched pair of {_shown(first.person)} alone; name two people")
    return Pair(first, second, fold)


def _name(path: Path, number: int, name: str) -> str:
    if not name or len(name) > MAX_NAME or not name.isprintable() or name.startswith(".") or set(name) & set("/\\"):
        _refuse(path, number, f"{_shown(name)} is not the name of a person's folder; use one without / or leading dot")
    return name


def _number(path: Path, number: int, text: str) -> int:
    if not re.fullmatch("[0-9]{1,6}", text) or int(text) == 0:
        _refuse(path, number, f"{_shown(text)} is not a photo's number; use 1 to 999999")
    return int(text)


def _refuse(path: Path, number: int, problem: str) -> NoReturn:
    raise UsageError(f"{path}, line {number}: {problem}")


def _shown(text: str, most: int = 60) -> str:
    return ascii(text if len(text) <= most else text[:most] + "...")
