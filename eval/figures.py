"""Pictures of faces: grids of reconstructions beside originals. Figures of numbers are in `eval.curves`."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from fedgc.files import PRIVATE, write_bytes

GAP = 4  # white pixels between faces


def face_png(face: Tensor, scale: int = 1) -> bytes:
    """One face (3, H, W) in [0, 1] as PNG bytes, enlarged by whole pixels."""
    pixels = (face.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(np.kron(pixels, np.ones((scale, scale, 1), np.uint8))).save(buffer, "PNG")
    return buffer.getvalue()


def save_grid(
    path: Path, originals: Tensor, found: Tensor, samples: Sequence[Mapping[str, Any]], most: int = 16
) -> None:
    """Originals above, reconstructions below, the first ``most`` targets in their recorded order; owner-only."""
    n = min(most, len(samples))
    _save_sheet(path, (originals[:n], found[:n]))


def save_row(path: Path, found: Tensor, most: int = 16) -> None:
    """Reconstructions alone, where no originals are known; owner-only."""
    _save_sheet(path, (found[:most],))


def _save_sheet(path: Path, rows: Sequence[Tensor]) -> None:
    """Rows of as many faces (n, 3, H, W) each."""
    n, (height, width) = len(rows[0]), rows[0].shape[-2:]
    sheet = np.full((len(rows) * (height + GAP), n * (width + GAP), 3), 255, np.uint8)
    for r, faces in enumerate(rows):
        for c, face in enumerate(faces):
            top, left = r * (height + GAP), c * (width + GAP)
            sheet[top : top + height, left : left + width] = (
                (face.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            )
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue(), PRIVATE)
