"""Public sets of faces through scikit-learn's loaders, written as a prepared folder.

scikit-learn downloads (and checks) each set once into its own cache; photos are kept as they are, without alignment.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fedgc.data.folder import scan
from fedgc.data.preparation import Recipe, Stages, fill
from fedgc.errors import DataError, UsageError, WorkFailedError
from fedgc.limits import raise_if_short

LFW_PHOTOS = 13_233  # of 5,749 people, in the published archive
OLIVETTI_SIDE = 64
TRIES = 2


@dataclass(frozen=True)
class Source:
    """A public set. ``locate`` gives a folder with one sub-folder a person, for as long as its context lasts."""

    name: str
    what: str
    terms: str
    locate: Callable[[], contextlib.AbstractContextManager[Path]]


def fetch(
    name: str, destination: Path, *, jobs: int | None = None, progress: Stages = lambda stage, done, total: None
) -> dict[str, Any]:
    """Write a public set into ``destination``; returns a document as :func:`fedgc.data.preparation.prepare` does.

    Raises:
        UsageError: no such set.
        WorkFailedError: it is not in scikit-learn's cache and cannot be downloaded.
        DataError: the destination holds something else.
    """
    if name not in SOURCES:
        raise UsageError(f"no set {name!r}: choose from {', '.join(SOURCES)}")
    source = SOURCES[name]
    progress("downloading", 0, 1)
    with source.locate() as folder:
        progress("downloading", 1, 1)
        recipe = Recipe("original")
        return fill(scan(str(folder)), name, destination, recipe, terms=source.terms, jobs=jobs, progress=progress)


@contextmanager
def _lfw() -> Iterator[Path]:
    """The funneled 250 x 250 photos, with their names and numbers, from where the loader unpacks them.

    The loader's own arrays would hold 10 GB of floats at full size, in shuffled order and without the numbers that LFW's
    pair lists refer to; a tiny crop makes it download, check and unpack.
    """
    from sklearn.datasets import fetch_lfw_people, get_data_home

    crop = (slice(0, 8), slice(0, 8))
    _downloaded(
        "lfw", lambda: fetch_lfw_people(resize=None, color=True, slice_=crop, min_faces_per_person=0, n_retries=TRIES)
    )
    folder = Path(get_data_home()) / "lfw_home" / "lfw_funneled"
    photos = sum(1 for _ in folder.glob("*/*.jpg"))
    if photos != LFW_PHOTOS:
        raise DataError(
            f"{folder} holds {photos} photos of {LFW_PHOTOS}: an earlier download was cut off. "
            f"Delete {folder.parent}, and fetch again"
        )
    yield folder


@contextmanager
def _olivetti() -> Iterator[Path]:
    """400 grey photos (64 x 64, float32 in [0, 1], ten of each person), as a folder of PNGs that is deleted afterwards."""
    from sklearn.datasets import fetch_olivetti_faces

    bunch = _downloaded("olivetti", lambda: fetch_olivetti_faces(shuffle=False, n_retries=TRIES))
    photos, people = np.asarray(bunch.images), np.asarray(bunch.target)
    square = (
        photos.ndim == 3 and photos.shape[1:] == (OLIVETTI_SIDE, OLIVETTI_SIDE) and people.shape == photos.shape[:1]
    )
    if not square or photos.min() < 0 or photos.max() > 1:
        raise DataError(
            f"scikit-learn's Olivetti faces have shape {photos.shape} and are not grey values in [0, 1] of "
            f"{OLIVETTI_SIDE} x {OLIVETTI_SIDE} pixels; use another version of scikit-learn"
        )
    with tempfile.TemporaryDirectory() as name:
        numbers: dict[int, int] = {}
        for photo, person in zip(np.round(photos * 255).astype(np.uint8), people.tolist(), strict=True):
            numbers[person] = numbers.get(person, 0) + 1
            folder = Path(name) / f"person-{person + 1:02d}"
            folder.mkdir(exist_ok=True)
            Image.fromarray(photo).save(folder / f"person-{person + 1:02d}_{numbers[person]:04d}.png")
        yield Path(name)


def _downloaded(name: str, load: Callable[[], Any]) -> Any:
    """What the loader returns. It prints and warns about addresses; that is not for our output."""
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            return load()
    except OSError as error:  # URLError, a timeout, a checksum that is wrong, a full disk
        reason = getattr(error, "reason", None) or error.strerror or type(error).__name__
        raise WorkFailedError(
            f"{name} could not be downloaded by scikit-learn ({reason}): connect to the network and run it again, or use "
            "photos of your own (see `fedgc-priv data prepare --help`)"
        ) from None
    except Exception as error:  # a damaged cache makes its readers raise nearly anything
        raise_if_short(error)
        raise WorkFailedError(
            f"scikit-learn's cache of {name} cannot be read ({type(error).__name__}): delete that set from its data folder "
            "(sklearn.datasets.get_data_home()), and fetch again"
        ) from None


SOURCES = {
    source.name: source
    for source in (
        Source(
            "lfw",
            "Labeled Faces in the Wild, funneled: 13,233 photos of 5,749 people, 250 x 250",
            "research use only; press photos taken without the consent of the people shown; do not redistribute "
            "(Huang et al. 2007, University of Massachusetts)",
            _lfw,
        ),
        Source(
            "olivetti",
            "Olivetti faces: 400 grey photos of 40 people, 64 x 64",
            "research use; credit AT&T Laboratories Cambridge wherever they are used (Samaria & Harter 1994)",
            _olivetti,
        ),
    )
}
