"""The axis of epsilon that all panels of a figure share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from eval.plotting import FAINT
from eval.results import Cell, Failure, epsilon_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


class Places:
    """Where each cell stands on the axis of epsilon: log10, and behind a break a place for each kind of run without one."""

    def __init__(self, cells: Sequence[Cell], failures: Sequence[Failure] = ()) -> None:
        shown: list[Cell | Failure] = [*cells, *failures]
        self.epsilons = sorted({c.epsilon for c in shown if c.epsilon is not None})
        low, high = (np.log10(f(self.epsilons)) for f in (min, max)) if self.epsilons else (0.0, 0.0)
        step = max(0.5, 0.22 * (high - low))
        kinds = sorted({c.defense for c in shown if c.epsilon is None}, key=lambda k: (k == "none", k))
        start = high + step if self.epsilons else 0.0
        self.beyond = {kind: float(start + step * i) for i, kind in enumerate(kinds)}
        ends = [*(float(np.log10(e)) for e in self.epsilons), *self.beyond.values()]
        self.limits = (min(ends) - 0.4 * step, max(ends) + 0.4 * step)
        self.gap = float(high + step / 2) if self.epsilons and kinds else None

    def __call__(self, cell: Cell | Failure) -> float:
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
