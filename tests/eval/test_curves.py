"""Figures: drawn from what is there, the same bytes from the same results, nothing claimed about what was refused."""

from __future__ import annotations

import io
import math
import re

import matplotlib
import pytest
from PIL import Image
from report_runs import both_algorithms, entry, linkage, refusal, run, utility, value

from eval.curves import curves, privacy_utility
from eval.places import Places
from eval.plotting import STYLES, Drawn
from eval.references import ceiling, gamma, measured_epsilon
from eval.report import inline
from eval.results import Spread, cells
from eval.tradeoff import leakage_against_utility


@pytest.fixture(scope="module")
def drawn() -> list[Drawn]:
    return curves(cells(both_algorithms()))


def test_every_figure_in_both_formats(drawn: list[Drawn]) -> None:
    assert [d.name for d in drawn] == ["privacy-utility", "leakage-utility", "attacks"]
    for figure in drawn:
        assert figure.svg.startswith(b"<?xml")
        assert b"<dc:date>" not in figure.svg
        assert Image.open(io.BytesIO(figure.png)).width > 800
        assert "FedGC, ε = 7.83: AUC 0.740" in figure.alt
        text = figure.svg.decode()
        assert "nothing to attack" in text
        assert "no DP" in text


def test_same_results_same_bytes_and_no_setting_left_behind(drawn: list[Drawn]) -> None:
    before = dict(matplotlib.rcParams)
    again = curves(cells(both_algorithms()))
    assert [(d.svg, d.png) for d in drawn] == [(d.svg, d.png) for d in again]
    assert dict(matplotlib.rcParams) == before


def test_inline_svg_needs_no_namespace_and_shares_no_identifier(drawn: list[Drawn]) -> None:
    texts = [inline(d) for d in drawn]
    for text in texts:
        assert text.startswith("<svg")
        assert "http" not in text
        known = set(re.findall(r'\bid="([^"]+)"', text))
        used = set(re.findall(r'(?:url\(|href=")#([^")]+)', text))
        assert used
        assert used <= known
    ids = [set(re.findall(r'\bid="([^"]+)"', text)) for text in texts]
    assert len(set.union(*ids)) == sum(map(len, ids))


def test_less_protection_is_further_right_and_no_promise_beyond_the_break() -> None:
    runs = [run(epsilon=8.0), run(epsilon=50.0), run(), run(epsilon=1000.0)]
    grouped = cells(runs)
    place = Places(grouped)
    order = [c.epsilon for c in sorted(grouped, key=place)]
    assert order == [8.0, 50.0, 1000.0, None]
    assert place.gap is not None
    assert place(grouped[1]) < place.gap < place(grouped[0])


def test_no_break_without_a_promise_or_without_its_absence() -> None:
    assert Places(cells([run()])).gap is None
    assert Places(cells([run(epsilon=8.0)])).gap is None


def test_figures_without_figures() -> None:
    unmeasured = run()
    unmeasured.about["utility"]["auc"] = {"value": None, "low": None, "high": None, "n": 1, "why": "diverged"}
    assert curves(cells([unmeasured])) == []
    assert leakage_against_utility(cells([run("fedgc", None, [refusal("identity-linkage", "client")])])) is None
    only_utility = privacy_utility(cells([run()]))
    assert only_utility is not None
    assert b"rank 1" not in only_utility.svg


@pytest.mark.parametrize("count", [1, 3])
def test_seeds_are_drawn_faintly_where_there_are_several(count: int) -> None:
    runs = [run(seed=s, attacks=[linkage("server", 0.1 + s / 10, 0.0, 0.5)]) for s in range(count)]
    figure = privacy_utility(cells(runs))
    assert figure is not None
    assert (b"opacity: 0.3" in figure.svg) == (count > 1)


def test_bounds_and_baselines_stand_beside_what_was_measured() -> None:
    match = {"rank1": value(0.2, 0.0, 0.6, n=8, chance=0.01, ceiling=0.4)}
    canary = {"epsilon_lower_bound": value(0.9, n=200, chance=0.0, ceiling=2.02, claim={"value": 7.83}, delta=1e-3)}
    attacks = [entry("candidate-match", "server", match), entry("canary-inference", "server", canary)]
    made = [run(epsilon=7.83, attacks=attacks), run(attacks=[entry("candidate-match", "server", match)])]
    for result in made:
        result.about["baselines"]["public-only"] = utility(0.78)
    top, _, each = curves(cells(made))
    text = top.svg.decode()
    for words in ("untrained net", "public-only net", "promised ε", "What canaries show of ε", "known photo"):
        assert words in text, words
    for words in ("most that any attack on these steps can get", "γ: most for a photo of the whole run"):
        assert words in each.svg.decode()
    private = cells(made)[1]
    assert gamma(private, 0.01) == pytest.approx(min(1.0, 1e-3 + 0.01 * math.exp(7.83)))
    assert gamma(cells(made)[0], 0.01) is None
    assert ceiling(private, "candidate-match", "server", "rank1") == 0.4
    assert measured_epsilon(private, "server") == Spread(0.9, 0.9, 2.02, 200, 0.0)
    assert measured_epsilon(private, "client").value is None


def test_every_series_can_be_told_apart_without_colour() -> None:
    assert len({marker for _, marker in STYLES.values()}) == len(STYLES)
