"""The stages together: what they leave behind, what they find again, what survives a crash."""

from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import TINY

from eval.statistics import DRAWS, percentile_interval
from fedgc.config import load_config
from fedgc.errors import RefusedError, RunError, UsageError
from fedgc.files import read_tensors
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.evaluation import document, evaluate
from fedgc.pipeline.reporting import report
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory

QUICK = (
    "gradient-inversion.iterations=3", "candidate-match.candidates=10", "candidate-match.labels=1",
    "template-inversion.iterations=3", "template-inversion.components=10", "template-inversion.copies=1",
)  # fmt: skip


def test_the_document_of_a_run_is_the_contract(runs: dict[str, Path]) -> None:
    result = document(RunDirectory(runs["fedgc"]))
    assert set(result) == {
        "run", "status", "algorithm", "rounds", "seconds", "images_per_second", "utility", "baselines", "privacy",
        "skipped", "skipped_files", "notes",
    }  # fmt: skip
    assert result["privacy"] is None
    for name in ("auc", "eer", "tar@far=0.1", "tar@far=0.01", "rank1"):
        entry = result["utility"][name]
        assert {"value", "low", "high", "n"} <= set(entry)
        assert entry["value"] is not None or entry["why"]
    assert result["baselines"]["untrained"]["auc"]["value"] is not None
    assert result["baselines"]["public-only"]["auc"]["why"]


def test_privacy_is_stated_with_its_unit(runs: dict[str, Path]) -> None:
    privacy = document(RunDirectory(runs["dp"]))["privacy"]
    assert 45 < privacy["epsilon"] <= 50
    assert (privacy["unit"], privacy["adjacency"], privacy["sampling"]) == ("image", "add-remove", "poisson")
    assert privacy["noise_multiplier"] > 0
    assert "known seed" in privacy["randomness"]


def test_a_run_keeps_what_its_utility_is_in_each_draw_of_people(runs: dict[str, Path]) -> None:
    draws = {name: RunDirectory(runs[name]).load_utility_draws() for name in ("fedavg", "fedgc")}
    auc = document(RunDirectory(runs["fedgc"]))["utility"]["auc"]
    own = draws["fedgc"]["trained/auc"]
    assert len(own) == DRAWS
    low, high = percentile_interval(auc["value"], own)
    assert (low, high) == (pytest.approx(auc["low"], abs=1e-6), pytest.approx(auc["high"], abs=1e-6))
    # the same people in each draw: the untrained net, which is the same under both, is the same in every draw
    np.testing.assert_array_equal(draws["fedavg"]["untrained/auc"], draws["fedgc"]["untrained/auc"])


def test_a_finished_run_is_found_not_repeated(runs: dict[str, Path]) -> None:
    before = (runs["fedgc"] / "run.json").stat().st_mtime_ns
    train(load_config(settings=TINY), runs["fedgc"])
    assert (runs["fedgc"] / "run.json").stat().st_mtime_ns == before


def test_another_configuration_never_writes_over_a_run(runs: dict[str, Path]) -> None:
    with pytest.raises(UsageError, match="another configuration"):
        train(load_config(settings=(*TINY, "seed=5")), runs["fedgc"])


def test_the_resolved_configuration_repeats_the_run(runs: dict[str, Path], tmp_path: Path) -> None:
    again = tmp_path / "again"
    train(load_config(runs["fedgc"] / "config.toml"), again)
    name = "checkpoints/round-0002.safetensors"
    assert (again / name).read_bytes() == (runs["fedgc"] / name).read_bytes()


