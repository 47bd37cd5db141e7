"""How figures of numbers look, and what they can show: colours, leakage measures, legends, and rendering.

Only matplotlib's objects are used, no global state. Colours are Okabe and Ito's, and every algorithm has a marker of its
own, so that figures can be read in grey; the same results give the same bytes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from eval.envelope import worst
from eval.results import Cell, Spread

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES = {  # algorithm: (colour, marker)
    "fedavg": ("#D55E00", "o"), "fedgc": ("#0072B2", "s"), "fedpe": ("#009E73", "^"), "centralized": ("#555555", "D"),
    "local": ("#CC79A7", "v"), "fedcos": ("#E69F00", "P"), "fedaws": ("#56B4E9", "X"),
}  # fmt: skip
INK, FAINT = "#333333", "#8A8A8A"
RC: Any = {
    "svg.hashsalt": "fedgc-priv", "svg.fonttype": "none", "font.family": ["DejaVu Sans", "sans-serif"], "font.size": 10.5,
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT, "axes.labelcolor": INK,
    "text.color": INK, "xtick.color": INK, "ytick.color": INK, "axes.titlesize": 10.5, "legend.fontsize": 9.5,
    "axes.grid": True, "grid.color": "#E6E6E6", "grid.linewidth": 0.8, "axes.axisbelow": True, "savefig.facecolor": "white",
}  # fmt: skip


OTHER = (INK, "*")
UNTRAINED, PUBLIC, BASE = "untrained net", "public-only net", "chance, or mean face"
REFERENCES = (UNTRAINED, PUBLIC, BASE)


@dataclass(frozen=True)
class Measure:
    """What one leakage panel shows: an attack's metric, its title, the words for its axis, and the factor to its unit."""

    attack: str
    metric: str
    title: str
    axis: str
    factor: float = 1.0


WORST = Measure("*", "advantage", "The best attack", "advantage over\nchance, %", 100)
MEASURES = (
    Measure("identity-linkage", "rank1", "People named from class embeddings", "rank 1, %", 100),
    Measure("correction-probe", "reached", "Strangers read from the correction", "guesses on a\nstranger, %", 100),
    Measure("gradient-inversion", "psnr_gain", "Photos rebuilt from one step", "PSNR above the\nmean face, dB"),
    Measure("label-inference", "label_accuracy", "Labels read from one step", "labels found, %", 100),
    Measure("candidate-match", "rank1", "Photos of one step named among candidates", "rank 1, %", 100),
    Measure("template-inversion", "sar2@fmr=0.01", "Faces rebuilt from class embeddings", "SAR-II, %", 100),
    Measure("membership-inference", "auc", "Membership", "AUC"),
)
ATTACKED = {"server": "the server", "client": "another client"}  # seats with a line of their own


@dataclass(frozen=True)
class Drawn:
    """A figure as bytes, with the text that stands in for it."""

    name: str
    svg: bytes
    png: bytes
    alt: str


def leakage(cell: Cell, measure: Measure, seat: str) -> Spread:
    """What an attack got from a seat; of `WORST`, the advantage of the best attack there."""
    if measure is WORST:
        best = worst(cell, seat)
        return Spread(None) if best is None else Spread(best.value, best.low, best.high, best.n, 0.0)
    return cell.attack(measure.attack, seat, measure.metric)


def has_both(cell: Cell, measure: Measure, seat: str) -> bool:
    return cell.utility("auc").value is not None and leakage(cell, measure, seat).value is not None


def all_refused(mine: Sequence[Cell], measure: Measure, seat: str) -> bool:
    if measure is WORST:
        entries = [e for c in mine for run in c.runs for e in run.entries if e["threat"] == seat]
        return bool(entries) and all(e.get("refused") for e in entries)
    leading = [run.leading(measure.attack, seat) for c in mine for run in c.runs]
    return bool(leading) and all(e is not None and e.get("refused") for e in leading)


def by_algorithm(cells: Sequence[Cell]) -> Iterator[tuple[str, list[Cell]]]:
    for algorithm in dict.fromkeys(c.algorithm for c in cells):
        yield algorithm, [c for c in cells if c.algorithm == algorithm]


def counts(counts: set[int | None]) -> str:
    numbers = sorted(n for n in counts if n is not None)
    return "?" if not numbers else str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]}"


def shared_legend(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels, below them."""
    entries = {label: handle for p in panels for handle, label in zip(*p.get_legend_handles_labels(), strict=True)}
    entries = dict(sorted(entries.items(), key=lambda item: item[0] in REFERENCES))
    widest = max(map(len, entries), default=0)
    columns = len(entries) if len(entries) <= 4 and widest < 30 else 2 if widest > 32 else 3
    figure.legend(
        entries.values(), entries.keys(), loc="outside lower center", ncols=columns, frameon=False, handlelength=2.4
    )


def in_words(cells: Sequence[Cell], measures: Sequence[Measure]) -> str:
    """The values of a figure as text, for whoever cannot see it."""
    lines = []
    for cell in cells:
        parts = [f"AUC {v:.3f}"] if (v := cell.utility("auc").value) is not None else []
        for measure in dict.fromkeys(measures):
            for seat in ATTACKED:
                leak = leakage(cell, measure, seat).value
                if leak is not None:
                    name = f" ({best.attack})" if measure is WORST and (best := worst(cell, seat)) else ""
                    unit = measure.axis.replace("\n", " ").rpartition(", ")[2]
                    parts.append(f"{measure.title.lower()} from the {seat}{name} {measure.factor * leak:.1f} {unit}")
        lines.append(f"{cell.label}: {', '.join(parts) or 'no figure'}")
    return ". ".join(lines) + "."


def rendered(figure: Figure) -> tuple[bytes, bytes]:
    """SVG and PNG without dates, so that the same figure has the same bytes."""
    svg, png = io.BytesIO(), io.BytesIO()
    figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    figure.savefig(png, format="png", dpi=150, metadata={"Software": None})
    return svg.getvalue(), png.getvalue()
