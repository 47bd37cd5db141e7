"""--fail-if: what trips it, what does not, and what a wrong expression is answered with."""

from __future__ import annotations

import pytest
from report_runs import REASON, both_algorithms, run

from eval.gate import failing, parse, unjudged
from eval.rows import gate_entries
from fedgc.errors import UsageError

ENTRIES = gate_entries(both_algorithms())


@pytest.mark.parametrize(
    ("expression", "tripped"),
    [
        ("identity-linkage@client.rank1 > 0.05", True),
        ("identity-linkage@client.rank1>0.61", False),
        ("identity-linkage@client.rank1 >= 0.61", True),
        ("identity-linkage@server.rank1 < 0.02", False),
        ("identity-linkage@server.rank1 <= 0.02", True),
        ("utility.auc < 0.8", True),
        ("utility.auc < 0.5", False),
        ("utility.tar@far=0.1<0.41", True),
        ("utility.tar@far=0.01 < 1", False),
        ("gradient-inversion@server.psnr_gain > -1e0", True),
    ],
)
def test_comparisons(expression: str, tripped: bool) -> None:
    assert bool(failing(expression, ENTRIES)) == tripped


def test_messages_say_which_run_and_what_was_not_judged() -> None:
    first, *others = failing("identity-linkage@client.rank1 > 0.05", ENTRIES)
    assert first == "runs/fedavg-plain-0: identity-linkage@client.rank1 = 0.61 [0.5, 0.71] > 0.05"
    assert [line for line in others if REASON in line] == others
    assert len(others) == 2


def test_refused_and_unsupported_do_not_trip() -> None:
    only_fedgc = [e for e in ENTRIES if e["run"].startswith("runs/fedgc")]
    assert failing("identity-linkage@client.rank1 >= 0", only_fedgc) == []
    assert len(unjudged("identity-linkage@client.rank1 >= 0", only_fedgc)) == 2
    assert "not supported" in unjudged("utility.tar@far=0.01 < 1", ENTRIES)[0]


def test_documents_of_train_are_judged_too() -> None:
    document = {"run": "r", "utility": run().about["utility"]}
    assert failing("utility.auc < 0.9", [document]) == ["r: utility.auc = 0.85 [0.8, 0.9] < 0.9"]


@pytest.mark.parametrize(
    "expression",
    [
        "", "rank1 > 0.5", "identity-linkage@client.rank1 = 0.5", "identity-linkage@client.rank1 > much",
        "identity-linkage@client.rank1 > nan", "identity-linkage.rank1 > 0.1", "utility@server.auc < 0.1",
        "__import__('os').system('true') > 0", "utility.auc < 0.8 and utility.eer > 0.2",
    ],
)  # fmt: skip
def test_what_is_no_comparison_is_answered_with_the_form(expression: str) -> None:
    with pytest.raises(UsageError, match=r"ATTACK@SEAT\.METRIC > NUMBER"):
        failing(expression, ENTRIES)


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="identity-linkage@client, identity-linkage@server, utility"):
        failing("candidate-match@server.rank1 > 0", ENTRIES)
    with pytest.raises(UsageError, match="it has rank1"):
        failing("identity-linkage@client.rank2 > 0", ENTRIES)
    refused = [e for e in ENTRIES if e["refused"]]
    with pytest.raises(UsageError, match="has no 'rank2'"):
        failing("identity-linkage@client.rank2 > 0", refused)


def test_parse() -> None:
    gate = parse("  utility.tar@far=0.01 <= 2e-1 ")
    assert (gate.attack, gate.threat, gate.metric, gate.compare, gate.limit) == (
        "utility",
        None,
        "tar@far=0.01",
        "<=",
        0.2,
    )
