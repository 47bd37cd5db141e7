"""The report against its own null: who knows nothing comes out at chance, and who knows does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from attacks.registry import ATTACKS
from fedgc.pipeline import entries
from tests.trust.cases import Case
from tests.trust.nulls import CONTROLS, NULLS, Pictures, above, registered

TOLD = {  # what the check has to notice in a control
    "the very photo": ("sar1@fmr=0.01", "sar2@fmr=0.01", "identity_z", "rank1", "auc", "a mark above chance"),
    "the model that saw the victim": (
        "rank1", "auc", "embedding_cosine", "label_accuracy", "re-identifies", "headline identity-linkage",
        "a mark above chance", "attacks above chance",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", NULLS, ids=lambda case: case.name)
def test_who_knows_nothing_is_reported_at_chance(case: Case, tmp_path: Path) -> None:
    assert case.run(tmp_path) is None


@pytest.mark.parametrize("case", CONTROLS, ids=lambda case: case.name)
def test_who_knows_is_reported_above_it(case: Case, tmp_path: Path) -> None:
    """Without this, a check that cannot fail would pass for a report at chance."""
    said = case.run(tmp_path) or ""
    assert [words for words in TOLD[case.name] if words not in said] == []


def row(metric: str, value: float, low: float, high: float, chance: float) -> dict[str, str]:
    numbers = {"value": value, "low": low, "high": high, "chance": chance, "n": 100}
    return {"attack": "a", "metric": metric, **{name: str(number) for name, number in numbers.items()}}


@pytest.mark.parametrize(
    ("figure", "complaint"),
    [
        (row("sar1@fmr=0.01", 0.0, 0.0, 0.036, 0.01), None),
        (row("sar1@fmr=0.01", 0.03, 0.0, 0.09, 0.01), None),
        (row("sar1@fmr=0.01", 0.06, 0.0, 0.15, 0.01), "exact interval"),  # hidden by a threshold of few people
        (row("auc", 0.3, 0.2, 0.4, 0.5), "auc"),  # wrong as reliably as another is right
        (row("identity_z", -0.3, -0.5, -0.1, 0.0), None),
        (row("identity_z", 0.3, 0.1, 0.5, 0.0), "identity_z"),
    ],
)
def test_what_counts_as_chance(figure: dict[str, str], complaint: str | None) -> None:
    found = above([figure], [("a", figure["metric"])])
    assert not found if complaint is None else complaint in found[0]
    assert above([], [("a", "rank1")]) == ["a has no rank1"]


def test_an_attack_of_a_test_leaves_the_product_as_it_was() -> None:
    before = dict(ATTACKS), entries.AnyAttack
    with registered(Pictures):
        assert entries.make_attack("null-pictures", ["null-pictures.of=people"]).reads == "round"
    assert (dict(ATTACKS), entries.AnyAttack) == before
