"""The example's file of one plain PyTorch step, attacked as a server would."""

from __future__ import annotations

import copy
import json
import runpy
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny import Outcome

from fedgc.data.faces import load_faces
from fedgc.errors import RefusedError, UsageError
from fedgc.files import read_tensors, write_tensors
from fedgc.foreign import save_update
from fedgc.heads import initial_rows
from fedgc.models import build_backbone, build_model
from fedgc.pipeline.attacking import attack
from fedgc.types import ModelSpec

ROOT = Path(__file__).parent.parent
PEOPLE, PHOTOS = (2, 7), [4, 14]  # of the example
SHORT = ("gradient-inversion.iterations=3", "feature-inversion.iterations=3")
FACES = "synthetic:8x2"


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("foreign") / "update.safetensors"
    subprocess.run([sys.executable, ROOT / "examples/plain_pytorch.py", file], check=True, cwd=ROOT)
    return file


@pytest.fixture
def update(example: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(example, tmp_path))


@pytest.fixture
def truth(tmp_path: Path) -> Path:
    faces = load_faces("synthetic:10x2", image_size=32, align="none", seed=0)
    save_file({"images": faces.images[PHOTOS], "labels": torch.tensor(PEOPLE)}, tmp_path / "truth.safetensors")
    return tmp_path / "truth.safetensors"


def test_an_update_made_by_flower_is_attacked_as_one_of_plain_pytorch(tmp_path: Path) -> None:
    pytest.importorskip("flwr", reason="needs pip install 'fedgc-priv[flower]'")
    from flwr.app import ArrayRecord, Context, Message, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    example = runpy.run_path(str(ROOT / "examples/flower_client.py"))
    model = build_model(example["spec"], classes=10)
    model.head.weight.data = initial_rows(10, 32, torch.Generator().manual_seed(0))
    sent = Message(RecordDict({"arrays": ArrayRecord(model.state_dict())}), 1, "train")
    context = Context(1, 1, {"keep": str(tmp_path / "update.safetensors")}, RecordDict(), {})
    reply = example["app"](sent, context)
    assert not reply.has_error()
    (found,) = attack(tmp_path / "update.safetensors", ["label-inference"], faces=FACES)
    assert found["labels"] == list(PEOPLE)


