"""Leakage against utility: one point a configuration, crosses, and the front of those that no other beats in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.plotting import (
    ATTACKED,
    BASE,
    FAINT,
    INK,
    MEASURES,
    OTHER,
    PUBLIC,
    STYLES,
    UNTRAINED,
    WORST,
    Drawn,
    Measure,
    all_refused,
    by_algorithm,
    has_both,
    in_words,
    leakage,
    rendered,
    shared_legend,
)
from eval.references import baseline_auc
from eval.results import Cell, algorithm_name, epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 0.72  # points of a pixel, at the 100 pixels an inch that figures are laid out in
AROUND = [(dx, dy) for dy in (11, -11, 24, -24, 38, -38, 52, -52, 66, -66) for dx in (8, -8)]  # pixels, nearest first
PANELS = 4
FRONT = "Pareto front"

Named = tuple[str, tuple[float, float], str]  # text, place in data units, colour


def leakage_against_utility(cells: Sequence[Cell]) -> Drawn | None:
    """One panel a leakage measure and seat, one point a cell: leakage to the right, utility up. None without a point."""
    from matplotlib.figure import Figure

    pairs = [(m, s) for m in (WORST, *MEASURES) for s in ATTACKED if any(has_both(c, m, s) for c in cells)][:PANELS]
    if not pairs:
        return None
    rows, columns = (len(pairs) + 1) // 2, min(2, len(pairs))
    figure = Figure(figsize=(4.1 * columns + (1.5 if columns == 1 else 0), 3.5 * rows + 0.5), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    named = [_scatter(panel, cells, *pair) for panel, pair in zip(panels, pairs, strict=False)]
    for panel in panels[len(pairs) :]:
        panel.set_visible(False)
    for panel in panels[::columns]:
        panel.set_ylabel("AUC (further up is more useful)")
    shared_legend(figure, panels)
    figure.draw_without_rendering()  # places are final now, so that names can keep clear of each other
    for panel, names in zip(panels, named, strict=False):
        _name_points(panel, names)
    alt = f"Leakage against utility. {in_words(cells, [m for m, _ in pairs])}"
    return Drawn("leakage-utility", *rendered(figure), alt)


def pareto(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (leakage, utility) those that no other beats or equals in both, from the least leakage to the most."""
    front: list[tuple[float, float]] = []
    for x, y in sorted(set(points), key=lambda p: (p[0], -p[1])):
        if not front or y > front[-1][1]:
            front.append((x, y))
    return front


def _scatter(panel: Axes, cells: Sequence[Cell], measure: Measure, seat: str) -> list[Named]:
    """Points and crosses; returns what is to be written beside each."""
    named: list[Named] = []
    for algorithm, mine in by_algorithm(cells):
        for rank, cell in enumerate(c for c in mine if has_both(c, measure, seat)):
            named.append(_point(panel, cell, measure, seat, algorithm_name(algorithm) if rank == 0 else None))
    front = pareto([at for _, at, _ in named])
    if len(front) > 1:
        xs, ys = zip(*front, strict=True)
        panel.step(xs, ys, where="post", color=FAINT, lw=1.2, zorder=1, label=FRONT)
    for net, label, dashes in (("untrained", UNTRAINED, "--"), ("public-only", PUBLIC, "-.")):
        level = baseline_auc(cells, net)
        if level is not None:
            panel.axhline(level, color=INK, lw=1.2, ls=dashes, label=label)
    chances = [chance for c in cells if (chance := leakage(c, measure, seat).chance) is not None]
    if chances:
        panel.axvline(measure.factor * float(np.mean(chances)), color=FAINT, lw=1.2, ls=":", label=BASE)
    nothing = [algorithm_name(a) for a, mine in by_algorithm(cells) if all_refused(mine, measure, seat)]
    panel.set_title(f"{measure.title},\nfrom the seat of {ATTACKED[seat]}", loc="left")
    if nothing:
        panel.text(
            0.98, 0.03, f"{', '.join(nothing)}: nothing to attack", transform=panel.transAxes, ha="right", fontsize=9,
            style="italic",
        )  # fmt: skip
    panel.margins(x=0.16)  # room for names
    panel.set_xlabel(measure.axis.replace("\n", " "))
    return named


def _point(panel: Axes, cell: Cell, measure: Measure, seat: str, label: str | None) -> Named:
    colour, marker = STYLES.get(cell.algorithm, OTHER)
    x, y = leakage(cell, measure, seat), cell.utility("auc")
    at = (measure.factor * float(x.value or 0), float(y.value or 0))
    if x.low is not None and x.high is not None:
        panel.plot([measure.factor * x.low, measure.factor * x.high], [at[1]] * 2, color=colour, lw=1, alpha=0.45)
    if y.low is not None and y.high is not None:
        panel.plot([at[0]] * 2, [y.low, y.high], color=colour, lw=1, alpha=0.45)
    if len(x.seeds) == len(y.seeds) > 1:
        panel.plot([measure.factor * s for s in x.seeds], y.seeds, marker, ls="none", ms=4, color=colour, alpha=0.3)
    panel.plot(*at, marker, ms=7.5, mfc=colour, mec="white", mew=0.8, ls="none", zorder=3, label=label)
    kind = "no DP" if cell.defense == "none" else cell.defense
    return epsilon_text(cell.epsilon) if cell.epsilon is not None else kind, at, colour


def _name_points(panel: Axes, names: Sequence[Named]) -> None:
    """Write each name at the first place near its point that lies in the panel and that no point and no other name covers."""
    edge = panel.get_window_extent()
    dots = [panel.transData.transform(at) for _, at, _ in names]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for (text, at, colour), (x, y) in zip(names, dots, strict=True):
        wide, high = 8.0 * len(text), 13.0
        for dx, dy in AROUND:
            left, below = x + dx - (wide if dx < 0 else 0), y + dy - high / 2
            spot = (left, below, left + wide, below + high)
            if left < edge.x0 or left + wide > edge.x1:
                continue
            if not any(spot[0] < t[2] and t[0] < spot[2] and spot[1] < t[3] and t[1] < spot[3] for t in taken):
                break
        taken.append(spot)
        lead = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkB": 3} if abs(dy) > 20 else None
        panel.annotate(
            text, at, (dx * POINTS, dy * POINTS), textcoords="offset points", fontsize=9.5, color=colour, weight="bold",
            ha="left" if dx > 0 else "right", va="center", arrowprops=lead, zorder=4,
        )  # fmt: skip
