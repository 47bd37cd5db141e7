"""The best attack of each seat, who gets what, and what may be said where nothing was found."""

from __future__ import annotations

import pytest
from report_runs import both_algorithms, entry, inversion, linkage, refusal, run, value

from eval.claims import absence, may_bound, overclaims
from eval.envelope import advantage, matrix, worst, worst_text
from eval.front import front, labelled
from eval.plotting import WORST, leakage
from eval.results import Cell, Spread, cells
from eval.tradeoff import pareto


def only(*attacks: dict) -> Cell:
    return cells([run(attacks=list(attacks))])[0]


@pytest.mark.parametrize(
    ("value_", "chance", "scaled"), [(0.5, 0.5, 0), (1, 0.2, 1), (0.75, 0.5, 0.5), (0.1, 0.2, -0.125)]
)
def test_advantage_is_nothing_at_chance_and_one_at_the_top(value_: float, chance: float, scaled: float) -> None:
    assert advantage(value_, chance) == pytest.approx(scaled)


def test_advantage_needs_a_chance() -> None:
    assert advantage(0.5, None) is None
    assert advantage(None, 0.5) is None
    assert advantage(0.5, 1.0) is None


def test_the_worst_attack_is_that_which_shows_most_not_that_which_was_lucky() -> None:
    lucky = entry("label-inference", "server", {"label_accuracy": value(0.7, 0.05, 1.0, n=3, chance=0.02)})
    best = worst(only(lucky, linkage("server", 0.6, 0.5, 0.7), inversion(9.0)), "server")
    assert best is not None
    assert (best.attack, best.tried, best.clear, best.told) == ("identity-linkage", 2, 2, True)
    assert best.value == pytest.approx((0.6 - 0.0125) / (1 - 0.0125))
    spread = leakage(only(linkage("server", 0.6, 0.5, 0.7)), WORST, "server")
    assert (spread.value, spread.chance) == (pytest.approx(best.value), 0.0)


def test_labels_that_a_picture_attack_reads_are_not_counted_twice() -> None:
    both = inversion(3.0)
    both = {**both, "metrics": {**both["metrics"], "label_accuracy": value(1.0, 0.6, 1.0, chance=0.02)}}
    assert worst(only(both), "server") is None


def test_no_attack_and_nothing_to_attack_are_told_apart() -> None:
    cell = only(refusal("identity-linkage", "client"))
    assert worst_text(cell, "client")["why"] == "nothing to attack"
    assert worst_text(cell, "server")["why"] == "not attacked"


def test_who_gets_what_has_a_sign_for_each() -> None:
    weak = linkage("client", 0.02, 0.0, 0.1)
    made = cells([run("fedavg", None, [linkage("server", 0.6, 0.5, 0.7), weak]), run("fedgc", None, [
        linkage("server", 0.6, 0.5, 0.7), refusal("identity-linkage", "client")])])  # fmt: skip
    found = matrix(made)
    assert found["spans"] == {"the server": 2, "another client": 2}
    assert found["columns"] == ["FedAvg", "FedGC", "FedAvg", "FedGC"]
    [row] = found["rows"]
    assert [m["sign"] for m in row["marks"]] == ["●", "●", "○", "–"]
    assert [m["word"] for m in row["marks"]][2:] == ["not told from chance", "nothing to attack"]


def test_the_front_has_three_labelled_sentences_and_one_line_a_cell() -> None:
    made = cells(both_algorithms())
    assert [label for label, _ in labelled(made)] == ["To another client", "To the server", "What ε buys"]
    assert [label for label, _ in labelled(cells([run()]))] == ["Leakage", "What ε buys"]
    page = front(made)
    assert len(page["rows"]) == 4
    assert page["seats"] == ["the server", "another client"]
    assert not page["changes"]  # these runs kept no draws


@pytest.mark.parametrize(("n", "bound"), [(None, False), (20, False), (99, False), (100, True)])
def test_a_failure_is_given_a_bound_from_a_hundred_targets_on(n: int | None, bound: bool) -> None:
    said = absence(Spread(0.01, 0.0, 0.054, n, 0.01), "%")
    assert may_bound(n) is bound
    assert ("at most" in said) is bound
    assert ("too few" in said) is not bound
    assert overclaims(said) == []


@pytest.mark.parametrize(
    "text", ["FedGC does not leak.", "This run leaks  nothing", "so the model is private", "There is no leakage here"]
)
def test_claims_that_no_attack_supports_are_found(text: str) -> None:
    assert len(overclaims(text)) == 1


def test_the_front_of_configurations() -> None:
    points = [(1.0, 0.9), (0.2, 0.5), (0.5, 0.8), (0.6, 0.7), (0.2, 0.4), (1.0, 0.95)]
    assert pareto(points) == [(0.2, 0.5), (0.5, 0.8), (1.0, 0.95)]
    assert pareto([]) == []
