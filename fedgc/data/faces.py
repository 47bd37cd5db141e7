"""Faces of many people in memory: read from a folder, or synthetic."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fedgc.data.align import Align, aligned, check_alignment, shorter_side_needed
from fedgc.data.folder import BARREN, Folder, Skipped, UnusableImageError, decode, read_bytes, scan, skip
from fedgc.errors import DataError

__all__ = ["FaceSet", "Skipped", "load_faces", "synthetic_spec"]

DEFAULT_SYNTHETIC = (120, 12)  # people, images of each
MAX_MEMORY = 16 * 2**30  # bytes of pixels
LONE = "the only usable image of this person (two are needed)"

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class FaceSet:
    """Images with their people.

    images: uint8 (N, 3, S, S) on the CPU. labels: int64 (N,), indices into ``names``, ascending.
    names: one per person. files: the path of each image relative to the source. source: where they come from.
    skipped: what was left out.
    """

    images: Tensor
    labels: Tensor
    names: tuple[str, ...]
    files: tuple[str, ...]
    source: str
    skipped: tuple[Skipped, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.images)
        if self.images.dtype != torch.uint8 or self.images.ndim != 4 or self.images.shape[1] != 3:
            raise ValueError(f"images must be uint8 (N, 3, S, S), not {self.images.dtype} {tuple(self.images.shape)}")
        if self.labels.dtype != torch.int64 or self.labels.shape != (n,) or len(self.files) != n:
            raise ValueError(f"{n} images need {n} int64 labels and {n} files")
        if n and (bool((self.labels.diff() < 0).any()) or self.labels[0] < 0 or self.labels[-1] >= len(self.names)):
            raise ValueError(f"labels must ascend within 0..{len(self.names) - 1}")

    def __len__(self) -> int:
        return len(self.labels)

    def counts(self) -> Tensor:
        """How many images each person has: int64 (people,)."""
        return torch.bincount(self.labels, minlength=len(self.names))

    def of(self, identities: Sequence[int]) -> Tensor:
        """Indices of the images of these people: int64, person after person in the order given."""
        stops = self.counts().cumsum(0).tolist()
        starts = [0, *stops]
        people = [int(identity) for identity in identities]
        if any(not 0 <= person < len(self.names) for person in people):
            raise IndexError(f"identities must lie within 0..{len(self.names) - 1}")
        ranges = [torch.arange(starts[person], stops[person]) for person in people]
        return torch.cat(ranges) if ranges else torch.empty(0, dtype=torch.int64)

    def float_images(self, indices: Tensor | Sequence[int]) -> Tensor:
        """Images as float32 (n, 3, S, S) in [0, 1]."""
        return self.images[torch.as_tensor(indices, dtype=torch.int64)].to(torch.float32) / 255

    def fingerprint(self) -> str:
        """SHA-256 (hex) over images, labels and names; the same on every platform."""
        digest = hashlib.sha256(repr((tuple(self.images.shape), self.names)).encode())
        digest.update(self.labels.numpy().astype("<i8").tobytes())
        digest.update(self.images.contiguous().numpy().data)
        return digest.hexdigest()


def load_faces(
    source: str,
    *,
    image_size: int,
    align: Align,
    seed: int,
    center_fraction: float = 0.52,
    progress: Progress | None = None,
) -> FaceSet:
    """Load faces as squares of ``image_size`` pixels.

    ``source`` is ``synthetic``, ``synthetic:IDENTITIESxIMAGES`` (default 120x12), or a folder with one
    sub-folder of images per person. ``seed`` draws the synthetic people and nothing else. ``align``
    (:mod:`fedgc.data.align`) has no effect on synthetic faces. ``progress`` is called with the number of
    images done and in all. People with fewer than two usable images are left out and named in ``skipped``, as
    is every file that cannot be used.

    Raises:
        DataError: the source does not exist or holds nobody who can be used, or an argument is out of range.
    """
    check_alignment(align, image_size, center_fraction)
    spec = synthetic_spec(source)
    if spec is not None:
        return _synthetic(*spec, image_size, seed)
    return _from_folder(scan(source), source, image_size, align, center_fraction, progress)


def synthetic_spec(source: str) -> tuple[int, int] | None:
    """(people, images of each) if the source is a synthetic one, else None.

    Raises:
        DataError: it begins like one but is not.
    """
    if source == "synthetic":
        return DEFAULT_SYNTHETIC
    if not source.startswith("synthetic:"):
        return None
    match = re.fullmatch(r"synthetic:([0-9]{1,7})x([0-9]{1,7})", source)
    people, images = (int(match[1]), int(match[2])) if match else (0, 0)
    if people < 1 or images < 2:
        raise DataError(
            f"data.source={source!r}: write synthetic:IDENTITIESxIMAGES with at least 2 images each, "
            "as in synthetic:120x12"
        )
    return people, images


def _synthetic(people: int, images: int, size: int, seed: int) -> FaceSet:
    from fedgc.data.synthetic import synthetic_faces

    _check_memory(people * images, size, f"synthetic:{people}x{images}")
    pixels, labels = synthetic_faces(people, images, size, seed)
    order = torch.argsort(labels, stable=True)
    return FaceSet(
        images=pixels[order],
        labels=labels[order],
        names=tuple(f"synthetic-{person:04d}" for person in range(people)),
        files=tuple(f"synthetic/{person:04d}/{image:02d}" for person in range(people) for image in range(images)),
        source=f"synthetic:{people}x{images}",
    )


def _from_folder(
    folder: Folder, source: str, size: int, align: Align, fraction: float, progress: Progress | None
) -> FaceSet:
    total = sum(len(person.files) for person in folder.people)
    _check_memory(total, size, source)
    pixels = torch.empty((total, 3, size, size), dtype=torch.uint8)
    skipped = list(folder.skipped)
    names: list[str] = []
    files: list[str] = []
    labels: list[int] = []
    done = 0
    for person in folder.people:
        usable: list[str] = []
        for file in person.files:
            path = folder.root / person.name / file
            try:
                pixels[len(files) + len(usable)] = _face(path, size, align, fraction)
                usable.append(f"{person.name}/{file}")
            except UnusableImageError as problem:
                skipped.append(skip(folder.root, path, str(problem)))
            done += 1
            if progress is not None:
                progress(done, total)
        if len(usable) < 2:  # the next person's images take the place of a lone one
            what, why = (usable[0], LONE) if usable else (person.name, BARREN)
            skipped.append(skip(folder.root, folder.root / what, why))
            continue
        labels += [len(names)] * len(usable)
        names.append(person.name)
        files += usable
    if not names:
        raise DataError(_nobody(source, skipped))
    return FaceSet(
        images=pixels if len(files) == total else pixels[: len(files)].clone(),
        labels=torch.from_numpy(np.array(labels, dtype=np.int64)),
        names=tuple(names),
        files=tuple(files),
        source=source,
        skipped=tuple(sorted(skipped, key=lambda entry: entry.path)),
    )


def _face(path: Path, size: int, align: Align, fraction: float) -> Tensor:
    image = decode(read_bytes(path), shorter_side=shorter_side_needed(align, size, fraction))
    return torch.from_numpy(aligned(image, align, size, fraction))


def _check_memory(images: int, size: int, source: str) -> None:
    need = images * 3 * size * size
    if need > MAX_MEMORY:
        raise DataError(
            f"{source!r}: {images:,} images of {size} x {size} pixels need {need / 2**30:.1f} GiB of memory, "
            f"and {MAX_MEMORY / 2**30:.0f} GiB is the limit; use fewer images or a smaller data.image_size"
        )


def _nobody(source: str, skipped: Sequence[Skipped]) -> str:
    reasons = Counter(entry.reason for entry in skipped).most_common(4)
    listed = "; ".join(f"{count} x {reason}" for reason, count in reasons)
    return (
        f"the data folder {source!r} has nobody with two usable images ({listed}); "
        "give at least two images per person, and see `fedgc-priv data inspect` for each file"
    )
