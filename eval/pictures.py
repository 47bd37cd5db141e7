"""The picture grid of a report: the same victims in every run, chosen by a rule that knows no result."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.figures import face_png
from eval.results import Cell, Entry, algorithm_name, defense_text
from eval.wording import number

SHOWN = 4  # victims
SELECTION = (
    f"Shown are the first {SHOWN} victims of the manifest, in its order. The manifest was drawn by a seed before any attack "
    "ran; nothing was chosen by looking at results."
)


def grids(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """The same victims in every run: originals, and what the server rebuilt from batches of one, as data URIs.

    Runs are side by side only where their manifest and the photos themselves are the same.
    """
    found: list[dict[str, Any]] = []
    for cell in cells:
        run = cell.first
        entry = run.leading("gradient-inversion", "server")
        pair = run.pictures(entry) if entry and not entry.get("refused") else None
        if entry is None or pair is None:
            continue
        originals, images = (x[:SHOWN] for x in pair)
        manifest = str(run.about.get("victims", "unknown"))
        grid = next((g for g in found if g["manifest"] == manifest and same(g["photos"], originals)), None)
        if grid is None:
            by_victim = all("nearest_psnr" in sample for sample in entry.get("samples") or [{}])
            grid = {"manifest": manifest, "photos": originals, "originals": uris(originals), "by_victim": by_victim}
            grid |= {"columns": [], "batch": entry.get("batch_size") or 1}
            found.append(grid)
        samples = entry.get("samples") or []
        faces = [_face(uri, entry, samples[i] if i < len(samples) else {}) for i, uri in enumerate(uris(images))]
        names = {"label": cell.label, "algorithm": algorithm_name(cell.algorithm), "defense": defense_text(run)}
        grid["columns"].append({**names, "faces": faces})
    for grid in found:
        del grid["photos"]
    return found


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=1e-6))


def uris(faces: Iterable[Tensor]) -> list[str]:
    return [f"data:image/png;base64,{base64.b64encode(face_png(face)).decode()}" for face in faces]


def _face(uri: str, entry: Entry, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One reconstruction; framed where it is closer to the photo than the mean face and the nearest stranger's."""
    value, gain, nearest = sample.get("psnr"), sample.get("psnr_gain"), sample.get("nearest_psnr")
    if nearest is None:
        nearest = ((entry.get("baselines") or {}).get("nearest-auxiliary-face", {}).get("psnr") or {}).get("value")
    exact = "psnr" in sample and value is None  # an infinite PSNR
    caption = "exact copy" if exact else "" if value is None else number(value, "dB")
    near = value is not None and gain is not None and nearest is not None and gain > 0 and value > nearest
    gained = None if gain is None else number(gain, "±dB")
    return {"uri": uri, "caption": caption, "gain": gained, "framed": exact or near}