@pytest.mark.parametrize("which", ["fedgc", "dp"])
def test_a_crash_between_rounds_changes_nothing(runs: dict[str, Path], tmp_path: Path, which: str) -> None:
    config = load_config(runs[which] / "config.toml")

    def crash() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path / "run", after_round=crash)
    run = RunDirectory(tmp_path / "run")
    assert run.last_round() == 1
    with pytest.raises(RunError, match="--resume"):
        train(config, tmp_path / "run")
    with pytest.raises(RunError, match="stopped after round 1 of 2"):
        attack(tmp_path / "run")
    (tmp_path / "run/state/.round-0002.json.tmp").write_text("half")  # what a crash may leave
    resumed = train(None, tmp_path / "run", resume=True)
    name = "checkpoints/round-0002.safetensors"
    assert (tmp_path / "run" / name).read_bytes() == (runs[which] / name).read_bytes()
    assert resumed["privacy"] == document(RunDirectory(runs[which]))["privacy"]


def test_a_start_that_was_cut_off_is_started_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    config = load_config(settings=TINY)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "begin", cut)
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "run")
    with pytest.raises(UsageError, match="not empty"):
        train(load_config(settings=(*TINY, "seed=5")), tmp_path / "run")
    assert train(config, tmp_path / "run")["status"] == "finished"


def test_the_untrained_baseline_is_untrained(runs: dict[str, Path]) -> None:
    values = {n: document(RunDirectory(runs[n]))["baselines"]["untrained"]["auc"]["value"] for n in ("fedavg", "fedgc")}
    assert values["fedavg"] == values["fedgc"]
    assert evaluate(runs["fedgc"])["baselines"]["untrained"]["auc"]["value"] == values["fedgc"]


def test_evaluate_finds_what_training_measured(runs: dict[str, Path]) -> None:
    assert evaluate(runs["fedgc"])["utility"] == document(RunDirectory(runs["fedgc"]))["utility"]
    elsewhere = evaluate(runs["fedgc"], "synthetic:32x4")  # with the run's seed its people are the first of these
    trained = RunDirectory(runs["fedgc"]).about()["people"]["train"]
    assert elsewhere["excluded_trained"] == trained > 0
    assert elsewhere["utility"]["identities"] == (32 - trained) // 2


def results(path: Path, *names: str, **more: Any) -> dict[tuple[str, str], dict[str, Any]]:
    return {(e["attack"], e["threat"]): e for e in attack(path, names, settings=QUICK, targets=2, **more)}


def test_who_sees_what(runs: dict[str, Path]) -> None:
    seen = {a: results(runs[a]) for a in ("fedavg", "fedpe", "fedgc")}
    linked = {a: {t for n, t in r if n == "identity-linkage" and not r[n, t]["refused"]} for a, r in seen.items()}
    assert linked == {"fedavg": {"server", "client"}, "fedpe": set(), "fedgc": {"server"}}
    refused = seen["fedgc"]["identity-linkage", "client"]
    assert "no class embedding" in refused["refused"]
    assert "class-embeddings" not in refused["granted"]
    for algorithm in ("fedavg", "fedgc"):  # the server sees the same in both
        assert "class-embeddings" in seen[algorithm]["identity-linkage", "server"]["granted"]
        assert not seen[algorithm]["gradient-inversion", "server"]["refused"]


def test_an_attack_entry_is_the_contract(runs: dict[str, Path]) -> None:
    entry = results(runs["fedgc"], "gradient-inversion")["gradient-inversion", "server"]
    assert {"attack", "threat", "run", "targets", "seconds", "granted", "refused", "metrics", "baselines"} <= set(entry)
    assert {"psnr", "ssim", "psnr_gain", "label_accuracy"} == set(entry["metrics"])
    assert {"mean-face", "nearest-auxiliary-face", "noise", "random-labels"} == set(entry["baselines"])
    assert set(entry["variants"]) == {"batch_size=2"}
    assert entry["targets"] == 2


