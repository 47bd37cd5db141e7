"""A run in which one client probes, from training to scores."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TINY

from fedgc.config import load_config
from fedgc.errors import RefusedError, UsageError
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory


@pytest.fixture(scope="module")
def probed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("probed") / "run"
    more = ("probing.rounds=5", "federation.rounds=6", "record.rounds=[3,6]", "record.victims=0", "correction.weight=4")
    train(load_config(settings=(*TINY, *more)), path)
    return path


def test_probes_come_nearer_to_strangers_round_by_round(probed: Path) -> None:
    entries = [attack(probed, ["correction-probe"], ["probing-client"], round=t)[0] for t in ("3", "6")]
    early, late = (e["metrics"]["embedding_cosine"]["value"] for e in entries)
    chance = entries[1]["metrics"]["embedding_cosine"]["chance"]
    assert late > early
    assert late > chance + 0.2
    assert "probes" in entries[1]["granted"]
    both = attack(probed, ["correction-probe"], ["probing-client"], round="all")[0]
    assert both["rounds"] == [3, 6]
    assert both["targets"] == entries[0]["targets"] + entries[1]["targets"]


def test_faces_of_what_was_reached_are_scored_as_the_nearest_strangers(probed: Path) -> None:
    quick = [f"template-inversion.{s}" for s in ("source=correction", "iterations=3", "components=10", "copies=1")]
    entry = attack(probed, ["template-inversion"], ["probing-client"], settings=quick)[0]
    transcript = RunDirectory(probed).load_transcript("round-0006")
    table = (probed / entry["folder"] / "samples.csv").read_text().splitlines()
    place = table[0].split(",").index("class")
    assert len(table) - 1 == entry["targets"] > 0
    assert all(transcript.owners[int(line.split(",")[place])] != 0 for line in table[1:])
    assert {"rank1", "psnr_gain", "embedding_cosine"} <= set(entry["metrics"])


def test_a_client_that_departed_is_not_curious_as_well(probed: Path, runs: dict[str, Path]) -> None:
    with pytest.raises(RefusedError, match="its seat is 'probing-client'"):
        attack(probed, ["correction-probe"], ["client"])
    with pytest.raises(RefusedError, match=r"no client departed from the protocol .* --set probing\.rounds=8"):
        attack(runs["fedgc"], ["correction-probe"], ["probing-client"])
    seats = {e["threat"] for e in attack(runs["fedgc"], ["correction-probe"])}
    assert seats == {"server", "client", "outsider"}


def test_it_takes_a_server_that_answers(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="a server answers class embeddings under fedgc"):
        train(load_config(settings=(*TINY, "probing.rounds=1", "federation.algorithm=fedpe")), tmp_path / "run")
