"""Epsilon is withheld, with the reason, where what ran is not what was accounted for; the report says so."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from eval.report import build
from eval.results import cells
from fedgc.config import load_config
from fedgc.errors import WorkFailedError
from fedgc.pipeline.canaries import claim_of
from fedgc.pipeline.reporting import report
from fedgc.pipeline.training import train
from fedgc.rounds import Rounds, ledger_of
from fedgc.runs import RunDirectory
from tests.eval.report_runs import run
from tests.tiny import TINY
from tests.trust.promises import PROMISES

QUICK = ("client-dp", "clipped", "clients")
WHY = "sampling: client 0 drew 9 photos"


def test_there_are_as_many_as_promised() -> None:
    assert len(PROMISES) == len({case.name for case in PROMISES}) == 22


@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=c.name, marks=[] if any(w in c.name for w in QUICK) else pytest.mark.slow) for c in PROMISES],
)
def test_a_promise_stands_only_where_it_was_kept(case, tmp_path: Path) -> None:
    assert case.run(tmp_path) is None


def test_the_report_and_the_terminal_say_that_it_is_withheld(cli, tmp_path: Path) -> None:
    settings = (*TINY, "defense.name=client-dp", "defense.noise_multiplier=1", "defense.delta=0.1")
    train(load_config(settings=settings), tmp_path / "run")
    directory = RunDirectory(tmp_path / "run")
    told = directory.about()["privacy"]
    directory.update(privacy={**told, "epsilon": None, "why": WHY})
    summary = report([tmp_path / "run"], tmp_path / "report")
    page = (tmp_path / "report/report.html").read_text()
    assert "is withheld.</strong>" in page
    assert WHY in page
    assert summary["headline"][0]["epsilon"] is None
    assert "No run was trained with differential privacy" not in page
    outcome = cli("train", *(p for s in settings for p in ("--set", s)), "--out", tmp_path / "run")
    assert f"withheld: {WHY}" in " ".join(outcome.out.split())


def test_a_cell_with_one_withheld_seed_has_no_epsilon(tmp_path: Path) -> None:
    good, bad = run("fedgc", 8.0, seed=0), run("fedgc", 8.0, seed=1)
    assert bad.about["privacy"] is not None
    bad = replace(bad, about={**bad.about, "privacy": {**bad.about["privacy"], "epsilon": None, "why": WHY}})
    (cell,) = cells([good, bad])
    assert (cell.epsilon, cell.withheld) == (None, WHY)
    build([run("fedgc"), good, bad], tmp_path / "report")
    rows = json.loads((tmp_path / "report/results.json").read_text())["headline"]
    assert [row["epsilon"] for row in rows] == [None, None]


def test_canaries_are_not_held_against_what_is_withheld() -> None:
    claim = claim_of({"epsilon": None, "unit": "image", "delta": 1e-3, "why": WHY})
    assert claim.epsilon is None
    assert WHY in str(claim.why)


def test_a_round_that_failed_is_paid_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clients answered before the server failed: what they sent is sent, whether the round counts or not."""
    settings = (
        *TINY,
        "defense.name=dp-sgd",
        "defense.noise_multiplier=1.0",
        "defense.noise_seed=2",
        "record.victims=0",
    )
    with monkeypatch.context() as patch:
        patch.setattr("fedgc.inbox.Inbox.aggregate", lambda inbox: (_ for _ in ()).throw(WorkFailedError("no")))
        with pytest.raises(WorkFailedError, match="no"):
            train(load_config(settings=settings), tmp_path / "run")
    sealed = json.loads((tmp_path / "run/privacy.json").read_text())["content"]
    assert {charge.client for charge in ledger_of(sealed)} == {0, 1}
    train(None, tmp_path / "run", resume=True)
    train(load_config(settings=settings), tmp_path / "whole")
    assert (tmp_path / "run/privacy.json").read_bytes() == (tmp_path / "whole/privacy.json").read_bytes()
    assert Rounds(tmp_path / "run").last_round() == 2