def test_local_steps_are_recorded_on_the_same_photos_and_stand_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    train(load_config(settings=(*TINY, "record.local_steps=[1, 3]")), tmp_path / "run")
    run, plain = RunDirectory(tmp_path / "run"), RunDirectory(runs["fedgc"])
    names = ["round-0001", *(f"round-0001-step-b{b}-{k}0" for b in (1, 2) for k in ("", "k3-"))]
    assert sorted(n for n in run.transcripts() if n.startswith("round-0001")) == sorted(names)
    for batch in (1, 2):
        one, several = (f"round-0001-step-b{batch}-{k}0" for k in ("", "k3-"))
        assert torch.equal(run.load_truth(one).images, run.load_truth(several).images)
        assert run.load_transcript(several).constants.steps == 3
        files = [r.path / "transcript" / f"{one}.safetensors" for r in (run, plain)]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert run.about()["victims"] == plain.about()["victims"]
    entry = results(run.path, "gradient-inversion", threats=("server",))["gradient-inversion", "server"]
    assert (entry["batch_size"], entry.get("local_steps")) == (1, None)
    assert set(entry["variants"]) == {"batch_size=1,local_steps=3", "batch_size=2", "batch_size=2,local_steps=3"}
    assert not any(v["refused"] for v in entry["variants"].values())


def test_labels_of_single_photos_are_read_exactly(runs: dict[str, Path]) -> None:
    entry = results(runs["fedgc"], "label-inference")["label-inference", "server"]
    assert entry["metrics"]["label_accuracy"]["value"] == 1.0


def test_features_are_recovered_from_a_backbone_alone(runs: dict[str, Path]) -> None:
    entry = results(runs["fedpe"], "embedding-recovery")["embedding-recovery", "server"]
    assert entry["metrics"]["embedding_cosine"]["value"] > 0.999
    assert set(entry["baselines"]) == {"random-embedding", "mean-stranger"}  # no class embedding is held
    assert {"target", "class", "cosine"} == set(entry["samples"][0])
    held = results(runs["fedgc"], "embedding-recovery")["embedding-recovery", "server"]
    assert "nearest-class-embedding" in held["baselines"]


def test_faces_of_class_embeddings_are_judged_by_the_gallery(runs: dict[str, Path]) -> None:
    seen = results(runs["fedgc"], "template-inversion")
    assert "no class embedding of anybody else" in seen["template-inversion", "client"]["refused"]
    entry = seen["template-inversion", "server"]
    assert entry["targets"] == RunDirectory(runs["fedgc"]).about()["classes"]
    assert {"psnr", "ssim", "psnr_gain", "embedding_cosine", "rank1", "rank5", "auc"} <= set(entry["metrics"])
    assert set(entry["baselines"]) == {
        "mean-face",
        "nearest-auxiliary-face",
        "noise",
        "another-class",
        "class-embedding",
    }
    linked = results(runs["fedgc"], "identity-linkage")["identity-linkage", "server"]
    for metric in ("rank1", "auc"):  # the same class embeddings against the same people
        assert entry["baselines"]["class-embedding"][metric]["value"] == linked["metrics"][metric]["value"]
    folder = runs["fedgc"] / entry["folder"]
    assert stat.S_IMODE((folder / "grid.png").stat().st_mode) == 0o600
    assert not entry["samples"]  # they are in the owner-only samples.csv


def test_faces_of_features_from_a_step_are_judged_by_its_photos(runs: dict[str, Path]) -> None:
    settings = (*QUICK, "template-inversion.source=face-embeddings")
    (entry,) = attack(runs["fedpe"], ["template-inversion"], ["server"], settings=settings, targets=2)
    assert {"psnr", "ssim", "psnr_gain"} == set(entry["metrics"])
    assert set(entry["variants"]) == {"batch_size=2"}
    assert entry["targets"] == 2


