"""What a judge sees of a picture, and what it says where it cannot be had."""

from __future__ import annotations

import importlib.util

import numpy as np
import pytest
import torch

from eval import judges
from eval.judges import Framing, Judge, dlib_judge, framed
from fedgc.errors import UsageError


def ramps(side: int) -> torch.Tensor:
    """One picture whose red rises from left to right and whose green from top to bottom, both from 0 to 1."""
    at = (torch.arange(side) + 0.5) / side
    return torch.stack([at.expand(side, side), at[:, None].expand(side, side), torch.zeros(side, side)])[None]


@pytest.mark.parametrize("side", [40, 200])  # enlarged, and shrunk with antialiasing
def test_a_framing_is_the_square_it_names(side: int) -> None:
    chip = framed(ramps(side), Framing(0.5, 0.1, -0.05), 50)[0]
    along = (torch.arange(50) + 0.5) / 50 * 0.5
    assert torch.allclose(chip[0], (0.35 + along).expand(50, 50), atol=0.01)
    assert torch.allclose(chip[1], (0.20 + along)[:, None].expand(50, 50), atol=0.01)


def test_outside_the_picture_its_edge_goes_on() -> None:
    chip = framed(ramps(40), Framing(1.0, 0.0, 0.5), 40)[0]
    assert torch.allclose(chip[1, 22:], torch.tensor(1.0), atol=0.02)
    assert torch.allclose(framed(ramps(40), Framing(), 40), ramps(40), atol=1e-5)


def test_a_judge_sees_pictures_of_8_bits_and_answers_with_units() -> None:
    judge = Judge("flat", "0", lambda photos: photos.flatten(1), 8)
    photos = torch.rand((3, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    found = judge(photos)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    exact = (photos * 255).round() / 255
    assert np.array_equal(found, judge(exact + 0.001))
    assert not np.array_equal(found, judge(exact.sub(0.01).clamp(0, 1)))


@pytest.mark.parametrize(
    "photos",
    [torch.zeros((1, 3, 8, 8), dtype=torch.uint8), torch.full((1, 3, 8, 8), torch.nan), torch.zeros((0, 3, 8, 8))],
)
def test_what_is_no_picture_is_refused(photos: torch.Tensor) -> None:
    with pytest.raises(UsageError):
        Judge("flat", "0", lambda photos: photos.flatten(1), 8)(photos)


def test_judges_that_differ_have_files_that_differ() -> None:
    keys = [Judge(n, w, len, s, f).key for n, w, s, f in (
        ("a/b.safetensors", "0", 8, Framing()), ("a/b.safetensors", "1", 8, Framing()),
        ("c/b.safetensors", "0", 8, Framing()), ("a/b.safetensors", "0", 8, Framing(0.9)),
    )]  # fmt: skip
    assert len(set(keys)) == 4
    assert all("/" not in key for key in keys)


def test_a_missing_package_is_one_line_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "dlib" else find(name))
    judges._dlib.cache_clear()
    with pytest.raises(UsageError, match=r"needs dlib-bin.*pip install"):
        dlib_judge(Framing())


@pytest.mark.skipif(bool(judges.dlib_missing()), reason=f"not installed: {judges.dlib_missing()}")
def test_dlib_tells_pictures_apart_and_repeats_itself() -> None:
    judges._dlib.cache_clear()
    judge = dlib_judge(Framing(0.9, 0.0, 0.07))
    photos = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    found = judge(photos)
    assert found.shape == (2, 128)
    assert np.allclose(np.linalg.norm(found, axis=1), 1)
    assert np.allclose(found, np.concatenate([judge(photos[:1]), judge(photos[1:])]), atol=1e-6)
    assert found[0] @ found[1] < 0.9999
    assert len(judge.weights) == 64
