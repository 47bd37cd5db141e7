"""What a source of faces holds, before anything is trained on it."""

from __future__ import annotations

import hashlib
from collections import Counter, defaultdict
from collections.abc import Sequence
from statistics import median
from typing import Any

from fedgc.data.faces import LONE, Progress, synthetic_spec
from fedgc.data.folder import (
    BARREN,
    MIN_SIDE,
    Folder,
    Skipped,
    UnusableImageError,
    by_reason,
    decode,
    describe,
    read_bytes,
    scan,
    skip,
)
from fedgc.data.splits import many_to_move, too_few

EXAMPLES = 5
MIN_IMAGES = (5, 10, 20)  # values of data.min_images that the suggestions try


def inspect(source: str, *, examples: int = EXAMPLES, progress: Progress | None = None) -> dict[str, Any]:
    """Describe a source (as for :func:`fedgc.data.faces.load_faces`); every image is decoded once.

    The result can be given to ``json.dumps``: ``source``; ``people`` and ``images`` that can be used;
    ``images_per_person`` (min, median, max, or None); ``sizes`` (the commonest, in pixels) and ``formats``;
    ``skipped`` (for each reason its ``count`` and up to ``examples`` paths); ``people_with_one_image``;
    ``duplicates`` (files with the same bytes, under one person and under several); ``splits`` (for some
    values of ``data.min_images`` how many people would be trained on, or why none); ``suggestions`` in words.

    Raises:
        DataError: the source is missing, is not a folder, or has no sub-folder.
    """
    spec = synthetic_spec(source)
    if spec is not None:
        people, images = spec
        return _summary(source, [images] * people, Counter(), Counter({"synthetic": people * images}), [], [], examples)
    folder = scan(source)
    census = _Census()
    total, done = sum(len(person.files) for person in folder.people), 0
    for person in folder.people:
        for file in person.files:
            census.add(folder, person.name, file)
            done += 1
            if progress is not None:
                progress(done, total)
    skipped = [*folder.skipped, *census.skipped]
    counts = []
    for person in folder.people:
        usable = census.usable[person.name]
        counts.append(len(usable))
        if len(usable) < 2:
            what, why = (usable[0], LONE) if usable else (person.name, BARREN)
            skipped.append(skip(folder.root, folder.root / what, why))
    return _summary(source, counts, census.sizes, census.formats, skipped, census.duplicates(), examples)


class _Census:
    """What is learnt from one file after another."""

    def __init__(self) -> None:
        self.usable: dict[str, list[str]] = defaultdict(list)
        self.skipped: list[Skipped] = []
        self.sizes: Counter[tuple[int, int]] = Counter()
        self.formats: Counter[str] = Counter()
        self._same: dict[bytes, list[tuple[str, str]]] = defaultdict(list)

    def add(self, folder: Folder, person: str, file: str) -> None:
        path = folder.root / person / file
        try:
            data = read_bytes(path)
            decode(data, shorter_side=MIN_SIDE)  # a JPEG is read to its end, but drawn small
        except UnusableImageError as problem:
            self.skipped.append(skip(folder.root, path, str(problem)))
            return
        kind, width, height = describe(data)
        self.usable[person].append(f"{person}/{file}")
        self.sizes[width, height] += 1
        self.formats[kind] += 1
        self._same[hashlib.sha256(data).digest()].append((person, f"{person}/{file}"))

    def duplicates(self) -> list[list[tuple[str, str]]]:
        """Groups of (person, path) whose files have the same bytes."""
        return [group for group in self._same.values() if len(group) > 1]


def _summary(
    source: str,
    counts: Sequence[int],
    sizes: Counter[tuple[int, int]],
    formats: Counter[str],
    skipped: Sequence[Skipped],
    same: Sequence[Sequence[tuple[str, str]]],
    examples: int,
) -> dict[str, Any]:
    usable = [count for count in counts if count >= 2]
    across = [group for group in same if len({person for person, _ in group}) > 1]
    within = [group for group in same if len({person for person, _ in group}) < len(group)]
    splits = [_split(usable, fewest) for fewest in MIN_IMAGES]
    summary = {
        "source": source,
        "people": len(usable),
        "images": sum(usable),
        "images_per_person": _spread(usable),
        "sizes": [{"width": w, "height": h, "images": n} for (w, h), n in sizes.most_common(max(1, examples))],
        "formats": dict(formats.most_common()),
        "skipped": by_reason(skipped, examples),
        "people_with_one_image": counts.count(1),
        "duplicates": {
            "across_people": _groups(across, examples),
            "within_people": _groups(within, examples),
        },
        "splits": splits,
    }
    return summary | {"suggestions": [*_warnings(len(across), len(within), skipped), *map(_advice, splits)]}


def _spread(counts: Sequence[int]) -> dict[str, float] | None:
    return {"min": min(counts), "median": median(counts), "max": max(counts)} if counts else None


def _groups(groups: Sequence[Sequence[tuple[str, str]]], examples: int) -> dict[str, Any]:
    return {"count": len(groups), "examples": [[path for _, path in group] for group in groups[:examples]]}


def _split(counts: Sequence[int], fewest: int) -> dict[str, Any]:
    """What :func:`fedgc.data.splits.split_identities` would do with people of so many images."""
    problem = too_few(counts, fewest)
    if problem is not None:
        return {"min_images": fewest, "trained_on": 0, "others": 0, "why": problem}
    many = sum(count >= fewest for count in counts)
    trained = many - many_to_move(many, len(counts) - many)
    return {"min_images": fewest, "trained_on": trained, "others": len(counts) - trained, "why": None}


def _warnings(across: int, within: int, skipped: Sequence[Skipped]) -> list[str]:
    lines = []
    if across:
        lines.append(
            f"warning: {across} image(s) lie under several people; the copies can put one person on both "
            "sides of a split, so remove the wrong ones"
        )
    if within:
        lines.append(
            f"warning: {within} image(s) occur twice under one person; one copy can be trained on and the "
            "other held out, so remove one"
        )
    if skipped:
        lines.append(f"{len(skipped)} entries are left out; `skipped` names them")
    return lines


def _advice(split: dict[str, Any]) -> str:
    start = f"data.min_images={split['min_images']}: "
    if split["why"] is not None:
        return f"{start}not possible: {split['why']}"
    trained, others = split["trained_on"], split["others"]
    return f"{start}{trained} people are trained on, {others} serve calibration, test and auxiliary"