def by_name(entries: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {e["attack"]: e for e in entries}


def test_labels_are_recovered_and_nothing_is_measured_without_the_truth(update: Path) -> None:
    found = by_name(attack(update, faces=FACES, settings=SHORT))
    assert set(found) == {"label-inference", "embedding-recovery", "feature-inversion", "gradient-inversion"}
    assert found["label-inference"]["labels"] == list(PEOPLE)
    for entry in found.values():
        assert entry["threat"] == "server"
        assert entry["metrics"] == {}
        assert "no figure" in entry["why"]
        tensors, _ = read_tensors(Path(entry["folder"]) / "reconstructions.safetensors")
        assert all(t.isfinite().all() for t in tensors.values())
    assert (
        len(read_tensors(Path(found["gradient-inversion"]["folder"]) / "reconstructions.safetensors")[0]["images"]) == 2
    )
    written = [p for p in update.with_suffix(".attacks").rglob("*")]
    assert any(p.name == "grid.png" for p in written)
    assert not [p for p in written if stat.S_IMODE(p.stat().st_mode) & 0o077]


def test_with_the_truth_it_is_scored_beside_chance_and_baselines(update: Path, truth: Path) -> None:
    names = ("label-inference", "embedding-recovery", "gradient-inversion")
    found = by_name(attack(update, names, faces=FACES, truth=truth, settings=SHORT))
    assert found["label-inference"]["metrics"]["label_accuracy"]["value"] == 1
    assert found["embedding-recovery"]["metrics"]["embedding_cosine"]["value"] > 0.999
    assert "mean-stranger" in found["embedding-recovery"]["baselines"]
    assert "nearest-auxiliary-face" in found["gradient-inversion"]["baselines"]
    assert not any("why" in entry for entry in found.values())
    json.dumps(list(found.values()), allow_nan=False)


def test_chance_is_among_the_updates_own_classes(update: Path, truth: Path) -> None:
    tensors, about = read_tensors(update)
    write_tensors(update, tensors, {**about, "classes": [c + 50 for c in range(10)]})
    images = read_tensors(truth)[0]["images"]
    save_file({"images": images, "labels": torch.tensor(PEOPLE) + 50}, truth)
    (entry,) = attack(update, ["label-inference"], faces=FACES, truth=truth)
    assert entry["labels"] == [52, 57]
    assert [s["class"] for s in entry["samples"]] == [52, 57]
    accuracy = entry["metrics"]["label_accuracy"]
    assert accuracy["value"] == 1
    assert accuracy["chance"] == pytest.approx(
        1 - 0.9**2, abs=0.08
    )  # one of ten classes, two guesses; estimated by 200 draws


def test_a_backbone_under_another_head_gives_its_features_away(tmp_path: Path) -> None:
    spec = ModelSpec("small", "group", 32, 32, "none", 0.0, 1.0)
    backbone, head = build_backbone(spec, seed=3).eval(), torch.nn.Linear(32, 5)
    head.weight.data = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    head.bias.data.zero_()
    photo = load_faces("synthetic:2x2", image_size=32, align="none", seed=0).float_images([0])
    start = copy.deepcopy(backbone)
    F.cross_entropy(head(backbone(photo)), torch.tensor([4])).backward()
    torch.optim.SGD(backbone.parameters(), lr=0.1).step()
    states = ({f"backbone.{n}": t for n, t in module.state_dict().items()} for module in (start, backbone))
    save_update(tmp_path / "bare.safetensors", *states, spec, lr=0.1, batch_size=1)
    (entry,) = attack(tmp_path / "bare.safetensors", ["embedding-recovery"])
    found = read_tensors(Path(entry["folder"]) / "reconstructions.safetensors")[0]["embeddings"]
    assert F.cosine_similarity(found, start(photo)).item() > 0.999
    with pytest.raises(RefusedError, match=r"head\.weight"):
        attack(tmp_path / "bare.safetensors", ["label-inference"])


def test_the_attackers_drawn_faces_are_not_those_of_a_run(update: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedgc.pipeline import bare_files

    held: list[torch.Tensor] = []
    real = bare_files.update_observation
    monkeypatch.setattr(
        bare_files, "update_observation", lambda u, c, k: held.append(k.auxiliary_faces) or real(u, c, k)
    )
    attack(update, ["label-inference"], faces="synthetic:10x2")
    victims = load_faces("synthetic:10x2", image_size=32, align="none", seed=0).float_images(PHOTOS)
    assert torch.cdist(victims.flatten(1), held[0].flatten(1)).min() > 1


def test_a_repetition_finds_its_result(update: Path) -> None:
    first = attack(update, ["label-inference"])
    summary = Path(first[0]["folder"]) / "summary.json"
    before = summary.stat().st_mtime_ns
    assert attack(update, ["label-inference"]) == first
    assert summary.stat().st_mtime_ns == before
    attack(update, ["label-inference"], force=True)
    assert summary.stat().st_mtime_ns != before


@pytest.mark.parametrize(
    ("name", "threats", "why"),
    [
        ("gradient-inversion", (), r"auxiliary-faces.*--faces"),
        ("identity-linkage", (), "needs a run directory"),
        ("candidate-match", (), "needs .*candidates"),
        ("label-inference", ("client",), "needs a run directory"),
    ],
)
def test_what_an_update_does_not_grant_is_refused(update: Path, name: str, threats: tuple[str, ...], why: str) -> None:
    with pytest.raises(RefusedError, match=why):
        attack(update, [name], threats)
    assert not update.with_suffix(".attacks").exists()


def test_the_truth_must_fit(update: Path, truth: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--faces"):
        attack(update, truth=truth)
    images, labels = torch.rand(2, 3, 32, 32), torch.tensor(PEOPLE)
    wrong = (
        {"images": images},
        {"images": images[:1], "labels": labels[:1]},
        {"images": 2 * images, "labels": labels},
        {"images": images, "labels": labels + 70},
        {"images": images, "labels": labels.float()},
    )
    for number, tensors in enumerate(wrong):
        save_file(tensors, tmp_path / f"{number}.safetensors")
        with pytest.raises(UsageError, match=f"{number}.safetensors"):
            attack(update, faces=FACES, truth=tmp_path / f"{number}.safetensors")


def test_the_command_line(cli: Callable[..., Outcome], update: Path, runs: dict[str, Path]) -> None:
    done = cli("attack", update, "-a", "label-inference", "--json")
    assert done.code == 0
    assert json.loads(done.out)[0]["labels"] == list(PEOPLE)
    assert "classes 2, 7" in cli("attack", update, "-a", "label-inference").out
    assert cli("attack", update, "--judge", "dlib").code == 2
    assert cli("attack", update, "--targets", "1").code == 2
    assert "is missing" in cli("attack", update.with_name("other.safetensors")).err
    assert cli("attack", runs["fedgc"], "--faces", FACES).code == 2
    assert cli("attack", runs["fedgc"] / "checkpoints/round-0002.safetensors", "--faces", FACES).code == 2
