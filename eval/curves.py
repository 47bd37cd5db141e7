"""Figures of numbers: utility and leakage over epsilon, and leakage against utility. Pictures of faces are in `eval.figures`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from eval.plotting import (
    ATTACKED,
    BASE,
    FAINT,
    INK,
    MEASURES,
    OTHER,
    RC,
    STYLES,
    UNTRAINED,
    Drawn,
    Measure,
    all_refused,
    by_algorithm,
    counts,
    has_both,
    in_words,
    leakage,
    rendered,
    shared_legend,
)
from eval.results import Cell, Spread, algorithm_name, epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes

POINTS = 0.72  # points of a pixel, at the 100 pixels an inch that figures are laid out in
AROUND = [(dx, dy) for dy in (11, -11, 24, -24, 38, -38, 52, -52, 66, -66) for dx in (8, -8)]  # pixels, nearest first


def curves(cells: Sequence[Cell]) -> list[Drawn]:
    """Every figure that the cells support: the curve over epsilon, and leakage against utility."""
    from matplotlib import rc_context

    with rc_context(RC):
        drawn = [privacy_utility(cells), leakage_against_utility(cells)]
    return [d for d in drawn if d]


def privacy_utility(cells: Sequence[Cell]) -> Drawn | None:
    """Stacked panels over epsilon: AUC above, one panel a leakage measure below. None where no cell has an AUC."""
    from matplotlib.figure import Figure

    if all(c.utility("auc").value is None for c in cells):
        return None
    measures = [m for m in MEASURES if any(leakage(c, m, s).value is not None for c in cells for s in ATTACKED)]
    figure = Figure(figsize=(7.6, 2.15 * (1 + len(measures)) + 1.0), layout="constrained")
    panels = np.atleast_1d(figure.subplots(1 + len(measures), 1, sharex=True))
    place = Places(cells)
    _utility_panel(panels[0], cells, place, named=not measures)
    for panel, measure in zip(panels[1:], measures, strict=True):
        _leakage_panel(panel, cells, measure, place)
    place.dress(list(panels))
    shared_legend(figure, panels)
    alt = f"Utility and leakage over epsilon. {in_words(cells, measures)}"
    return Drawn("privacy-utility", *rendered(figure), alt)


class Places:
    """Where each cell stands on the axis of epsilon: log10, and behind a break a place for each kind of run without one."""

    def __init__(self, cells: Sequence[Cell]) -> None:
        self.epsilons = sorted({c.epsilon for c in cells if c.epsilon is not None})
        low, high = (np.log10(f(self.epsilons)) for f in (min, max)) if self.epsilons else (0.0, 0.0)
        step = max(0.5, 0.22 * (high - low))
        kinds = sorted({c.defense for c in cells if c.epsilon is None}, key=lambda k: (k == "none", k))
        start = high + step if self.epsilons else 0.0
        self.beyond = {kind: float(start + step * i) for i, kind in enumerate(kinds)}
        ends = [*(float(np.log10(e)) for e in self.epsilons), *self.beyond.values()]
        self.limits = (min(ends) - 0.4 * step, max(ends) + 0.4 * step)
        self.gap = float(high + step / 2) if self.epsilons and kinds else None

    def __call__(self, cell: Cell) -> float:
        return float(np.log10(cell.epsilon)) if cell.epsilon is not None else self.beyond[cell.defense]

    def dress(self, panels: Sequence[Axes]) -> None:
        """Ticks, the break, and the label below the last panel."""
        ticks: list[float] = []
        names: list[str] = []
        for epsilon in reversed(self.epsilons):
            x = float(np.log10(epsilon))
            if all(abs(x - other) > 0.06 * (self.limits[1] - self.limits[0]) for other in ticks):
                ticks.append(x)
                names.append(epsilon_text(epsilon))
        ticks += self.beyond.values()
        names += ["no DP" if kind == "none" else f"{kind},\nno ε" for kind in self.beyond]
        for panel in panels:
            panel.set_xlim(self.limits)
            panel.set_xticks(ticks, names)
            panel.grid(False, axis="x")
            if self.gap is not None:
                panel.axvspan(self.gap - 0.02, self.gap + 0.02, color="white", zorder=0.5)
                for offset in (-0.02, 0.02):
                    panel.axvline(self.gap + offset, color="#CCCCCC", lw=0.8, ls=(0, (1, 2)), zorder=0.6)
                    panel.plot(
                        self.gap + offset, 0, marker=[(-1, -1), (1, 1)], ms=8, color=FAINT, clip_on=False,
                        transform=panel.get_xaxis_transform(),
                    )  # fmt: skip
        panels[-1].set_xlabel("ε of the whole run (log scale; further right is less protection)")


def _utility_panel(panel: Axes, cells: Sequence[Cell], place: Places, named: bool) -> None:
    """named: whether the legend learns the algorithms here, because no panel below does."""
    for algorithm, mine in by_algorithm(cells):
        shown = any(leakage(c, m, s).value is not None for c in mine for m in MEASURES for s in ATTACKED)
        label = algorithm_name(algorithm) if named or not shown else None
        _series(panel, mine, place, lambda c: c.utility("auc"), algorithm, label, "server", 1.0)
    untrained = [v for c in cells if (v := c.utility("auc", "untrained").value) is not None]
    if untrained:
        panel.axhline(float(np.mean(untrained)), color=INK, lw=1.2, ls="--", label=UNTRAINED)
    panel.axhline(0.5, color=FAINT, lw=1.2, ls=":", label=BASE)
    people = {c.utility("auc").n for c in cells}
    panel.set_ylabel("AUC")
    panel.set_title(f"Utility on people never trained on (n = {counts(people)} people)", loc="left")


def _leakage_panel(panel: Axes, cells: Sequence[Cell], measure: Measure, place: Places) -> None:
    sizes: set[int | None] = set()
    nothing = []
    for algorithm, mine in by_algorithm(cells):
        for seat, where in ATTACKED.items():
            values = [leakage(c, measure, seat) for c in mine]
            if any(v.value is not None for v in values):
                sizes |= {v.n for v in values}
                label = f"{algorithm_name(algorithm)}, seen by {where}"
                _series(
                    panel,
                    mine,
                    place,
                    partial(leakage, measure=measure, seat=seat),
                    algorithm,
                    label,
                    seat,
                    measure.factor,
                )
            elif all_refused(mine, measure, seat):
                nothing.append(f"{algorithm_name(algorithm)}, {seat}: nothing to attack")
    chances = [v.chance for c in cells for s in ATTACKED if (v := leakage(c, measure, s)).chance is not None]
    if measure.metric == "psnr_gain":
        panel.axhline(0, color=FAINT, lw=1.2, ls=":", label=BASE)
    elif chances:
        panel.axhline(measure.factor * float(np.mean(chances)), color=FAINT, lw=1.2, ls=":", label=BASE)
    panel.set_ylabel(measure.axis)
    panel.set_title(f"{measure.title} (n = {counts(sizes)})", loc="left")
    if nothing:
        panel.set_title("\n".join(nothing), loc="right", fontsize=8.5, style="italic")


def _series(
    panel: Axes, mine: Sequence[Cell], place: Places, value: Callable[[Cell], Spread], algorithm: str, label: str | None,
    seat: str, factor: float,
) -> None:  # fmt: skip
    """One line with intervals, and the values of single seeds faintly; filled for the server, open for a client."""
    colour, marker = STYLES.get(algorithm, OTHER)
    points = sorted(((place(c), value(c)) for c in mine if value(c).value is not None), key=lambda p: p[0])
    nudge = (
        (list(STYLES).index(algorithm) - 0.5 if algorithm in STYLES else 0)
        * 0.012
        * (place.limits[1] - place.limits[0])
    )
    nudge += 0.005 * (place.limits[1] - place.limits[0]) * (1 if seat == "server" else -1)
    xs = [x + nudge for x, _ in points]
    ys = [factor * float(v.value or 0.0) for _, v in points]
    face = colour if seat == "server" else "white"
    line = "-" if seat == "server" else "--"
    for i in range(len(xs) - 1):
        across = place.gap is not None and xs[i] < place.gap < xs[i + 1]
        panel.plot(xs[i : i + 2], ys[i : i + 2], color=colour, lw=1.0 if across else 1.6, ls=":" if across else line)
    panel.plot(xs, ys, ls="none", marker=marker, ms=6.5, mfc=face, mec=colour, mew=1.4, zorder=3)
    panel.plot([], [], color=colour, ls=line, lw=1.6, marker=marker, ms=6.5, mfc=face, mec=colour, mew=1.4, label=label)
    for x, (_, v) in zip(xs, points, strict=True):
        if v.low is not None and v.high is not None:
            panel.plot([x, x], [factor * v.low, factor * v.high], color=colour, lw=1.2, alpha=0.75, zorder=2)
        if len(v.seeds) > 1:
            panel.plot(
                [x] * len(v.seeds), [factor * s for s in v.seeds], marker, ls="none", ms=4, color=colour, alpha=0.3
            )


def leakage_against_utility(cells: Sequence[Cell]) -> Drawn | None:
    """One panel a leakage measure and seat, one point a cell: leakage to the right, utility up. None without a point."""
    from matplotlib.figure import Figure

    pairs = [(m, s) for m in MEASURES for s in ATTACKED if any(has_both(c, m, s) for c in cells)][:4]
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


Named = tuple[str, tuple[float, float], str]  # text, place in data units, colour


def _scatter(panel: Axes, cells: Sequence[Cell], measure: Measure, seat: str) -> list[Named]:
    """Points and crosses; returns what is to be written beside each."""
    named: list[Named] = []
    for algorithm, mine in by_algorithm(cells):
        colour, marker = STYLES.get(algorithm, OTHER)
        for rank, cell in enumerate(c for c in mine if has_both(c, measure, seat)):
            x, y = leakage(cell, measure, seat), cell.utility("auc")
            at = (measure.factor * float(x.value or 0), float(y.value or 0))
            if x.low is not None and x.high is not None:
                panel.plot(
                    [measure.factor * x.low, measure.factor * x.high], [at[1]] * 2, color=colour, lw=1, alpha=0.45
                )
            if y.low is not None and y.high is not None:
                panel.plot([at[0]] * 2, [y.low, y.high], color=colour, lw=1, alpha=0.45)
            label = algorithm_name(algorithm) if rank == 0 else None
            panel.plot(*at, marker, ms=7.5, mfc=colour, mec="white", mew=0.8, ls="none", zorder=3, label=label)
            kind = "no DP" if cell.defense == "none" else cell.defense
            named.append((epsilon_text(cell.epsilon) if cell.epsilon is not None else kind, at, colour))
    untrained = [v for c in cells if (v := c.utility("auc", "untrained").value) is not None]
    if untrained:
        panel.axhline(float(np.mean(untrained)), color=INK, lw=1.2, ls="--", label=UNTRAINED)
    chances = [chance for c in cells if (chance := leakage(c, measure, seat).chance) is not None]
    if chances:
        panel.axvline(measure.factor * float(np.mean(chances)), color=FAINT, lw=1.2, ls=":", label=BASE)
    nothing = [algorithm_name(a) for a, mine in by_algorithm(cells) if all_refused(mine, measure, seat)]
    panel.set_title(f"{measure.title},\nseen by {ATTACKED[seat]}", loc="left")
    if nothing:
        panel.text(
            0.98, 0.03, f"{', '.join(nothing)}: nothing to attack", transform=panel.transAxes, ha="right", fontsize=9,
            style="italic",
        )  # fmt: skip
    panel.set_xlabel(measure.axis.replace("\n", " "))
    return named


def _name_points(panel: Axes, names: Sequence[Named]) -> None:
    """Write each name at the first place near its point that no point and no other name covers."""
    dots = [panel.transData.transform(at) for _, at, _ in names]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in dots]
    for (text, at, colour), (x, y) in zip(names, dots, strict=True):
        wide, high = 8.0 * len(text), 13.0
        for dx, dy in AROUND:
            left, below = x + dx - (wide if dx < 0 else 0), y + dy - high / 2
            spot = (left, below, left + wide, below + high)
            if not any(spot[0] < t[2] and t[0] < spot[2] and spot[1] < t[3] and t[1] < spot[3] for t in taken):
                break
        taken.append(spot)
        lead = {"arrowstyle": "-", "color": colour, "lw": 0.6, "shrinkB": 3} if abs(dy) > 20 else None
        panel.annotate(
            text, at, (dx * POINTS, dy * POINTS), textcoords="offset points", fontsize=9.5, color=colour, weight="bold",
            ha="left" if dx > 0 else "right", va="center", arrowprops=lead, zorder=4,
        )  # fmt: skip
