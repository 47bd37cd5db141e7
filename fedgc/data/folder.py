"""A folder of faces on disk: one sub-folder of images per person, read as if a stranger had filled it.

Whatever cannot be used is named with a reason and left out; it never stops the rest. Reasons are fixed
phrases, so that they can be counted.
"""

from __future__ import annotations

import io
import os
import stat
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fedgc.errors import DataError
from fedgc.limits import raise_if_short, require_room

FORMATS = ("JPEG", "PNG", "PPM", "BMP", "WEBP")  # Pillow's names; PPM includes PGM
MAX_PIXELS = 25_000_000
MAX_BYTES = 200_000_000  # more than MAX_PIXELS of uncompressed 16-bit RGBA would need
MIN_SIDE = 8
JOURNAL = ".prepared.jsonl"  # of a folder whose preparation did not finish (fedgc.data.prepared)

EMPTY = "the file is empty"
FOREIGN = "not a JPEG, PNG, PPM/PGM, BMP or WebP image"
DAMAGED = "truncated or damaged"
TOO_LARGE = f"more than {MAX_PIXELS // 1_000_000} megapixels, or a file of more than {MAX_BYTES // 1_000_000} MB"
TOO_SMALL = f"smaller than {MIN_SIDE} x {MIN_SIDE} pixels"
FLOATING = "floating-point pixels, whose range is unknown"
UNREADABLE = "no permission, or it cannot be read"
OUTSIDE = "a link that leaves the data folder, or leads nowhere"
REPEATED = "a link to what is already in the data folder"
NESTED = "a folder inside a person's folder"
LOOSE = "not inside a person's folder"
SPECIAL = "neither a regular file nor a folder"
UNNAMEABLE = "a name that is not valid text"
BARREN = "no usable image of this person"


@dataclass(frozen=True)
class Skipped:
    """Something left out: its path relative to the data folder, and why."""

    path: str
    reason: str


@dataclass(frozen=True)
class Person:
    """A sub-folder's name and its files, sorted by name; a file's path in the set is ``name/file``."""

    name: str
    files: tuple[str, ...]


@dataclass(frozen=True)
class Folder:
    """What a scan found, before any image is opened."""

    root: Path
    people: tuple[Person, ...]
    skipped: tuple[Skipped, ...]


class UnusableImageError(Exception):
    """One image cannot be used; the text is the reason."""


def scan(source: str) -> Folder:
    """List the people and files of a folder. Hidden entries are ignored, everything else is listed or named.

    The real path of each entry must lie inside the folder, and each real path is used once: a second way to
    the same person or photo could put it on both sides of a split.

    Raises:
        DataError: the folder is missing, unreadable, not a folder, empty, half prepared, or has no sub-folder.
    """
    root = _root(source)
    if (root / JOURNAL).exists():
        raise DataError(f"{source!r} is not completely prepared: run the same `fedgc-priv data` command again first")
    skipped: list[Skipped] = []
    seen: set[Path] = set()
    folders = []
    for entry in _allowed(root, _listed(root, root, skipped), seen, skipped):
        if entry.is_dir():
            folders.append(entry)
        else:
            skipped.append(skip(root, entry, LOOSE))
    files: dict[str, list[str]] = {folder.name: [] for folder in folders}
    inside = [entry for folder in folders for entry in _listed(root, folder, skipped)]
    for entry in _allowed(root, inside, seen, skipped):
        if entry.is_dir():
            skipped.append(skip(root, entry, NESTED))
        else:
            files[entry.parent.name].append(entry.name)
    if not folders:
        raise DataError(_nobody(source, skipped))
    people = tuple(Person(name, tuple(sorted(files[name]))) for name in sorted(files))
    return Folder(root, people, tuple(skipped))


def skip(root: Path, path: Path, reason: str) -> Skipped:
    """Name what is left out; control characters and odd bytes are escaped, so it can be printed anywhere."""
    name = path.relative_to(root).as_posix()
    return Skipped(name if name.isprintable() else ascii(name)[1:-1], reason)


def by_reason(skipped: Iterable[Skipped], examples: int = 5) -> dict[str, dict[str, Any]]:
    """For each reason its ``count`` and up to so many ``examples`` of paths."""
    paths: dict[str, list[str]] = defaultdict(list)
    for entry in sorted(skipped, key=lambda entry: entry.path):
        paths[entry.reason].append(entry.path)
    return {reason: {"count": len(some), "examples": some[:examples]} for reason, some in sorted(paths.items())}


