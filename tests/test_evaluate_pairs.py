"""evaluate --pairs on a run of a folder: who is left out, what is read, and the numbers against direct ones."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from tiny import TINY, Outcome

from eval.pair_protocol import ListedPairs, calibrated_accuracy, pair_auc
from eval.pairs import PairScores
from fedgc.config import load_config
from fedgc.data.folder import DAMAGED
from fedgc.data.pair_lists import ABSENT
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import RunError, UsageError
from fedgc.models import build_backbone, embed
from fedgc.pipeline import evaluation
from fedgc.pipeline.evaluation import document, embedding, evaluate
from fedgc.pipeline.setting import load_config_faces
from fedgc.pipeline.training import train
from fedgc.rng import numpy_generator
from fedgc.runs import RunDirectory

PEOPLE, PHOTOS = 28, 6


class Trained(NamedTuple):
    run: Path
    faces: Path
    names: dict[str, list[str]]  # of each split


def name(person: int) -> str:
    return f"Person_{person:02d}"


def paint(root: Path) -> None:
    """LFW-like names; one person with a single usable photo, one with a damaged one."""
    photos, labels = synthetic_faces(PEOPLE, PHOTOS, 32, 3)
    counts: dict[int, int] = {}
    for photo, label in zip(photos, labels.tolist(), strict=True):
        counts[label] = counts.get(label, 0) + 1
        folder = root / name(label)
        folder.mkdir(parents=True, exist_ok=True)
        if label != 4 or counts[label] == 1:
            Image.fromarray(photo.permute(1, 2, 0).numpy()).save(folder / f"{name(label)}_{counts[label]:04d}.png")
    (root / name(9) / f"{name(9)}_0002.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    root = tmp_path_factory.mktemp("listed")
    paint(root / "faces")
    settings = tuple(s for s in TINY if not s.startswith("data.source"))
    config = load_config(settings=(*settings, "data.min_images=5", f"data.source={root / 'faces'}"))
    train(config, root / "run")
    run = RunDirectory(root / "run")
    splits, faces = run.load_identities()["splits"], load_config_faces(config)
    return Trained(
        run.path,
        root / "faces",
        {k: [faces.names[p] for p in splits[k]] for k in ("train", "calibration", "test", "auxiliary")},
    )


def pairs_of(people: Iterable[str], photos: tuple[int, ...] = (1, 3, 4)) -> tuple[list[str], list[str]]:
    own = [f"{p}\t{i}\t{j}" for p in people for i, j in combinations(photos, 2)]
    other = [f"{a}\t{i}\t{b}\t{i}" for a, b in combinations(people, 2) for i in photos]
    size = min(len(own), len(other))
    return own[:size], other[:size]


def save(path: Path, own: list[str], other: list[str]) -> Path:
    path.write_text("\n".join([str(len(own)), *own, *other]) + "\n")
    return path


def direct(trained: Trained, lines: list[str]) -> dict[str, Any]:
    """The same numbers from all faces, read and embedded at once."""
    run = RunDirectory(trained.run)
    config = load_config(trained.run / "config.toml")
    faces = load_config_faces(config)
    state = run.load_state()
    assert state is not None
    backbone = build_backbone(config.spec(), config.seed)
    embedding(backbone, state)
    features = embed(backbone, faces.images).double().numpy()
    row = {file: n for n, file in enumerate(faces.files)}
    scores, people = [], []
    for line in lines:
        a, i, *rest = line.split("\t")
        b, j = rest if len(rest) == 2 else (a, rest[0])
        u, v = (features[row[f"{p}/{p}_{int(n):04d}.png"]] for p, n in ((a, i), (b, j)))
        scores.append(round(float(u @ v / np.linalg.norm(u) / np.linalg.norm(v)), 10))
        people.append((faces.names.index(a), faces.names.index(b)))
    pairs = ListedPairs(np.array(scores), np.array(people), np.zeros(len(lines), dtype=np.int64))
    held = faces.of(run.load_identities()["splits"]["calibration"])
    rng = numpy_generator(config.seed, "listed pairs")
    calibration = PairScores.from_embeddings(features[held], faces.labels[held])
    return {
        "accuracy": calibrated_accuracy(pairs, calibration, rng=rng).to_json(),
        "auc": pair_auc(pairs, rng=rng).to_json(),
    }


def test_one_fold_against_direct_numbers(trained: Trained, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strangers = trained.names["test"] + trained.names["auxiliary"]
    strangers = [p for p in strangers if p != name(9)]
    own, other = pairs_of(strangers)
    read: list[str] = []
    whole = evaluation.read_bytes

    def counted(path: Path) -> bytes:
        read.append(f"{path.parent.name}/{path.name}")
        return whole(path)

    monkeypatch.setattr(evaluation, "read_bytes", counted)
    monkeypatch.setattr(evaluation, "BATCH", 5)
    stages: dict[str, tuple[int, int]] = {}

    def watch(stage: str, done: int, total: int, note: str = "") -> None:
        stages[stage] = done, total

    result = evaluate(trained.run, watch=watch, pairs=save(tmp_path / "list.txt", own, other))
    found = result.pop("pairs")
    assert result == {**document(RunDirectory(trained.run)), "source": str(trained.faces)}
    for measure, expected in direct(trained, own + other).items():
        assert found[measure] == pytest.approx(expected)
        assert expected["value"] is not None
    assert (found["folds"], found["pairs"], found["matched"]) == (1, len(own + other), len(own))
    assert "calibration people" in found["threshold_from"]
    assert found["missing"] == found["excluded_trained"] == found["excluded_calibration"] == 0
    assert len(read) == len(set(read))
    assert {path.split("/")[0] for path in read} <= {*strangers, *trained.names["calibration"]}
    assert all(path[-8:-4] in ("0001", "0003", "0004") for path in read if path.split("/")[0] in strangers)
    assert stages["reading listed photos"] == (3 * len(strangers),) * 2
    assert stages["reading calibration photos"][0] == len(read) - 3 * len(strangers)


def test_what_is_left_out_is_counted(trained: Trained, tmp_path: Path) -> None:
    free = [p for p in trained.names["test"] + trained.names["auxiliary"] if p != name(9)][:6]
    learned, setter = trained.names["train"][0], trained.names["calibration"][0]
    own, other = pairs_of(free)
    own += [f"{learned}\t1\t2", f"{setter}\t1\t2", f"{free[0]}\t1\t77", f"{free[0]}\t1\t78"]
    other += [
        f"{learned}\t1\t{free[0]}\t1",
        f"{free[0]}\t1\t{learned}\t77",
        f"{setter}\t1\t{free[1]}\t1",
        "Nobody\t5\tElse\t6",
    ]
    found = evaluate(trained.run, pairs=save(tmp_path / "list.txt", own, other))["pairs"]
    assert found["listed"] == len(own + other)
    assert (found["excluded_trained"], found["excluded_calibration"], found["excluded_missing"]) == (3, 2, 3)
    assert (found["pairs"], found["matched"]) == (len(own + other) - 8, len(own) - 4)
    assert found["missing"] == 4  # of a trained person's photo 77 nobody asks
    stems = ["Else/Else_0006", "Nobody/Nobody_0005", f"{free[0]}/{free[0]}_0077", f"{free[0]}/{free[0]}_0078"]
    assert found["missing_files"] == [{"path": stem, "reason": ABSENT} for stem in stems]
    assert found["people"] == 6


def folds(people: list[str]) -> str:
    """Ten folds of 5 + 5 pairs, all of the same people."""
    own, other = pairs_of(people)
    lines = ["10\t5"]
    for k in range(10):
        lines += [own[(5 * k + n) % len(own)] for n in range(5)] + [other[(7 * k + n) % len(other)] for n in range(5)]
    return "\n".join(lines) + "\n"


def test_ten_folds_need_no_calibration_and_another_folder_may_hold_the_same_people(
    trained: Trained, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.faces, copy)
    free = [p for p in trained.names["calibration"] + trained.names["test"] if p != name(9)]
    path = tmp_path / "pairs.txt"
    path.write_text(folds(free))
    found = evaluate(trained.run, str(copy), pairs=path)["pairs"]
    assert (found["folds"], found["pairs"], found["excluded_trained"]) == (10, 100, 0)
    assert (found["accuracy"]["n"], found["threshold_from"]) == (10, "the other 9 folds, for each fold")
    assert found["accuracy"]["value"] is not None
    assert "more than one fold" in found["accuracy"]["note"]

    path.write_text(folds(trained.names["train"][:4]))
    found = evaluate(trained.run, str(copy), pairs=path)["pairs"]
    assert (found["pairs"], found["excluded_trained"], found["auc"]["value"]) == (0, 100, None)
    assert "fold 1 has 0 matched" in found["accuracy"]["why"]


def test_a_damaged_photo_is_named(trained: Trained, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.faces, copy)
    free = [p for p in trained.names["test"] if p != name(9)]
    broken = copy / free[0] / f"{free[0]}_0003.png"
    broken.write_bytes(broken.read_bytes()[:60])
    own, other = pairs_of(free)
    touched = sum("\t3" in line and free[0] in line for line in own + other)
    found = evaluate(trained.run, str(copy), pairs=save(tmp_path / "list.txt", own, other))["pairs"]
    assert found["missing_files"] == [{"path": f"{free[0]}/{free[0]}_0003", "reason": DAMAGED}]
    assert (found["missing"], found["excluded_missing"]) == (1, touched)
    assert found["source"] == str(copy)


def test_synthetic_faces_have_no_such_names(trained: Trained, runs: dict[str, Path], tmp_path: Path) -> None:
    path = save(tmp_path / "list.txt", ["A\t1\t2"], ["A\t1\tB\t1"])
    with pytest.raises(UsageError, match="add --data FOLDER"):
        evaluate(runs["fedgc"], pairs=path)
    own, other = pairs_of([p for p in trained.names["test"] if p != name(9)])
    found = evaluate(runs["fedgc"], str(trained.faces), pairs=save(tmp_path / "list.txt", own, other))["pairs"]
    assert found["accuracy"]["value"] is not None  # thresholds from the run's synthetic calibration people


@pytest.mark.parametrize("change", ["person", "photo", "damage"])
def test_thresholds_need_the_folder_that_was_trained_on(trained: Trained, tmp_path: Path, change: str) -> None:
    faces, run = tmp_path / "faces", tmp_path / "run"
    shutil.copytree(trained.faces, faces)
    shutil.copytree(trained.run, run)
    settled = next(p for p in trained.names["calibration"] if p != name(9))
    toml = (run / "config.toml").read_text()
    (run / "config.toml").write_text(toml.replace(str(trained.faces), str(faces)))
    path = save(tmp_path / "list.txt", *pairs_of([p for p in trained.names["test"] if p != name(9)]))
    assert evaluate(run, pairs=path)["pairs"]["accuracy"]["value"] is not None
    if change == "person":
        shutil.rmtree(faces / name(0))
    elif change == "photo":
        (faces / settled / f"{settled}_0002.png").unlink()
    else:
        (faces / settled / f"{settled}_0002.png").write_bytes(b"no image")
    with pytest.raises(RunError, match="no longer holds the faces"):
        evaluate(run, pairs=path)


def test_the_command_line_says_it_all(cli: Callable[..., Outcome], trained: Trained, tmp_path: Path) -> None:
    free = [p for p in trained.names["test"] if p != name(9)]
    own, other = pairs_of(free)
    own += [f"{trained.names['train'][0]}\t1\t2", f"{free[0]}\t1\t99"]
    other += [f"{trained.names['train'][0]}\t1\t{free[0]}\t1", f"{free[0]}\t2\t{free[1]}\t2"]
    path = save(tmp_path / "list.txt", own, other)
    outcome = cli("evaluate", trained.run, "--pairs", path, "--json")
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)["pairs"]
    outcome = cli("evaluate", trained.run, "--pairs", path)
    assert outcome.code == 0, outcome.err
    assert f"accuracy {found['accuracy']['value']:.3f} [" in outcome.out
    for words in (found["threshold_from"], "2 of people trained on", "1 without a photo", f"_0099 ({ABSENT})"):
        assert words in outcome.out
    path.write_text("2\nAnn\t1\t2\n")
    outcome = cli("evaluate", trained.run, "--pairs", path)
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (2, "", 1)
    assert "line 2" in outcome.err
