"""Canaries through the stages: trained on by their coins, told to the attacker without them, and scored beside the promise."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
import torch
from tiny import TINY

from fedgc.config import load_config
from fedgc.errors import RefusedError
from fedgc.pipeline.attacking import attack, usual_attacks
from fedgc.pipeline.canaries import claim_of
from fedgc.pipeline.reporting import report
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory

PLANTED = ("audit.canaries=20", "record.rounds=all")


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, RunDirectory]:
    root, made = tmp_path_factory.mktemp("planted"), {}
    private = ("defense.name=dp-sgd", "defense.noise_multiplier=1", "defense.noise_seed=1")
    for name, settings in {"fedavg": (), "dp": private}.items():
        train(load_config(settings=(*TINY, *PLANTED, "federation.algorithm=fedavg", *settings)), root / name)
        made[name] = RunDirectory(root / name)
    return made


def test_they_count_as_photos_of_their_client_and_are_no_victims(planted, runs: dict[str, Path]) -> None:
    run, plain = planted["fedavg"], RunDirectory(runs["fedavg"])
    coins, candidates = run.load_coins(), run.load_canaries()
    assert run.about()["images"] == plain.about()["images"] + int(coins.sum())
    (now, before) = (r.load_transcript("round-0002").examples for r in (run, plain))
    for client in now:
        assert now[client] == before[client] + int((coins & (candidates.clients == client)).sum())
    assert run.about()["victims"] == plain.about()["victims"]
    assert run.about()["splits"] == plain.about()["splits"]
    for mine, theirs in zip(run.load_bystanders(), plain.load_bystanders(), strict=True):
        assert torch.equal(mine.images, theirs.images)
    assert torch.equal(run.load_knowledge().gallery.images, plain.load_knowledge().gallery.images)


def test_coins_are_kept_apart_from_candidates_and_owner_only(planted) -> None:
    run = planted["fedavg"]
    for folder in ("private", "attacker"):
        file = run.path / folder / "canaries.safetensors"
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
    (run.path / "private/canaries.safetensors").rename(run.path / "private/hidden")
    assert run.load_canaries().images.shape == (20, 3, 32, 32)
    (run.path / "private/hidden").rename(run.path / "private/canaries.safetensors")


def test_a_run_without_canaries_has_no_file_of_them_and_is_not_asked(planted, runs: dict[str, Path]) -> None:
    plain = RunDirectory(runs["fedgc"])
    assert plain.load_canaries() is None
    assert not list(plain.path.rglob("canaries*"))
    assert "canary-inference" not in usual_attacks(plain)
    assert "canary-inference" in usual_attacks(planted["fedavg"])
    with pytest.raises(RefusedError, match=r"needs auxiliary-faces \+ canaries"):
        attack(plain.path, ["canary-inference"], ["server"])


def test_rounds_add_up_and_the_bound_stands_beside_its_ceiling(planted) -> None:
    (entry,) = attack(planted["fedavg"].path, ["canary-inference"], ["server"], round="all")
    assert entry["rounds"] == [1, 2]
    assert entry["targets"] == 20
    assert entry["samples"] == []  # which canary was in is in the owner-only samples.csv alone
    assert "canaries" in entry["granted"]
    assert {"auc", "epsilon_lower_bound", "tpr@fpr=0.01", "tpr@fpr=0.1"} == set(entry["metrics"])
    bound = entry["metrics"]["epsilon_lower_bound"]
    assert 0 <= bound["value"] <= bound["ceiling"]
    assert bound["n"] == 20
    assert bound["claim"]["value"] is None
    assert "absent-image" in entry["baselines"]
    (one,) = attack(planted["fedavg"].path, ["canary-inference"], ["server"], round="1")
    assert "rounds" not in one
    assert one["round"] == 1


def test_only_this_attack_is_given_canaries_and_a_client_not_its_own(planted) -> None:
    run = planted["fedavg"]
    entries = attack(run.path, ["canary-inference", "identity-linkage"], ["client"])
    assert entries[0]["targets"] == int((run.load_canaries().clients != 0).sum()) == 10
    assert "canaries" not in entries[1]["granted"]


def test_the_bound_stands_beside_a_promise_to_a_photo(planted, tmp_path: Path) -> None:
    (photo,) = attack(planted["dp"].path, ["canary-inference"], ["server"], round="all")
    privacy = planted["dp"].about()["privacy"]
    bound = photo["metrics"]["epsilon_lower_bound"]
    assert bound["claim"] == {"value": privacy["epsilon"], "delta": 1e-3}
    assert bound["delta"] == 1e-3
    assert bound["value"] <= privacy["epsilon"]
    report([planted["dp"].path], tmp_path / "page")
    page = (tmp_path / "page/report.html").read_text()
    assert "What canaries show of ε" in page
    assert "ε measured, at least" in page
    assert "is false" not in page


def test_what_is_promised_to_others_than_a_photo_is_withheld() -> None:
    assert claim_of(None).epsilon is None
    assert claim_of({"unit": "image", "epsilon": 3.0, "delta": 1e-4}).to_json() == {"value": 3.0, "delta": 1e-4}
    for unit, whom in (("client", "a whole client"), ("identity", "a person with all photos")):
        other = claim_of({"unit": unit, "epsilon": 3.0, "delta": 1e-4})
        assert other.epsilon is None
        assert whom in other.to_json()["why"]