def read_bytes(path: Path) -> bytes:
    """The bytes of one image file.

    Raises:
        UnusableImageError: the file is empty, unreadable, or larger than any accepted image can be.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnusableImageError(TOO_LARGE)
        data = path.read_bytes()
    except OSError as error:
        raise_if_short(error)
        raise UnusableImageError(UNREADABLE) from None
    if not data:
        raise UnusableImageError(EMPTY)
    return data


def decode(data: bytes, *, shorter_side: int | None = None) -> Image.Image:
    """The first frame as an upright 8-bit RGB image.

    Orientation follows EXIF, transparency is laid over white, 16-bit grey is scaled by its full range, and
    other modes are converted as Pillow defines. ``shorter_side`` lets a JPEG be decoded at 1/2, 1/4 or 1/8 of
    its size, as long as its shorter side keeps at least that many pixels.

    Raises:
        UnusableImageError: not an accepted format, too large or small, truncated, or damaged.
        MemoryError: memory is short. No accepted image is to blame: its size is judged by its header.
    """
    pixels = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            _header(data).verify()  # checks the CRCs of a PNG; the image has to be opened again afterwards
            image = _header(data)
            pixels = image.width * image.height
            if shorter_side is not None:
                ratio = shorter_side / min(image.size)
                image.draft(None, (round(image.width * ratio), round(image.height * ratio)))
            image.load()
            return _rgb(_upright(image))
        except UnusableImageError:
            raise
        except UnidentifiedImageError:
            raise UnusableImageError(FOREIGN) from None
        except (Image.DecompressionBombError, Image.DecompressionBombWarning):
            raise UnusableImageError(TOO_LARGE) from None
        except Exception as error:  # a hostile file can make a decoder raise nearly anything
            raise_if_short(error)
            if data[8:12] == b"WEBP":
                require_room(8 * (pixels or MAX_PIXELS))  # its decoder says the same of damage and of want of memory
            raise UnusableImageError(DAMAGED) from None


def describe(data: bytes) -> tuple[str, int, int]:
    """Format, width and height from the header; only for data that :func:`decode` accepted."""
    image = _header(data)
    return ("JPEG" if image.format == "MPO" else str(image.format)), image.width, image.height


def _root(source: str) -> Path:
    path = Path(source).expanduser()
    hint = "give a folder with one sub-folder of images per person, or 'synthetic' for built-in faces"
    try:
        root = path.resolve(strict=True)
        mode = root.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        raise DataError(f"there is no folder {source!r} (seen from {Path.cwd()}); {hint}") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise DataError(f"the data folder {source!r} cannot be opened ({error}); {hint}") from None
    if not stat.S_ISDIR(mode):
        raise DataError(f"{source!r} is not a folder; {hint} (unpack an archive first)")
    try:
        with os.scandir(root) as entries:
            next(entries, None)
    except OSError as error:
        raise DataError(
            f"the data folder {source!r} cannot be listed ({error.strerror}); check its permissions"
        ) from None
    return root


def _listed(root: Path, folder: Path, skipped: list[Skipped]) -> list[Path]:
    """The visible entries of a folder."""
    try:
        return [folder / name for name in os.listdir(folder) if not name.startswith(".")]
    except OSError:
        skipped.append(skip(root, folder, UNREADABLE))
        return []


def _allowed(root: Path, entries: list[Path], seen: set[Path], skipped: list[Skipped]) -> Iterator[Path]:
    """The entries that may be opened; the others go to ``skipped``."""
    # Links come last, so that none takes the place of what it points to.
    for entry in sorted(entries, key=lambda entry: (os.path.islink(entry), entry)):
        reason = _refusal(root, entry, seen)
        if reason is None:
            yield entry
        else:
            skipped.append(skip(root, entry, reason))


def _refusal(root: Path, path: Path, seen: set[Path]) -> str | None:
    """Why an entry must not be opened, or None. Remembers its real path in ``seen``."""
    try:
        path.name.encode()
        real = path.resolve(strict=True)
        mode = real.stat().st_mode
    except UnicodeEncodeError:
        return UNNAMEABLE
    except PermissionError:
        return UNREADABLE
    except (OSError, RuntimeError):
        return OUTSIDE
    if not real.is_relative_to(root):
        return OUTSIDE
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        return SPECIAL  # opening a fifo or a device could block for ever
    if real in seen or real == root:
        return REPEATED
    seen.add(real)
    return None


def _nobody(source: str, skipped: list[Skipped]) -> str:
    if any(entry.reason == LOOSE for entry in skipped):
        found = f"has files but no sub-folders ({skipped[0].path}, ...)"
    elif skipped:
        found = f"has no sub-folder that can be used ({skipped[0].path}: {skipped[0].reason})"
    else:
        found = "is empty"
    return f"the data folder {source!r} {found}; put the images of each person into a sub-folder of their own"


def _header(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise UnusableImageError(TOO_LARGE)
    if min(image.size) < MIN_SIDE:
        raise UnusableImageError(TOO_SMALL)
    return image


def _upright(image: Image.Image) -> Image.Image:
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception as error:  # damaged metadata does not spoil the pixels
        raise_if_short(error)
        return image
    return image


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    if image.mode == "F":
        raise UnusableImageError(FLOATING)
    if image.mode.startswith("I"):  # Pillow's own conversion would clip at 255
        grey = np.asarray(image).astype(np.float64).clip(0, 65535) / 257
        return Image.fromarray(grey.round().astype(np.uint8)).convert("RGB")
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")
