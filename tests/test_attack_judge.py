"""attack --judge: who may judge, what is kept, and that nothing a judge has not seen passes for its verdict."""

from __future__ import annotations

import json
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY, Outcome

from eval.judges import Framing, Judge, dlib_missing
from eval.verdicts import judge_gate
from fedgc.config import load_config
from fedgc.data.synthetic import synthetic_faces
from fedgc.errors import RunError, UsageError
from fedgc.files import PRIVATE, read_tensors, write_tensors
from fedgc.pipeline import judges, verdicts
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.reporting import report
from fedgc.pipeline.training import train
from fedgc.pipeline.verdicts import Bench, Memory, with_verdict
from fedgc.pipeline.watch import silent
from fedgc.runs import RunDirectory
from fedgc.types import Gallery

QUICK = ("gradient-inversion.iterations=3",)
RATES = {f"{kind}@fmr={fmr}" for kind in ("sar1", "sar2") for fmr in (0.01, 0.001)}
MORE = {"identity_similarity", "identity_z"}


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on other people, whose checkpoints may judge."""
    path = tmp_path_factory.mktemp("judge") / "run"
    train(load_config(settings=(*TINY, "seed=9"), flags={"federation.algorithm": "centralized"}), path)
    return path


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> Path:
    shutil.copytree(runs["fedgc"], tmp_path / "run", ignore=shutil.ignore_patterns("attacks"))
    return tmp_path / "run"


def checkpoint(path: Path, t: int = 2) -> Path:
    return RunDirectory(path).checkpoint_path(t)


def inverted(path: Path, judge: Path | str | None, **more: Any) -> dict[str, Any]:
    [entry] = attack(
        path, ["gradient-inversion"], ["server"], targets=2, settings=QUICK,
        judge=None if judge is None else str(judge), **more,
    )  # fmt: skip
    return entry


def test_a_verdict_stands_beside_the_attack_and_makes_it_no_second_time(run: Path, stranger: Path) -> None:
    plain = inverted(run, None)
    found = run / plain["folder"] / "reconstructions.safetensors"
    before = found.stat().st_mtime_ns
    entry = inverted(run, checkpoint(stranger))
    assert set(entry["metrics"]) == set(plain["metrics"]) | RATES | MORE
    assert set(entry["baselines"]) == set(plain["baselines"]) | {
        "another-victim", "another-reconstruction", "genuine-photo",
    }  # fmt: skip
    assert set(entry["baselines"]["genuine-photo"]) == {n for n in RATES if n.startswith("sar2")}
    assert {"psnr", "identity_similarity"} <= set(entry["baselines"]["mean-face"])
    assert "identity pairs" in entry["metrics"]["sar1@fmr=0.01"]["why"]  # a handful of calibration people
    assert -1 <= entry["metrics"]["identity_similarity"]["value"] <= 1
    assert entry["judge"]["name"] == str(checkpoint(stranger))
    assert {"auc", "eer", "thresholds", "people"} <= set(entry["judge"])
    assert set(entry["samples"][0]) == {*plain["samples"][0], "similarity"}
    assert set(entry["variants"]["batch_size=2"]["metrics"]) >= RATES
    assert found.stat().st_mtime_ns == before
    assert inverted(run, None) == plain


def test_no_judge_speaks_for_another(run: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    last, first = inverted(run, checkpoint(stranger)), inverted(run, checkpoint(stranger, 1))
    assert last["judge"]["weights"] != first["judge"]["weights"]
    assert last["metrics"]["identity_similarity"] != first["metrics"]["identity_similarity"]
    assert last["metrics"]["psnr"] == first["metrics"]["psnr"]

    def asked(*_: Any) -> None:
        raise AssertionError("a judge looked again")

    monkeypatch.setattr(Judge, "__call__", asked)
    assert inverted(run, checkpoint(stranger)) == last
    assert inverted(run, checkpoint(stranger, 1)) == first
    monkeypatch.undo()
    assert inverted(run, checkpoint(stranger), force=True)["metrics"] == last["metrics"]


def test_photos_that_stay_are_looked_at_once_and_what_is_kept_is_private(
    run: Path, stranger: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = inverted(run, checkpoint(stranger))
    kept = [*run.glob("private/judge-*"), *(run / entry["folder"]).glob("verdict-*")]
    assert len(kept) == 2
    assert {stat.S_IMODE(p.stat().st_mode) for p in kept} == {0o600}
    looked: list[int] = []
    plain = Judge.__call__
    monkeypatch.setattr(Judge, "__call__", lambda self, photos: looked.append(len(photos)) or plain(self, photos))  # type: ignore[func-returns-value]
    attack(
        run,
        ["gradient-inversion"],
        ["server"],
        targets=2,
        settings=(*QUICK, "gradient-inversion.restarts=2"),
        judge=str(checkpoint(stranger)),
    )
    photos = entry["targets"] + entry["variants"]["batch_size=2"]["targets"]
    assert sum(looked) == 2 * photos  # what was found, and noise
    next(run.glob("private/judge-*")).write_bytes(b"damaged")
    assert inverted(run, checkpoint(stranger), force=True)["metrics"] == entry["metrics"]


def test_a_report_shows_the_judge_that_knows_people_best(run: Path, stranger: Path, tmp_path: Path) -> None:
    entries = [inverted(run, checkpoint(stranger, t)) for t in (1, 2)]
    best = max(entries, key=lambda e: e["judge"]["auc"]["value"])
    assert with_verdict(run / best["folder"], inverted(run, None))["judge"] == best["judge"]
    report([run], tmp_path / "page")
    table = (tmp_path / "page/results.csv").read_text().splitlines()
    shown = [line for line in table if "identity_similarity" in line]
    assert shown
    assert all(best["judge"]["name"] in line for line in shown)
    page = (tmp_path / "page/report.html").read_text()
    assert "SAR-I at FMR 1 %" in page
    assert f"judge {best['judge']['name']}: AUC" in page


def test_the_attacked_network_and_its_kin_are_no_judges(run: Path, runs: dict[str, Path], stranger: Path) -> None:
    with pytest.raises(UsageError, match=r"a network of .* itself"):
        inverted(run, checkpoint(run, 1))
    tensors, about = read_tensors(checkpoint(run))
    other = run.parent / "copy.safetensors"
    write_tensors(other, dict(reversed(tensors.items())), {**about, "note": "another hash"})
    with pytest.raises(UsageError, match=r"a network of .* itself"):
        inverted(run, other)
    with pytest.raises(UsageError, match="trained on the faces"):
        inverted(run, checkpoint(runs["fedavg"]))
    assert inverted(run, stranger)["judge"]["weights"]  # a whole run stands for its last checkpoint


def test_who_cannot_judge_is_told_why(run: Path, cli: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = cli("attack", run, "-a", "gradient-inversion", "--judge", "nobody")
    assert nobody.code == 2
    assert "dlib, facenet, or the file" in nobody.err
    damaged = run.parent / "x.safetensors"
    damaged.write_text("no")
    assert "no checkpoint" in cli("attack", run, "--judge", damaged).err

    def offline(name: str) -> Path:
        raise judges.WorkFailedError("no network: put its file into CACHE, or give the file with --set model.init=F")

    monkeypatch.setattr(judges, "downloaded", offline)
    facenet = cli("attack", run, "--judge", "facenet")
    assert facenet.code == 2
    assert facenet.err.strip().endswith("put its file into CACHE")
    (run / "private/bystanders.safetensors").unlink()
    with pytest.raises(RunError, match="train again"):
        inverted(run, "dlib")


def test_judges_are_listed(cli: Callable[..., Outcome]) -> None:
    rows = json.loads(cli("list", "judges", "--json").out)
    assert [row["name"] for row in rows] == ["dlib", "facenet", "FILE.safetensors"]
    assert "FILE" in cli("list", "judges").out


def test_the_framing_of_dlib_follows_the_alignment(run: Path) -> None:
    here = RunDirectory(run)
    assert judges.framings(here) == [judges.TEMPLATE, judges.CENTER, judges.WHOLE]
    config = run / "config.toml"
    plain = config.read_text()
    config.write_text(plain.replace('align = "none"', 'align = "mtcnn"'))
    [template] = judges.framings(here)
    assert abs(template.right) < 0.01  # eyes of the template lie in the middle
    config.write_text(plain.replace('align = "none"', 'align = "center"').replace("= 0.52", "= 1.0"))
    assert judges.framings(here)[0] == Framing(0.9 * 0.52, 0.0, 0.07 * 0.52)


def test_a_judge_with_several_framings_takes_the_one_that_tells_strangers_apart(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def candidates(name: str, of: RunDirectory) -> list[Judge]:
        blind = Judge("blind", "0", lambda photos: torch.ones(len(photos), 3), 32)
        return [blind, Judge("pixels", "1", lambda photos: photos.flatten(1).float() - 127, 32)]

    monkeypatch.setattr(verdicts, "load_judges", candidates)
    assert Bench(RunDirectory(run), "any", silent).look.judge.name == "pixels"


def class_pictures(run: Path, images: torch.Tensor, sources: tuple[int, ...]) -> dict[str, Any]:
    """The entry of an attack on class embeddings that returned these pictures."""
    folder = run / "attacks/identity-linkage@server-0"
    folder.mkdir(parents=True, exist_ok=True)
    write_tensors(
        folder / "reconstructions.safetensors",
        {"round-0002/images": images},
        {"sources": {"round-0002": sources}},
        PRIVATE,
    )
    return {
        "attack": "identity-linkage", "refused": None, "folder": str(folder.relative_to(run)), "metrics": {},
        "baselines": {}, "samples": [],
    }  # fmt: skip


def test_pictures_of_people_are_compared_with_other_photos_alone(run: Path, stranger: Path) -> None:
    bench = Bench(RunDirectory(run), str(checkpoint(stranger)), silent)
    classes = tuple(c for c, photos in sorted(bench.others.items()) if len(photos))[:6]
    images = torch.stack([bench.others[c].mean(dim=0) for c in classes])
    entry = bench.judged(class_pictures(run, images, classes))
    assert set(entry["metrics"]) == {n for n in RATES if n.startswith("sar2")} | MORE
    assert set(entry["baselines"]) == {
        "noise", "mean-face", "nearest-auxiliary-face", "another-reconstruction", "another-victim", "genuine-photo",
    }  # fmt: skip
    own, other = (entry["metrics"], entry["baselines"]["another-reconstruction"])
    assert own["identity_similarity"]["value"] > other["identity_similarity"]["value"]
    broken = torch.cat([images[:1] * torch.nan, images[1:]])
    assert bench.compare(broken, classes, None, "x")[0] != bench.compare(images, classes, None, "x")[0]
    nothing = class_pictures(run, images, classes)
    write_tensors(run / nothing["folder"] / "reconstructions.safetensors", {"round-0002/scores": images}, None, PRIVATE)
    for file in run.glob("attacks/*/verdict-*"):
        file.unlink()
    assert bench.judged(nothing) == nothing


@pytest.mark.parametrize("who", ["checkpoint", pytest.param("dlib", marks=pytest.mark.slow)])
def test_pictures_that_know_nothing_stay_at_chance(run: Path, stranger: Path, who: str) -> None:
    """Sixty calibration people and other forty as victims: noise, the mean face, and somebody else's photo as reconstructions."""
    if who == "dlib" and dlib_missing():
        pytest.skip(f"not installed: {dlib_missing()}")
    photos, people = synthetic_faces(150, 4, 32, 21)
    faces = photos.float() / 255
    bench = Bench(RunDirectory(run), "dlib" if who == "dlib" else str(checkpoint(stranger)), silent)
    calibration, victims = people < 60, (people >= 60) & (people < 100)
    bench.calibration = Gallery(faces[calibration], people[calibration])
    bench.auxiliary = faces[people >= 100]
    grouped = faces[victims].view(40, 4, 3, 32, 32)
    bench.others = {c: grouped[c, 1:] for c in range(40)}
    elsewhere = torch.roll(grouped[:, 1], 1, dims=0)
    metrics, baselines, _ = bench.compare(elsewhere, list(range(40)), grouped[:, 0], "null")
    rows = {"somebody else": metrics, **baselines}
    for name in ("somebody else", "noise", "mean-face", "another-victim"):
        for kind in ("sar1", "sar2"):
            assert rows[name][f"{kind}@fmr=0.01"]["low"] <= 0.01, (name, kind, rows[name])
    assert metrics["identity_z"]["low"] <= 0 <= metrics["identity_z"]["high"]
    assert baselines["genuine-photo"]["sar2@fmr=0.01"]["low"] > 0.01


def test_a_memory_looks_at_equal_photos_once(run: Path) -> None:
    looked: list[int] = []

    def features(photos: torch.Tensor) -> torch.Tensor:
        looked.append(len(photos))
        return photos.flatten(1).float()

    memory = Memory(Judge("counted", "0", features, 32), RunDirectory(run), silent)
    photos = torch.rand((2, 3, 32, 32), generator=torch.Generator().manual_seed(0))
    found = memory(photos[[0, 1, 0, 0]], "photos")
    assert np.array_equal(found[0], found[3])
    assert not np.array_equal(found[0], found[1])
    again = Memory(memory.judge, RunDirectory(run), silent)(photos, "photos")
    assert np.array_equal(again, found[:2])
    assert looked == [2]


def test_the_gate_of_a_judge_that_guesses_says_that_it_is_weak() -> None:
    draw = np.random.default_rng(0)
    found = judge_gate(draw.standard_normal((90, 8)), np.arange(30).repeat(3), draws=100, rng=draw).to_json()
    assert found["auc"]["low"] < 0.6
    assert "weak judge" in found["note"]
