"""From photos to squares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fedgc.data.align import ARCFACE_TEMPLATE, NO_FACE, aligned, central_square, landmarks, similarity, warp
from fedgc.data.folder import UnusableImageError, decode
from tests.pictures import encoded, picture

LFW = Path(__file__).parents[4] / "shared" / "data" / "lfw-devtrain"


def test_the_central_square_is_central() -> None:
    image = Image.new("RGB", (60, 40), "black")
    image.paste("white", (20, 10, 40, 30))
    cut = np.asarray(central_square(image, 16, 0.5))
    assert cut[1:-1, 1:-1].min() > 240  # the antialiasing kernel looks a little beyond the edge
    assert np.array_equal(cut, cut[::-1, ::-1])
    whole = np.asarray(central_square(image, 40, 1.0))[..., 0]
    assert whole.shape == (40, 40)
    assert np.array_equal(whole > 127, np.asarray(image)[:, 10:50, 0] > 127)


def test_similarity_recovers_a_known_transform() -> None:
    angle, scale, shift = 0.7, 2.5, np.array([30.0, -12.0])
    rotation = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    moved = scale * ARCFACE_TEMPLATE @ rotation.T + shift
    expected = np.column_stack([scale * rotation, shift])
    np.testing.assert_allclose(similarity(ARCFACE_TEMPLATE, moved), expected, atol=1e-9)


def test_similarity_never_mirrors_and_refuses_coinciding_points() -> None:
    mirrored = ARCFACE_TEMPLATE * [-1.0, 1.0]
    assert np.linalg.det(similarity(ARCFACE_TEMPLATE, mirrored)[:, :2]) > 0
    with pytest.raises(UnusableImageError, match=NO_FACE):
        similarity(np.ones((5, 2)), ARCFACE_TEMPLATE)


@pytest.mark.parametrize("factor", [1, 3, 8])
def test_warp_undoes_a_similarity_transform(factor: int) -> None:
    target = picture(7, (32, 32))
    large = target.resize((32 * factor, 32 * factor), Image.Resampling.BICUBIC).transpose(Image.Transpose.ROTATE_90)
    corners = np.array([[0.0, 0.0], [32.0, 0.0], [32.0, 32.0], [0.0, 32.0]])
    turned = np.column_stack([corners[:, 1], 32 - corners[:, 0]]) * factor
    undone = warp(large, similarity(turned, corners), 32)
    inner = (slice(2, -2), slice(2, -2))
    assert np.abs(np.asarray(undone, dtype=float)[inner] - np.asarray(target)[inner]).mean() < 2


def test_a_large_jpeg_is_decoded_small_without_changing_the_face() -> None:
    data = encoded(picture(6, (1600, 1200)), "JPEG", quality=95)
    small = decode(data, shorter_side=128)
    assert small.size == (200, 150)
    whole = aligned(decode(data), "none", 64).astype(float)
    assert np.abs(aligned(small, "none", 64) - whole).mean() < 1


@pytest.mark.parametrize("size", [(8, 8), (20, 400), (300, 30), (250, 250), (1500, 1100)])
def test_a_photo_without_a_face_is_refused_by_mtcnn(size: tuple[int, int]) -> None:
    pytest.importorskip("facenet_pytorch")
    with pytest.raises(UnusableImageError, match=NO_FACE):
        aligned(Image.new("RGB", size, "grey"), "mtcnn", 64)


@pytest.mark.skipif(not LFW.is_dir(), reason="needs ../shared/data/lfw-devtrain")
def test_mtcnn_puts_the_landmarks_on_the_template() -> None:
    pytest.importorskip("facenet_pytorch")
    for path in sorted(LFW.glob("*/*_0001.jpg"))[:121:60]:
        photo = Image.open(path)
        roomy = ARCFACE_TEMPLATE + 56  # twice the field of view, so that the face can be detected again
        transform = similarity(landmarks(photo), roomy)
        found = landmarks(warp(photo, transform, 224))
        assert np.abs(found - roomy).mean() < 4
        assert aligned(photo, "mtcnn", 64).shape == (3, 64, 64)
