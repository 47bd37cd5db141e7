"""Candidate photos through the stages: who is given them, what they hold, and what is added up over rounds."""

from __future__ import annotations

import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

from attacks.candidates import CandidateMatch
from attacks.label_inference import LabelInference
from eval.privacy import candidate_ceiling
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.candidates import Hidden, hide, score_candidates
from fedgc.runs import RunDirectory
from fedgc.types import Reconstruction

QUICK = ("candidate-match.candidates=12", "candidate-match.labels=1")
NAMES = ("round-0001-step-b1-0", "round-0002-step-b1-0", "round-0002-step-b2-0")


@pytest.fixture
def run(runs: dict[str, Path], tmp_path: Path) -> RunDirectory:
    shutil.copytree(runs["fedgc"], tmp_path / "run")
    return RunDirectory(tmp_path / "run")


def test_the_victims_are_among_the_candidates_once_and_where_scoring_looks(run: RunDirectory) -> None:
    hidden = hide(run, CandidateMatch(candidates=30), NAMES, None)
    for name in NAMES:
        photos, truth = hidden[name].photos, run.load_truth(name)
        assert photos.shape == (30, 3, 32, 32)
        assert len({x.numpy().tobytes() for x in photos}) == 30
        for i, client in enumerate(truth.clients):
            assert torch.equal(photos[hidden[name].places[client]], truth.images[i])
            assert torch.equal(hidden[name].people[client], truth.labels[i])


def test_a_step_has_the_same_candidates_in_every_round(run: RunDirectory) -> None:
    first, second, other = (hide(run, CandidateMatch(candidates=30), NAMES, None)[n] for n in NAMES)
    assert torch.equal(first.photos, second.photos)
    assert not torch.equal(first.photos, other.photos)


def test_photos_of_other_steps_are_the_first_decoys(run: RunDirectory) -> None:
    photos = hide(run, CandidateMatch(candidates=30), NAMES, None)[NAMES[0]].photos
    there = {x.numpy().tobytes() for x in photos}
    for image in run.load_truth(NAMES[2]).images.flatten(0, 1):
        assert image.numpy().tobytes() in there


def test_an_attacking_client_rules_out_its_own_photos(run: RunDirectory) -> None:
    hidden = hide(run, CandidateMatch(candidates=30), NAMES, 0)[NAMES[2]]
    there = {x.numpy().tobytes() for x in hidden.photos}
    assert set(hidden.places) == {1}
    assert not {x.numpy().tobytes() for x in run.load_truth(NAMES[2]).images[0]} & there


def test_victims_are_not_left_out_where_fewer_candidates_are_asked_for(run: RunDirectory) -> None:
    hidden = hide(run, CandidateMatch(candidates=2), NAMES, None)[NAMES[2]]
    assert len(hidden.photos) == 4


def test_only_this_attack_is_given_candidates(run: RunDirectory) -> None:
    assert hide(run, LabelInference(), NAMES, None) == {}
    entries = attack(run.path, ["candidate-match", "label-inference"], ["server"], settings=QUICK)
    assert "candidates" in entries[0]["granted"]
    assert "candidates" not in entries[1]["granted"]


def test_an_undefended_step_names_its_photos(run: RunDirectory) -> None:
    for threat in ("server", "client"):
        (entry,) = attack(run.path, ["candidate-match"], [threat], settings=QUICK)
        assert entry["metrics"]["rank1"]["value"] == 1.0
        assert entry["metrics"]["rank1"]["chance"] == pytest.approx(1 / 12, abs=1e-6)
        assert entry["metrics"]["rank1"]["ceiling"] is None
        assert {"rank1", "rank5"} == set(entry["metrics"])
        assert set(entry["variants"]) == {"batch_size=2"}
        assert entry["variants"]["batch_size=2"]["metrics"]["rank1"]["chance"] == pytest.approx(1 / 11, abs=1e-6)
    assert (run.path / entry["folder"] / "samples.csv").read_text().startswith("target,class,rank,candidates")


def test_noise_brings_a_ceiling_that_rounds_raise(runs: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(runs["dp"], tmp_path / "run")
    sigma = RunDirectory(tmp_path / "run").about()["defense"]["noise_multiplier"]
    ask = partial(attack, tmp_path / "run", ["candidate-match"], ["server"], settings=QUICK, targets=2)
    (one,), (both,) = ask(), ask(round="all")
    assert "rounds" not in one
    assert both["rounds"] == [1, 2]
    assert one["targets"] == both["targets"] == 2
    for entry, rounds in ((one, 1), (both, 2)):
        bound = candidate_ceiling(12, rounds, sigma)
        assert entry["metrics"]["rank1"]["ceiling"] == pytest.approx(bound, abs=1e-6)
    assert "another-update" in both["baselines"]


def test_evidence_is_summed_over_rounds_and_noise_over_the_clients_of_a_mean() -> None:
    places = {1: torch.tensor([3]), 2: torch.tensor([5])}
    hidden = Hidden(torch.zeros(20, 3, 1, 1), places, {1: torch.tensor([7]), 2: torch.tensor([8])})
    one, two = torch.zeros(1, 20), torch.zeros(1, 20)
    one[0, [3, 0]] = torch.tensor([2.0, 3.0])
    two[0, [3, 5]] = torch.tensor([2.0, 1.0])
    names = ("round-0001-step-b1-0", "round-0002-step-b1-0")
    found = {n: Reconstruction((-1,), scores=s) for n, s in zip(names, (one, two), strict=True)}
    scores = score_candidates(found, dict.fromkeys(names, hidden), 1.5, np.random.default_rng(0))
    assert [s["rank"] for s in scores.samples] == [1, 2]  # 0 is ahead in the first round alone
    bound = candidate_ceiling(19, 2, 1.5 * 2**0.5)
    assert scores.metrics["rank1"]["ceiling"] == pytest.approx(bound, abs=1e-6)
    single = {names[0]: Reconstruction((2,), scores=one)}
    alone = score_candidates(single, {names[0]: hidden}, 1.5, np.random.default_rng(0))
    assert alone.metrics["rank1"]["ceiling"] == pytest.approx(candidate_ceiling(20, 1, 1.5), abs=1e-6)
    assert [s["class"] for s in alone.samples] == [8]
