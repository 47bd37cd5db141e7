"""Faces made from class embeddings, scored where the right answers are known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from eval.fidelity import psnr
from eval.template_faces import score_faces
from fedgc.types import Gallery, Reconstruction

PEOPLE = 12


def looks(images: torch.Tensor) -> torch.Tensor:
    """A model whose features are the pixels, centred."""
    return F.normalize((images - 0.5).flatten(1), dim=1)


@pytest.fixture
def world() -> tuple[torch.Tensor, Gallery, torch.Tensor]:
    """A face a person, two noisy photos of each in a gallery, and strangers."""
    draw = torch.Generator().manual_seed(0)
    faces, strangers = (torch.rand((PEOPLE, 3, 16, 16), generator=draw) for _ in range(2))
    photos = (faces.repeat(2, 1, 1, 1) + 0.05 * torch.randn((2 * PEOPLE, 3, 16, 16), generator=draw)).clamp(0, 1)
    return faces, Gallery(photos, torch.arange(PEOPLE).repeat(2)), strangers


def scored(world, images: torch.Tensor, order: list[int], mates: dict[int, int]):
    faces, gallery, strangers = world
    rows = {c: looks(faces)[g] for c, g in mates.items()} | {99: torch.ones(3 * 16 * 16)}
    found = Reconstruction(tuple(order), images=images)
    return score_faces(found, mates, gallery, strangers, rows, looks, np.random.default_rng(0))


def test_true_faces_are_named_and_others_are_not(world) -> None:
    faces, gallery, _ = world
    mates = {20 + c: (c + 3) % PEOPLE for c in range(PEOPLE)}
    scores = scored(world, faces[[mates[c] for c in mates]], list(mates), mates)
    assert scores.metrics["rank1"]["value"] == 1.0
    assert scores.metrics["rank1"]["chance"] == 1 / PEOPLE
    assert scores.metrics["auc"]["value"] == 1.0
    assert scores.metrics["embedding_cosine"]["value"] > 0.9
    assert scores.metrics["psnr_gain"]["value"] > 5
    assert set(scores.baselines) == {"mean-face", "nearest-auxiliary-face", "noise", "another-class", "class-embedding"}
    assert scores.baselines["class-embedding"]["rank1"]["value"] == 1.0
    assert "psnr" not in scores.baselines["class-embedding"]
    for name in ("another-class", "noise", "mean-face"):  # a stranger may look a little like anybody
        assert scores.baselines[name]["rank1"]["value"] < 0.5
    assert scores.baselines["mean-face"]["psnr_gain"]["value"] == 0.0
    originals, images = scores.pictures
    assert torch.equal(originals[0], gallery.images[mates[20]])
    assert torch.equal(images[0], faces[mates[20]])


def test_pixels_are_means_over_the_persons_photos(world) -> None:
    _, gallery, strangers = world
    mates = {c: c for c in range(PEOPLE)}
    sample = scored(world, strangers, list(mates), mates).samples[4]
    mine = gallery.images[gallery.people == 4]
    assert sample["psnr"] == pytest.approx(float(psnr(strangers[4].expand_as(mine), mine).mean()), abs=1e-3)
    mean = strangers.mean(0).expand_as(mine)
    assert sample["psnr_gain"] == pytest.approx(sample["psnr"] - float(psnr(mean, mine).mean()), abs=1e-3)


def test_a_class_without_gallery_photos_is_left_out(world) -> None:
    faces, _, _ = world
    mates = {c: c for c in range(PEOPLE)}
    scores = scored(world, torch.cat([faces[:1], faces]), [99, *mates], mates)
    assert [s["class"] for s in scores.samples] == list(mates)
    assert scores.metrics["rank1"]["value"] == 1.0
