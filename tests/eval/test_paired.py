"""Paired differences: on the same targets only, tighter than values apart, and honest where all targets agree."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from report_runs import inversion, linkage, refusal, run, with_draws

from eval.comparisons import averaged, comparisons, undefended
from eval.paired import attack_difference, paired_rate, utility_difference
from eval.results import Cell, cells
from fedgc.errors import UsageError


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(2)


def alone(result: Any) -> Cell:
    return Cell("x", (result,))


def ranked(hits: list[int], threat: str = "server", **more: Any) -> dict[str, Any]:
    """Class embeddings linked at rank 1 or not, one a person."""
    samples = [{"target": n, "class": n, "rank": 1 if hit else 7, "gallery": 80} for n, hit in enumerate(hits)]
    return {**linkage(threat, sum(hits) / len(hits), 0.0, 1.0), "samples": samples, **more}


def test_a_paired_rate_is_antisymmetric_and_holds_its_value() -> None:
    a, b = np.arange(60) % 3 == 0, np.arange(60) % 5 == 0
    one, other = paired_rate(a, b), paired_rate(b, a)
    assert one.value == pytest.approx(20 / 60 - 12 / 60)
    assert (one.low, one.high) == (pytest.approx(-other.high), pytest.approx(-other.low))
    assert one.low < one.value < one.high


def test_targets_that_are_alike_make_a_paired_rate_narrow() -> None:
    a = np.arange(100) < 40
    alike, unlike = paired_rate(a, np.arange(100) < 30), paired_rate(a, np.arange(100) >= 70)
    assert alike.value == pytest.approx(unlike.value)
    assert alike.high - alike.low < 0.7 * (unlike.high - unlike.low)


def test_targets_that_all_agree_leave_a_width() -> None:
    for hits in (np.zeros(20, bool), np.ones(20, bool)):
        same = paired_rate(hits, hits)
        assert same.value == 0
        assert same.low < -0.05
        assert same.high > 0.05
    lost = paired_rate(np.zeros(4, bool), np.ones(4, bool))
    assert (lost.value, lost.low) == (-1.0, -1.0)
    assert lost.high > -0.5


def test_a_paired_rate_refuses_what_is_not_paired() -> None:
    assert paired_rate([], []).why == "no target in common"
    with pytest.raises(UsageError, match="equal lengths"):
        paired_rate([True], [True, False])


def test_utility_is_paired_by_the_draws_of_both_runs(rng: np.random.Generator) -> None:
    shared = rng.normal(0, 0.03, 2000)
    better = with_draws(run(auc=0.85), 0.85 + shared + rng.normal(0, 0.001, 2000))
    worse = with_draws(run(epsilon=8.0, auc=0.75), 0.75 + shared + rng.normal(0, 0.001, 2000))
    found = utility_difference(alone(worse), alone(better), "auc", rng=rng)
    m = found.measured
    assert m.value == pytest.approx(-0.1)
    assert m.low is not None
    assert m.high is not None
    assert m.high - m.low < 0.01  # either interval alone is 0.12 wide
    assert found.told
    assert utility_difference(alone(better), alone(better), "auc", rng=rng).told is False


@pytest.mark.parametrize("change", ["splits", "seed", "draws"])
def test_what_is_not_the_same_is_not_subtracted(change: str, rng: np.random.Generator) -> None:
    one, other = (with_draws(run(), np.full(50, 0.85)) for _ in range(2))
    if change == "seed":
        other = replace(other, about={**other.about, "seed": 1})
    elif change == "splits":
        other = replace(other, about={**other.about, "splits": {**other.about["splits"], "test": "other"}})
    else:
        other = replace(other, draws=dict)
    found = utility_difference(alone(one), alone(other), "auc", rng=rng)
    assert found.measured.value is None
    assert "same test people" in str(found.measured.why)


def test_seeds_are_resampled_with_people_and_shown_apart(rng: np.random.Generator) -> None:
    def cell(level: float, spread: float) -> Cell:
        made = [
            with_draws(run(seed=s, auc=level + spread * s), level + spread * s + rng.normal(0, 0.001, 500))
            for s in range(5)
        ]
        return Cell("x", tuple(made))

    alike = utility_difference(cell(0.8, 0.0), cell(0.7, 0.0), "auc", rng=rng)
    unlike = utility_difference(cell(0.8, 0.02), cell(0.7, 0.0), "auc", rng=rng)
    assert unlike.seeds == pytest.approx((0.1, 0.12, 0.14, 0.16, 0.18))
    assert unlike.measured.value == pytest.approx(0.14)
    wide, narrow = (d.measured.high - d.measured.low for d in (unlike, alike))
    assert wide > 10 * narrow


def test_attacks_are_paired_by_person(rng: np.random.Generator) -> None:
    one, other = run(attacks=[ranked([1] * 30 + [0] * 10)]), run(attacks=[ranked([1] * 28 + [0] * 12)])
    found = attack_difference(alone(one), alone(other), "identity-linkage", "server", rng=rng)
    assert found is not None
    assert (found.metric, found.measured.n) == ("rank1", 40)
    assert found.measured.value == pytest.approx(0.05)
    fewer = run(attacks=[ranked([1] * 20)])  # a client sees fewer people: those in common count
    found = attack_difference(alone(one), alone(fewer), "identity-linkage", "server", rng=rng)
    assert found is not None
    assert (found.measured.value, found.measured.n) == (0.0, 20)


def test_pictures_are_paired_by_victim_and_few_are_marked(rng: np.random.Generator) -> None:
    found = attack_difference(
        alone(run(attacks=[inversion(3.0)])), alone(run(attacks=[inversion(1.0)])), "gradient-inversion", "server", rng=rng
    )  # fmt: skip
    assert found is not None
    assert (found.metric, found.measured.value, found.measured.note) == ("psnr_gain", 2.0, "indicative: 5 people")


@pytest.mark.parametrize("change", [{"batch_size": 4}, {"round": 3}, {"samples": []}])
def test_other_targets_are_not_compared(change: dict[str, Any], rng: np.random.Generator) -> None:
    one, other = run(attacks=[inversion(3.0)]), run(attacks=[{**inversion(1.0), **change}])
    found = attack_difference(alone(one), alone(other), "gradient-inversion", "server", rng=rng)
    assert found is not None
    assert found.measured.value is None


def test_a_refusal_is_not_a_difference(rng: np.random.Generator) -> None:
    one, other = run(attacks=[linkage("client", 0.6, 0.5, 0.7)]), run(attacks=[refusal("identity-linkage", "client")])
    assert attack_difference(alone(one), alone(other), "identity-linkage", "client", rng=rng) is None


def test_cells_are_compared_with_what_differs_in_one_thing_only() -> None:
    other = run("fedgc", 7.83)
    other = replace(other, config={**other.config, "federation": {**other.config["federation"], "clients": 9}})
    made = cells([run("fedavg"), run("fedgc"), run("fedavg", 7.83), run("fedgc", 7.83), other])
    twins = {c.label: undefended(c, made) for c in made}
    fedavg, fedgc = made[0], next(c for c in made if c.label == "FedGC, no defense")
    assert twins["FedAvg, ε = 7.83"] is fedavg
    assert twins["FedAvg, no defense"] is None
    nine = next(c for c in made if "clients = 9" in c.label)
    assert undefended(nine, made) is None
    assert averaged(fedgc, made) is fedavg
    assert averaged(fedavg, made) is None


def test_tables_of_differences(rng: np.random.Generator) -> None:
    shared = rng.normal(0, 0.03, 300)
    made = [
        with_draws(run(a, e, [ranked([1] * h + [0] * (30 - h))], auc=u), u + shared)
        for a, e, h, u in (("fedavg", None, 20, 0.85), ("fedgc", None, 20, 0.85), ("fedavg", 7.83, 2, 0.74))
    ]
    defense, algorithm = comparisons(cells(made))
    assert defense["columns"] == ["FedAvg, ε = 7.83"]
    rows = {(r["who"], r["what"]): r["cells"][0] for r in defense["rows"]}
    assert rows["utility", "AUC"]["text"] == "−0.110"
    assert rows["utility", "AUC"]["strong"]
    assert rows["server", "identity-linkage: named at rank 1"]["text"].startswith("−60.0")
    assert algorithm["columns"] == ["no defense"]
    assert algorithm["rows"][0]["cells"][0]["strong"] is False
    assert defense["count"] == 2
    assert comparisons(cells([run()])) == []
