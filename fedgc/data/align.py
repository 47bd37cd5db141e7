"""From a photo to a square face image.

``none``    the largest central square of the photo, resized.
``center``  the central square of ``center_fraction`` times the shorter side: for photos that are framed
            alike, such as deep-funneled LFW, whose faces fill the middle half.
``mtcnn``   the largest face that MTCNN finds (Zhang et al. 2016, arXiv:1604.02878), moved, turned and scaled
            so that its five landmarks fall on the template of ArcFace (Deng et al. 2019, arXiv:1801.07698).
"""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from fedgc.data.folder import UnusableImageError
from fedgc.errors import DataError

Align = Literal["none", "center", "mtcnn"]
ALIGNMENTS: tuple[str, ...] = get_args(Align)

NO_FACE = "no face found"
DETECTION_SIDE = 1024  # pixels of the longer side that the detector sees at most
SMALLEST_FACE = 20  # pixels; also the smallest image in which the detector can look

# Eyes, nose tip and corners of the mouth, (x, y) in pixels of a 112 x 112 image.
ARCFACE_TEMPLATE = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)

Floats = NDArray[np.float64]


def aligned(image: Image.Image, align: Align, size: int, center_fraction: float = 0.52) -> NDArray[np.uint8]:
    """One RGB photo as a uint8 array (3, size, size).

    Raises:
        UnusableImageError: ``mtcnn`` finds no face.
    """
    if align == "mtcnn":
        face = warp(image, similarity(landmarks(image), ARCFACE_TEMPLATE * (size / 112)), size)
    else:
        face = central_square(image, size, center_fraction if align == "center" else 1.0)
    return np.ascontiguousarray(np.asarray(face, dtype=np.uint8).transpose(2, 0, 1))


def check_alignment(align: str, size: int, center_fraction: float) -> None:
    """Raises DataError for an unknown alignment, or a size or fraction out of range."""
    if not 8 <= size <= 1024:
        raise DataError(f"data.image_size={size}: choose 8 to 1024 pixels (64 and 112 are usual)")
    if align not in ALIGNMENTS:
        raise DataError(f"data.align={align!r}: choose one of {', '.join(ALIGNMENTS)}")
    if not 0 < center_fraction <= 1:
        raise DataError(f"the central fraction {center_fraction} must lie in (0, 1]")


def shorter_side_needed(align: Align, size: int, center_fraction: float) -> int:
    """Pixels of a photo's shorter side that matter: a face image is drawn from at least twice its own."""
    if align == "mtcnn":
        return max(DETECTION_SIDE, 4 * size)
    return math.ceil(2 * size / (center_fraction if align == "center" else 1.0))


def central_square(image: Image.Image, size: int, fraction: float) -> Image.Image:
    """The central square of ``fraction`` times the shorter side, resized with antialiasing."""
    side = fraction * min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box, reducing_gap=3.0)


def landmarks(image: Image.Image) -> Floats:
    """Five points (5, 2) of the largest face, in pixels of the image: eyes, nose, corners of the mouth.

    Raises:
        UnusableImageError: there is no face.
    """
    shrink = min(1.0, DETECTION_SIDE / max(image.size))
    width, height = (max(1, round(side * shrink)) for side in image.size)
    seen = image if shrink == 1.0 else image.resize((width, height))
    if min(seen.size) < SMALLEST_FACE:
        raise UnusableImageError(NO_FACE)
    detector = _detector()
    detector.min_face_size = max(SMALLEST_FACE, min(seen.size) // 8)
    try:
        _, _, points = detector.detect(seen, landmarks=True)  # sorted, largest box first
    except RuntimeError as error:
        if "non-empty" not in str(error):
            raise
        points = None  # facenet-pytorch concatenates nothing when every candidate lies outside the image
    if points is None or not np.isfinite(points[0].astype(np.float64)).all():
        raise UnusableImageError(NO_FACE)
    return np.asarray(points[0], dtype=np.float64) / shrink


def similarity(source: Floats, target: Floats) -> Floats:
    """The least-squares similarity transform (2, 3) that takes points (N, 2) to points (N, 2).

    Umeyama 1991, "Least-squares estimation of transformation parameters between two point patterns".

    Raises:
        UnusableImageError: the source points coincide, so there is no such transform.
    """
    mean_s, mean_t = source.mean(0), target.mean(0)
    centred = source - mean_s
    variance = (centred**2).sum() / len(source)
    if variance < 1e-12:
        raise UnusableImageError(NO_FACE)
    u, d, vt = np.linalg.svd((target - mean_t).T @ centred / len(source))
    sign = np.array([1.0, np.sign(np.linalg.det(u) * np.linalg.det(vt))])  # a rotation, never a mirror image
    rotation = u @ np.diag(sign) @ vt
    scale = (d * sign).sum() / variance
    return np.column_stack([scale * rotation, mean_t - scale * rotation @ mean_s])


def warp(image: Image.Image, transform: Floats, size: int) -> Image.Image:
    """Apply a similarity transform (2, 3) from photo to face image; outside the photo is black.

    PIL's affine transform samples single points, so a shrinking one is drawn larger first and then averaged.
    """
    shrink = 1.0 / math.sqrt(abs(np.linalg.det(transform[:, :2])))
    fine = min(max(1, math.ceil(shrink)), max(1, 4096 // size))
    inverse = np.linalg.inv(np.vstack([transform * fine, [0.0, 0.0, 1.0]]))
    drawn = image.transform(
        (size * fine, size * fine),
        Image.Transform.AFFINE,
        tuple(inverse[:2].ravel().tolist()),
        resample=Image.Resampling.BICUBIC,
    )
    return drawn.reduce(fine) if fine > 1 else drawn


@cache
def _detector() -> Any:
    try:
        from facenet_pytorch import MTCNN
    except ImportError as error:
        raise DataError(
            f"data.align=mtcnn needs facenet-pytorch and torchvision ({error}); install them, or use data.align=center"
        ) from None
    return MTCNN(select_largest=True, post_process=False).eval()
