"""Synthetic faces: reproducible, found by a face detector, and recognisable without being trivially so."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.metrics import roc_auc_score
from torch import Tensor, nn

from fedgc.data import synthetic
from fedgc.data.face_painter import paint
from fedgc.data.face_traits import Identity, Nuisance, draw
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import DataError


def same_person_auc(embeddings: Tensor, labels: Tensor) -> float:
    """AUC of cosine similarity as a sign that two photos show one person, over all pairs."""
    directions = F.normalize(embeddings.flatten(1).double(), dim=1)
    first, second = torch.triu_indices(len(labels), len(labels), 1)
    similarity = (directions @ directions.T)[first, second]
    return float(roc_auc_score((labels[first] == labels[second]).numpy(), similarity.numpy()))


def test_shapes_types_and_order() -> None:
    faces, labels = synthetic_faces(identities=3, images=4, size=40, seed=0)
    assert faces.shape == (12, 3, 40, 40)
    assert faces.dtype == torch.uint8
    assert labels.dtype == torch.int64
    assert labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4


@pytest.mark.parametrize("size", [32, 33, 160])
def test_every_photo_is_a_different_picture(size: int) -> None:
    faces, _ = synthetic_faces(3, 2, size, seed=5)
    assert len({face.numpy().tobytes() for face in faces}) == 6
    assert (faces.float().std(dim=(1, 2, 3)) > 15).all()


def test_same_seed_same_bytes_and_other_seed_other_people() -> None:
    faces, _ = synthetic_faces(4, 2, 32, seed=1)
    again, _ = synthetic_faces(4, 2, 32, seed=1)
    others, _ = synthetic_faces(4, 2, 32, seed=2)
    assert torch.equal(faces, again)
    assert ((faces.float() - others.float()).abs().mean(dim=(1, 2, 3)) > 10).all()


def test_more_people_and_photos_leave_the_first_ones_as_they_were() -> None:
    few, _ = synthetic_faces(5, 3, 36, seed=9)
    many, _ = synthetic_faces(11, 7, 36, seed=9)
    assert torch.equal(few.view(5, 3, 3, 36, 36), many.view(11, 7, 3, 36, 36)[:5, :3])


@pytest.mark.parametrize("pixels", [1, 5000])
def test_bytes_do_not_depend_on_the_chunk(pixels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    faces, _ = synthetic_faces(6, 5, 37, seed=3)
    monkeypatch.setattr(synthetic, "PIXELS_AT_ONCE", pixels)
    assert torch.equal(synthetic_faces(6, 5, 37, seed=3)[0], faces)


def test_another_size_shows_the_same_photo() -> None:
    small = synthetic_faces(10, 1, 32, seed=4)[0].float()
    large = F.avg_pool2d(synthetic_faces(10, 1, 96, seed=4)[0].float(), 3)
    apart = (small[:, None] - large[None]).abs().mean(dim=(2, 3, 4))
    assert apart.diagonal().max() < 6
    assert apart[~torch.eye(10, dtype=torch.bool)].min() > 12


def test_identity_and_photo_come_from_separate_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Identity | Nuisance] = []

    def noted(kind, generators):  # type: ignore[no-untyped-def]
        drawn.append(draw(kind, generators))
        return drawn[-1]

    monkeypatch.setattr(synthetic, "draw", noted)
    synthetic_faces(2, 3, 32, seed=0)
    who = next(traits for traits in drawn if isinstance(traits, Identity))
    photo = next(traits for traits in drawn if isinstance(traits, Nuisance))
    for name in vars(who):
        values = getattr(who, name)[:, 0, 0]
        assert (values[:3] == values[0]).all()
        assert (values[3:] == values[3]).all()
        assert values[0] != values[3]
    for name in vars(photo):
        assert len(np.unique(getattr(photo, name))) == 6


def test_painted_faces_are_float32_in_the_unit_range() -> None:
    generators = [np.random.default_rng(i) for i in range(20)]
    painted = paint(draw(Identity, generators), draw(Nuisance, generators), 48)
    assert painted.dtype == np.float32
    assert painted.shape == (20, 3, 48, 48)
    assert painted.min() >= 0
    assert painted.max() <= 1


def test_background_and_mean_colour_do_not_tell_people_apart() -> None:
    faces, labels = synthetic_faces(40, 8, 32, seed=6)
    corner = faces[:, :, :6, :6].float().mean(dim=(2, 3))
    colour = faces.float().mean(dim=(2, 3))
    assert abs(same_person_auc(corner - corner.mean(0), labels) - 0.5) < 0.05
    assert abs(same_person_auc(colour - colour.mean(0), labels) - 0.5) < 0.08


def test_raw_pixels_tell_a_little() -> None:
    faces, labels = synthetic_faces(40, 8, 32, seed=6)
    assert 0.55 < same_person_auc(faces.float(), labels) < 0.75


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ((0, 2, 64, 0), "identity"),
        ((2, 0, 64, 0), "image"),
        ((-1, 2, 64, 0), "identity"),
        ((2, 2, 31, 0), "32..160"),
        ((2, 2, 161, 0), "32..160"),
        ((2, 2, 64, -1), "seed"),
        ((2.0, 2, 64, 0), "identities"),
        ((2, 2, True, 0), "size"),
        ((2, "2", 64, 0), "images"),
    ],
)
def test_bad_arguments_are_named(arguments: tuple[int, int, int, int], word: str) -> None:
    with pytest.raises(DataError, match=word):
        synthetic_faces(*arguments)


def found_by_mtcnn(seeds: range, identities: int) -> float:
    """Share of photos (two per person, 112 pixels) in which a detector trained on real faces finds a face."""
    mtcnn = pytest.importorskip("facenet_pytorch").MTCNN(keep_all=False, device="cpu")
    faces = torch.cat([synthetic_faces(identities, 2, 112, seed)[0] for seed in seeds])
    boxes = [mtcnn.detect(Image.fromarray(face.permute(1, 2, 0).numpy()))[0] for face in faces]
    return sum(box is not None for box in boxes) / len(boxes)


def test_a_detector_of_real_faces_finds_them() -> None:
    assert found_by_mtcnn(range(10, 14), identities=5) >= 0.9


@pytest.mark.slow
def test_a_detector_of_real_faces_finds_two_hundred() -> None:
    assert found_by_mtcnn(range(20, 24), identities=25) >= 0.9


def small_network() -> nn.Module:
    widths = (3, 16, 32, 64)
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.Conv2d(before, after, 3, 2, 1), nn.GroupNorm(4, after), nn.PReLU()]
        layers += [nn.Conv2d(after, after, 3, 1, 1), nn.GroupNorm(4, after), nn.PReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * 4 * 4, 64))


@pytest.mark.slow
def test_a_small_network_learns_to_recognise_people_it_never_saw() -> None:
    seen, labels = synthetic_faces(60, 12, 32, seed=0)
    unseen, strangers = synthetic_faces(40, 12, 32, seed=1)
    seen, unseen = seen / 127.5 - 1, unseen / 127.5 - 1
    generator = torch.Generator().manual_seed(0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = small_network()
    prototypes = nn.Parameter(torch.randn(60, 64, generator=generator))
    optimizer = torch.optim.Adam([*network.parameters(), prototypes], lr=2e-3)
    with torch.no_grad():
        untrained = same_person_auc(network(unseen), strangers)
    for _ in range(6):
        for batch in torch.randperm(len(seen), generator=generator).split(32):
            cosines = F.normalize(network(seen[batch]), dim=1) @ F.normalize(prototypes, dim=1).T
            optimizer.zero_grad()
            F.cross_entropy(16 * cosines, labels[batch]).backward()
            optimizer.step()
    with torch.no_grad():
        trained = same_person_auc(network(unseen), strangers)
    assert untrained < 0.78
    assert trained > 0.88
