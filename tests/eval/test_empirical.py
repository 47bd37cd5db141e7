"""Bounds from canaries in the report: beside the promise, and loud where it is false."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from report_runs import entry, run, value

from eval.empirical import alarms, empirical, statement
from eval.narrative import accounting, verdict
from eval.report import build
from eval.results import cells


def audited(bound: float, claim: dict[str, Any], seat: str = "server") -> dict[str, Any]:
    measured = value(bound, n=200, chance=0.0, ceiling=2.02, claim=claim, delta=1e-3, guesses=50, right=49)
    return entry("canary-inference", seat, {"epsilon_lower_bound": {**measured, "high": None}})


@pytest.fixture
def kept() -> list[Any]:
    return cells([run("fedgc", 7.83, [audited(0.9, {"value": 7.83, "delta": 1e-3})])])


@pytest.fixture
def broken() -> list[Any]:
    return cells([run("fedgc", 0.5, [audited(0.9, {"value": 0.5, "delta": 1e-3})])])


def test_a_bound_stands_beside_the_promise(kept) -> None:
    found = empirical(kept)
    assert found["rows"] == [
        {
            "label": kept[0].label,
            "cells": ["server", "7.83", "0.90", "2.02", "0.001", "49 of 50", "200"],
            "false": False,
        }
    ]
    assert found["alarms"] == alarms(kept) == []
    assert "cannot tell which" in found["meaning"]
    assert dict(accounting(kept)["shared"])["ε measured, at least"] == (
        "0.90 (200 canaries, server; 2.02 if every guess were right)"
    )


def test_a_false_promise_is_the_first_thing_that_is_said(broken, tmp_path: Path) -> None:
    first = verdict(broken)[0]
    assert "is false" in first
    assert "at least 0.90" in first
    assert "0.5 was promised" in first
    build([broken[0].first], tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert page.count("is false") == 2  # in the verdict and in the section on epsilon


def test_a_promise_to_another_unit_is_not_compared() -> None:
    found = empirical(cells([run("fedgc", 0.5, [audited(0.9, {"value": None, "why": "epsilon is a client's"})])]))
    assert found["rows"][0]["cells"][1] == "not compared"
    assert found["notes"] == ["epsilon is a client's"]
    assert found["alarms"] == []


def test_of_several_seats_the_statement_names_the_one_that_shows_most() -> None:
    claim = {"value": 7.83, "delta": 1e-3}
    found = cells([run("fedavg", 7.83, [audited(0.2, claim, "client"), audited(0.9, claim)])])
    assert statement(found[0])["ε measured, at least"].startswith("0.90 (200 canaries, server")


def test_without_canaries_nothing_is_said() -> None:
    plain = cells([run("fedgc", 7.83, [])])
    assert empirical(plain)["rows"] == []
    assert statement(plain[0]) == {}
    assert "ε measured, at least" not in dict(accounting(plain)["shared"])
