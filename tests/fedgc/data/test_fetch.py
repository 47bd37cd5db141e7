"""Public sets through scikit-learn, with its loaders replaced by small ones of the documented shapes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.error import URLError

import numpy as np
import pytest
import sklearn.datasets
from PIL import Image

import fedgc.data.fetch as module
from fedgc.data.faces import load_faces
from fedgc.data.fetch import fetch
from fedgc.data.prepared import MANIFEST
from fedgc.errors import DataError, UsageError, WorkFailedError


def olivetti(images: np.ndarray, target: np.ndarray) -> Callable[..., Any]:
    def load(**options: Any) -> Any:
        print("downloading Olivetti faces from somewhere")
        return SimpleNamespace(images=images, target=target)

    return load


@pytest.fixture
def grey() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (6, 64, 64)).astype(np.float32) / 255


def test_olivetti_is_written_as_it_is(
    grey: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", olivetti(grey, np.array([0, 0, 0, 1, 1, 1])))
    made = json.loads(cli("data", "fetch", "olivetti", tmp_path / "faces", "--json").out)
    assert (made["people"], made["kept"], made["source"]) == (2, 6, "olivetti")
    assert "AT&T Laboratories Cambridge" in made["terms"]
    faces = load_faces(str(tmp_path / "faces"), image_size=64, align="none", seed=0)
    assert np.array_equal(faces.images[:, 0].numpy(), np.round(grey * 255))
    assert faces.files[4] == "person-02/person-02_0002.png"
    manifest = (tmp_path / "faces" / MANIFEST).read_text()
    assert "://" not in manifest
    assert "AT&T" in manifest
    again = cli("data", "fetch", "olivetti", tmp_path / "faces")
    assert "6 done before" in again.out
    assert "AT&T" in again.out


@pytest.mark.parametrize("scale", [255.0, -1.0])
def test_another_range_is_not_guessed_at(
    grey: np.ndarray, scale: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", olivetti(grey * scale, np.zeros(6, int)))
    with pytest.raises(DataError, match="grey values in"):
        fetch("olivetti", tmp_path / "faces")


def test_lfw_is_the_unpacked_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]) -> None:
    folder = tmp_path / "cache" / "lfw_home" / "lfw_funneled"
    asked: dict[str, Any] = {}

    def load(**options: Any) -> None:
        asked.update(options)
        for name in ("Ann_A", "Bob_B"):
            (folder / name).mkdir(parents=True)
            for number in (1, 2):
                Image.new("RGB", (250, 250), (number, 50, 90)).save(folder / name / f"{name}_{number:04d}.jpg")

    monkeypatch.setattr(sklearn.datasets, "fetch_lfw_people", load)
    monkeypatch.setattr(sklearn.datasets, "get_data_home", lambda: str(tmp_path / "cache"))
    monkeypatch.setattr(module, "LFW_PHOTOS", 4)
    outcome = cli("data", "fetch", "lfw", tmp_path / "faces")
    assert outcome.code == 0, outcome
    assert "consent" in outcome.out
    assert asked["min_faces_per_person"] == 0
    with (
        Image.open(tmp_path / "faces" / "Bob_B" / "Bob_B_0002.png") as written,
        Image.open(folder / "Bob_B" / "Bob_B_0002.jpg") as original,
    ):
        assert written.size == (250, 250)
        assert np.array_equal(np.asarray(written), np.asarray(original))
    monkeypatch.setattr(sklearn.datasets, "fetch_lfw_people", lambda **_: None)
    monkeypatch.setattr(module, "LFW_PHOTOS", 5)
    with pytest.raises(DataError, match="4 photos of 5"):
        fetch("lfw", tmp_path / "other")


@pytest.mark.parametrize("name", ["lfw", "olivetti"])
def test_offline_is_one_line_without_an_address(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cli: Callable[..., Any]
) -> None:
    def load(**options: Any) -> None:
        print("downloading from https://example.org")
        raise URLError("no route to host")

    loader = {"lfw": "fetch_lfw_people", "olivetti": "fetch_olivetti_faces"}[name]
    monkeypatch.setattr(sklearn.datasets, loader, load)
    outcome = cli("data", "fetch", name, tmp_path / "faces", "--json")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.strip().count("\n") == 0
    assert "no route to host" in outcome.err
    assert "connect to the network" in outcome.err
    assert "://" not in outcome.err
    assert not (tmp_path / "faces").exists()


def test_a_damaged_cache_says_what_to_delete(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load(**options: Any) -> None:
        raise ValueError("bad magic")

    monkeypatch.setattr(sklearn.datasets, "fetch_olivetti_faces", load)
    with pytest.raises(WorkFailedError, match="delete that set"):
        fetch("olivetti", tmp_path / "faces")
    with pytest.raises(UsageError, match="lfw, olivetti"):
        fetch("celeba", tmp_path / "faces")
