"""Panels over the axis of epsilon: utility, what attacks got, and what canaries show of epsilon itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from eval.envelope import worst
from eval.places import Places
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
    Measure,
    all_refused,
    by_algorithm,
    counts,
    leakage,
)
from eval.references import baseline_auc, ceiling, gamma, measured_epsilon
from eval.results import Cell, Failure, Spread, algorithm_name
from eval.wording import BRIEF

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CEILING, GAMMA, PROMISED = (
    "most that any attack on these steps can get",
    "γ: most for a photo of the whole run",
    "promised ε",
)


def utility_panel(
    panel: Axes, cells: Sequence[Cell], place: Places, named: bool, failures: Sequence[Failure] = ()
) -> None:
    """named: whether the legend learns the algorithms here, because no panel below does. failures: crosses on the axis."""
    for i, failure in enumerate(failures):
        x, (colour, _) = (
            place(failure) + nudge(place, failure.algorithm, "server"),
            STYLES.get(failure.algorithm, OTHER),
        )
        panel.plot(
            x, 0, marker="x", ms=8, mew=2, color=colour, ls="none", clip_on=False, zorder=5,
            transform=panel.get_xaxis_transform(), label=None if i else "a run failed",
        )  # fmt: skip
    for algorithm, mine in by_algorithm(cells):
        shown = any(leakage(c, m, s).value is not None for c in mine for m in (WORST, *MEASURES) for s in ATTACKED)
        label = algorithm_name(algorithm) if named or not shown else None
        series(panel, mine, place, lambda c: c.utility("auc"), algorithm, label, "server", 1.0)
    for net, label, dashes in (("untrained", UNTRAINED, "--"), ("public-only", PUBLIC, "-.")):
        level = baseline_auc(cells, net)
        if level is not None:
            panel.axhline(level, color=INK, lw=1.2, ls=dashes, label=label)
    panel.axhline(0.5, color=FAINT, lw=1.2, ls=":", label=BASE)
    people = {c.utility("auc").n for c in cells}
    panel.set_ylabel("AUC")
    panel.set_title(f"Utility on people never trained on (n = {counts(people)} people)", loc="left")


def worst_panel(panel: Axes, cells: Sequence[Cell], place: Places, seat: str) -> None:
    """The best attack of one seat in each cell, named beside its point where there is room for names."""
    algorithms = list(by_algorithm(cells))
    sizes: set[int | None] = set()
    for number, (algorithm, mine) in enumerate(algorithms):
        values = [leakage(c, WORST, seat) for c in mine]
        if any(v.value is not None for v in values):
            sizes |= {v.n for v in values}
            label = f"{algorithm_name(algorithm)}, seen by {ATTACKED[seat]}"
            series(panel, mine, place, partial(leakage, measure=WORST, seat=seat), algorithm, label, seat, 100)
            if len(algorithms) <= 2:
                _name(panel, mine, place, seat, algorithm, above=number == 0)
    panel.axhline(0, color=FAINT, lw=1.2, ls=":", label=BASE)
    low, high = panel.get_ylim()
    panel.set_ylim(min(low, -25), max(high, 118))
    panel.set_yticks([0, 25, 50, 75, 100])
    panel.set_ylabel(WORST.axis)
    panel.set_title(f"Best attack of {ATTACKED[seat]} (n = {counts(sizes)} targets)", loc="left")
    _note_refusals(panel, cells, WORST, (seat,))


def _name(panel: Axes, mine: Sequence[Cell], place: Places, seat: str, algorithm: str, above: bool) -> None:
    colour, _ = STYLES.get(algorithm, OTHER)
    for cell in mine:
        best = worst(cell, seat)
        if best is None:
            continue
        at = (place(cell) + nudge(place, algorithm, seat), 100 * best.value)
        panel.annotate(
            BRIEF.get(best.attack, best.attack), at, (-6 if above else 6, 6 if above else -6), textcoords="offset points",
            fontsize=8, color=colour, ha="right" if above else "left", va="bottom" if above else "top", zorder=4,
            bbox={"boxstyle": "square,pad=0.05", "fc": "white", "ec": "none", "alpha": 0.75},
        )  # fmt: skip


def leakage_panel(panel: Axes, cells: Sequence[Cell], measure: Measure, place: Places) -> None:
    sizes: set[int | None] = set()
    for algorithm, mine in by_algorithm(cells):
        for seat, where in ATTACKED.items():
            values = [leakage(c, measure, seat) for c in mine]
            if any(v.value is not None for v in values):
                sizes |= {v.n for v in values}
                label = f"{algorithm_name(algorithm)}, seen by {where}"
                value = partial(leakage, measure=measure, seat=seat)
                series(panel, mine, place, value, algorithm, label, seat, measure.factor)
    chances = [v.chance for c in cells for s in ATTACKED if (v := leakage(c, measure, s)).chance is not None]
    chance = float(np.mean(chances)) if chances else 0.0
    if chances or measure.metric == "psnr_gain":
        panel.axhline(measure.factor * chance, color=FAINT, lw=1.2, ls=":", label=BASE)
    _bounds(panel, cells, measure, place, chance)
    panel.set_ylabel(measure.axis)
    panel.set_title(f"{measure.title} (n = {counts(sizes)})", loc="left")
    _note_refusals(panel, cells, measure, tuple(ATTACKED))


def _bounds(panel: Axes, cells: Sequence[Cell], measure: Measure, place: Places, chance: float) -> None:
    """What the analysis allows at most, where there is any: of the attacked steps, and of a photo in the whole run."""
    of_steps = [(place(c), v) for c in cells if (v := ceiling(c, measure.attack, "server", measure.metric)) is not None]
    of_run = [(place(c), v) for c in cells if of_steps and (v := gamma(c, chance)) is not None]
    for points, marker, label in ((of_steps, 7, CEILING), (of_run, "_", GAMMA)):
        if points:
            xs, ys = zip(*points, strict=True)
            panel.plot(
                xs, [measure.factor * y for y in ys], marker=marker, ms=9, mew=1.6, mfc="white", color=INK, ls="none", label=label
            )  # fmt: skip


def epsilon_panel(panel: Axes, cells: Sequence[Cell], place: Places) -> None:
    """Lower bounds on epsilon from canaries, below what was promised; a caret is what perfect guesses would have shown."""
    promised = sorted((place(c), c.epsilon) for c in cells if c.epsilon is not None)
    if promised:
        xs, ys = zip(*promised, strict=True)
        panel.plot(xs, ys, color=INK, lw=1.2, ls=(0, (5, 2)), marker="_", ms=10, mew=1.6, label=PROMISED)
    sizes: set[int | None] = set()
    for algorithm, mine in by_algorithm(cells):
        for seat, where in ATTACKED.items():
            values = [measured_epsilon(c, seat) for c in mine]
            if any(v.value is not None for v in values):
                sizes |= {v.n for v in values}
                label = f"{algorithm_name(algorithm)}, seen by {where}"
                value = partial(_bound_alone, seat=seat)
                series(panel, mine, place, value, algorithm, label, seat, 1.0)
                for cell, v in zip(mine, values, strict=True):
                    if v.high is not None:
                        x = place(cell) + nudge(place, algorithm, seat)
                        panel.plot(
                            x, v.high, marker=7, ms=7, color=STYLES.get(algorithm, OTHER)[0], mfc="white", ls="none"
                        )
    panel.set_yscale("symlog", linthresh=1.0)
    panel.yaxis.set_major_formatter("{x:g}")
    panel.set_ylim(bottom=-0.1)
    panel.set_ylabel("ε at least")
    panel.set_title(f"What canaries show of ε, below what is promised (n = {counts(sizes)} canaries)", loc="left")


def _bound_alone(cell: Cell, seat: str) -> Spread:
    found = measured_epsilon(cell, seat)
    return Spread(found.value, n=found.n)


def _note_refusals(panel: Axes, cells: Sequence[Cell], measure: Measure, seats: Sequence[str]) -> None:
    nothing = [
        f"{algorithm_name(algorithm)}, {seat}: nothing to attack"
        for algorithm, mine in by_algorithm(cells) for seat in seats if all_refused(mine, measure, seat)
    ]  # fmt: skip
    if nothing:
        panel.set_title("\n".join(nothing), loc="right", fontsize=8.5, style="italic")


def nudge(place: Places, algorithm: str, seat: str) -> float:
    """How far a series stands beside its place, so that points of equal epsilon do not hide each other."""
    width = place.limits[1] - place.limits[0]
    order = list(STYLES).index(algorithm) - 0.5 if algorithm in STYLES else 0
    return (order * 0.012 + 0.005 * (1 if seat == "server" else -1)) * width


def series(
    panel: Axes, mine: Sequence[Cell], place: Places, value: Callable[[Cell], Spread], algorithm: str, label: str | None,
    seat: str, factor: float,
) -> None:  # fmt: skip
    """One line with intervals, and the values of single seeds faintly; filled for the server, open for a client."""
    colour, marker = STYLES.get(algorithm, OTHER)
    points = sorted(((place(c), value(c)) for c in mine if value(c).value is not None), key=lambda p: p[0])
    xs = [x + nudge(place, algorithm, seat) for x, _ in points]
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
