"""Figures of numbers: what epsilon buys, and each attack over epsilon. Pictures of faces are in `eval.figures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.panels import epsilon_panel, leakage_panel, utility_panel, worst_panel
from eval.places import Places
from eval.plotting import ATTACKED, MEASURES, RC, WORST, Drawn, in_words, leakage, rendered, shared_legend
from eval.references import measured_epsilon
from eval.results import Cell, Failure
from eval.tradeoff import leakage_against_utility

if TYPE_CHECKING:
    from matplotlib.axes import Axes

HIGH = 2.15  # inches of a panel


def curves(cells: Sequence[Cell], failures: Sequence[Failure] = ()) -> list[Drawn]:
    """Every figure that the cells support: what epsilon buys, leakage against utility, and each attack over epsilon. Runs that
    failed keep their place on the axis of epsilon."""
    from matplotlib import rc_context

    with rc_context(RC):
        drawn = [privacy_utility(cells, failures), leakage_against_utility(cells), by_attack(cells)]
    return [d for d in drawn if d]


def privacy_utility(cells: Sequence[Cell], failures: Sequence[Failure] = ()) -> Drawn | None:
    """Stacked panels over epsilon: AUC, the best attack of each seat, and what canaries show. None where no cell has an AUC."""
    if all(c.utility("auc").value is None for c in cells):
        return None
    place = Places(cells, failures)
    seats = [s for s in ATTACKED if any(leakage(c, WORST, s).value is not None for c in cells)]
    draw: list[Callable[[Axes], None]] = [lambda p: utility_panel(p, cells, place, not seats, failures)]
    draw += [lambda p, s=seat: worst_panel(p, cells, place, s) for seat in seats]  # type: ignore[misc]
    if any(measured_epsilon(c, s).value is not None for c in cells for s in ATTACKED):
        draw.append(lambda p: epsilon_panel(p, cells, place))
    failed = f"{len(failures)} runs failed and have no value. " if failures else ""
    alt = f"Utility and the best attack of each seat over epsilon. {failed}{in_words(cells, [WORST])}"
    return _stacked("privacy-utility", draw, place, alt)


def by_attack(cells: Sequence[Cell]) -> Drawn | None:
    """One panel an attack, over epsilon. None where no attack has a figure."""
    measures = [m for m in MEASURES if any(leakage(c, m, s).value is not None for c in cells for s in ATTACKED)]
    if not measures:
        return None
    place = Places(cells)
    draw: list[Callable[[Axes], None]] = [
        lambda p, m=measure: leakage_panel(p, cells, m, place)  # type: ignore[misc]
        for measure in measures
    ]
    return _stacked("attacks", draw, place, f"Each attack over epsilon. {in_words(cells, measures)}")


def _stacked(name: str, draw: Sequence[Callable[[Axes], None]], place: Places, alt: str) -> Drawn:
    """Panels one below the other over one axis of epsilon: never two scales in one panel."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.6, HIGH * len(draw) + 1.0), layout="constrained")
    panels = np.atleast_1d(figure.subplots(len(draw), 1, sharex=True))
    for panel, paint in zip(panels, draw, strict=True):
        paint(panel)
    place.dress(list(panels))
    shared_legend(figure, panels)
    return Drawn(name, *rendered(figure), alt)