def test_a_result_is_found_unless_forced(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["fedavg"], tmp_path / "run")
    first = results(tmp_path / "run", "identity-linkage")["identity-linkage", "client"]
    summary = tmp_path / "run" / first["folder"] / "summary.json"
    before = summary.stat().st_mtime_ns
    again = results(tmp_path / "run", "identity-linkage")["identity-linkage", "client"]
    assert (again, summary.stat().st_mtime_ns) == (first, before)
    forced = results(tmp_path / "run", "identity-linkage", force=True)["identity-linkage", "client"]
    assert summary.stat().st_mtime_ns > before
    assert forced["metrics"] == first["metrics"]


def test_attacks_need_no_private_folder(runs: dict[str, Path], tmp_path: Path) -> None:
    """Reconstructing without the truth works and gives the same bytes; only scoring reads it."""
    from attacks.registry import ATTACKS
    from fedgc.rng import generator
    from fedgc.threats import THREATS

    shutil.copytree(runs["fedgc"], tmp_path / "run")
    entry = results(tmp_path / "run", "label-inference", threats=("server",), force=True)["label-inference", "server"]
    scored, _ = read_tensors(tmp_path / "run" / entry["folder"] / "reconstructions.safetensors")
    shutil.rmtree(tmp_path / "run/private")
    run = RunDirectory(tmp_path / "run")
    name = "round-0002-step-b1-0"
    observation = THREATS["server"].observe(run.load_transcript(name), run.load_knowledge())
    found = ATTACKS["label-inference"](name="label-inference")(observation, generator(0))
    assert found.labels is not None
    assert torch.equal(found.labels, scored[f"{name}/labels"])


def test_a_refusal_that_is_all_that_was_asked_for_is_an_error(runs: dict[str, Path]) -> None:
    with pytest.raises(RefusedError, match="identity-linkage from the seat 'client'"):
        attack(runs["fedgc"], ["identity-linkage"], ["client"])


def test_a_bare_checkpoint_is_the_outsiders_view(runs: dict[str, Path]) -> None:
    file = runs["fedgc"] / "checkpoints/round-0002.safetensors"
    entries = attack(file)
    assert {e["threat"] for e in entries} == {"outsider"}
    assert all(e["refused"] for e in entries)
    assert entries[0]["granted"] == ["global-model", "public-constants"]


def test_centralized_has_no_message_to_attack(runs: dict[str, Path]) -> None:
    assert all("no message to attack" in e["refused"] for e in attack(runs["centralized"]))


def test_private_files_are_for_their_owner_only(runs: dict[str, Path]) -> None:
    results(runs["fedgc"], "gradient-inversion")
    for folder in ("private", "attacker", "state"):
        assert stat.S_IMODE((runs["fedgc"] / folder).stat().st_mode) == 0o700
    secret = [p for f in ("private", "attacker", "state", "attacks") for p in (runs["fedgc"] / f).rglob("*.*")]
    assert secret
    loose = [p for p in secret if p.is_file() and p.name != "attack.json" and stat.S_IMODE(p.stat().st_mode) != 0o600]
    assert not loose


def test_transcripts_hold_no_photo(runs: dict[str, Path]) -> None:
    run = RunDirectory(runs["fedgc"])
    for name in run.transcripts():
        tensors, _ = read_tensors(runs["fedgc"] / "transcript" / f"{name}.safetensors")
        assert all(key.rsplit("/", 1)[-1].startswith(("backbone.", "head.weight")) for key in tensors)


def test_a_report_of_several_runs(runs: dict[str, Path], tmp_path: Path) -> None:
    for name in ("fedavg", "fedgc", "dp"):
        results(runs[name])
    summary = report([runs["fedavg"], runs["fedgc"], runs["dp"]], tmp_path / "page")
    page = (tmp_path / "page/report.html").read_text()
    assert summary["report"].endswith("report.html")
    assert "untrained" in page
    assert "no class embedding" in page
    assert "What a defense changed" in page
    assert "What FedGC changed" in page
    assert {p.name for p in (tmp_path / "page").iterdir()} >= {"report.html", "results.csv", "results.json", "figures"}
    assert json.loads((tmp_path / "page/results.json").read_text())
