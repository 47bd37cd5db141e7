"""The picture grid of a report: the same victims in every run, the first by a rule that knows no result, and the extremes."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from eval.figures import face_png
from eval.results import Cell, Entry, algorithm_name, defense_text
from eval.wording import number

SHOWN = 4  # victims by the rule
FMR = "fmr=0.01"
SELECTION = (
    f"Shown are the first {SHOWN} victims of the manifest, in its order; the manifest was drawn by a seed before any attack "
    "ran. Below them stand the best and the worst reconstruction of the first column, chosen by looking at the results and "
    "marked so: the best is what a victim has to fear, the worst shows how far single pictures mislead."
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
        photos, images = pair
        manifest = str(run.about.get("victims", "unknown"))
        grid = next((g for g in found if g["manifest"] == manifest and same(g["photos"], photos[:SHOWN])), None)
        if grid is None:
            grid = _new(entry, manifest, photos)
            found.append(grid)
        samples = entry.get("samples") or []
        faces = [
            _face(images[i], entry, samples[i] if i < len(samples) else {}) for i in grid["rows"] if i < len(images)
        ]
        names = {"label": cell.label, "algorithm": algorithm_name(cell.algorithm), "defense": defense_text(run)}
        grid["columns"].append({**names, "faces": faces})
    for grid in found:
        del grid["photos"]
    return found


def _new(entry: Entry, manifest: str, photos: Tensor) -> dict[str, Any]:
    """A grid without columns; entry: the first column's, which decides who is best and worst."""
    samples = entry.get("samples") or []
    key = judged_by(samples)
    marks: dict[int, list[str]] = {i: [] for i in range(min(SHOWN, len(photos)))}
    ranked = sorted(
        (i for i, s in enumerate(samples[: len(photos)]) if s.get(key) is not None), key=lambda i: samples[i][key]
    )
    if len(ranked) > 1:
        marks.setdefault(ranked[-1], []).append("best")
        marks.setdefault(ranked[0], []).append("worst")
    return {
        "manifest": manifest, "photos": photos[:SHOWN], "rows": list(marks), "batch": entry.get("batch_size") or 1,
        "names": [", ".join([f"victim {i + 1}", *words]) for i, words in marks.items()],
        "originals": uris(photos[list(marks)]), "columns": [], "judge": (entry.get("judge") or {}).get("name"),
        "by_judge": key == "similarity", "by_victim": all("nearest_psnr" in sample for sample in samples or [{}]),
    }  # fmt: skip


def judged_by(samples: Sequence[Mapping[str, Any]]) -> str:
    """What ranks pictures: a judge's cosine with the photo, or, where none spoke, the gain over the mean face."""
    return "similarity" if any(s.get("similarity") is not None for s in samples) else "psnr_gain"


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and bool(torch.allclose(a, b, atol=1e-6))


def uris(faces: Iterable[Tensor]) -> list[str]:
    return [f"data:image/png;base64,{base64.b64encode(face_png(face)).decode()}" for face in faces]


def _face(image: Tensor, entry: Entry, sample: Mapping[str, Any]) -> dict[str, Any]:
    """One reconstruction with its figures. Framed where the judge takes it for the photo at FMR 1 %; without a judge, where it is
    closer to the photo than the mean face and the nearest stranger's."""
    value, gain, likeness = sample.get("psnr"), sample.get("psnr_gain"), sample.get("similarity")
    exact = "psnr" in sample and value is None  # an infinite PSNR
    caption = "exact copy" if exact else "" if value is None else number(value, "dB")
    lines = [] if gain is None else [number(gain, "±dB")]
    lines += [] if sample.get("ssim") is None else [f"SSIM {number(sample['ssim'], '')[:-1]}"]
    lines += [] if likeness is None else [f"cosine {number(likeness, '')[:-1]}"]
    limit = (((entry.get("judge") or {}).get("thresholds") or {}).get(FMR) or {}).get("value")
    framed = _closer(entry, sample) if likeness is None or limit is None else likeness >= limit
    return {"uri": uris([image])[0], "caption": caption, "lines": lines, "framed": exact or framed}


def _closer(entry: Entry, sample: Mapping[str, Any]) -> bool:
    value, gain, nearest = sample.get("psnr"), sample.get("psnr_gain"), sample.get("nearest_psnr")
    if nearest is None:
        nearest = ((entry.get("baselines") or {}).get("nearest-auxiliary-face", {}).get("psnr") or {}).get("value")
    return value is not None and gain is not None and nearest is not None and gain > 0 and value > nearest
