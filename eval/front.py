"""The front of the report: the verdict in three sentences, who gets what, and one line a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.comparisons import SEED, undefended
from eval.empirical import alarms
from eval.envelope import matrix, worst_text
from eval.narrative import verdict
from eval.paired import utility_difference
from eval.results import SEATS, Cell, algorithm_name, promise_text
from eval.sections import seeds_apart, shown
from eval.wording import WHO, difference, interval, number

LABELS = ("To another client", "To the server", "What ε buys")
BEST_OF = ("server", "client")


def labelled(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """The sentences of the verdict, each under what it is about."""
    said = verdict(cells)
    false = len(alarms(cells))
    labels = ["Broken promise"] * false + (list(LABELS) if len(said) - false == len(LABELS) else ["Leakage", LABELS[2]])
    return list(zip(labels, said, strict=True))


def front(cells: Sequence[Cell]) -> dict[str, Any]:
    """What the template prints before all sections."""
    seats = [
        s for s in SEATS if s in BEST_OF and any(e["threat"] == s for c in cells for r in c.runs for e in r.entries)
    ]
    rows = [_row(cell, cells, seats) for cell in cells]
    return {
        "verdict": labelled(cells), "matrix": matrix(cells), "rows": rows, "seats": [WHO[s] for s in seats],
        "changes": any(row["change"] for row in rows), "promises": any(c.epsilon is not None for c in cells),
    }  # fmt: skip


def _row(cell: Cell, cells: Sequence[Cell], seats: Sequence[str]) -> dict[str, Any]:
    trained, untrained = cell.utility("auc"), cell.utility("auc", "untrained")
    above = untrained.value is not None and trained.low is not None and trained.low > untrained.value
    auc = {**shown(trained.json(), "auc"), "strong": above}
    auc["notes"] += seeds_apart(cell, "auc")
    return {
        "algorithm": algorithm_name(cell.algorithm), "defense": cell.defense, "seeds": len(cell.runs),
        "epsilon": promise_text(cell), "auc": auc,
        "untrained": None if untrained.value is None else number(untrained.value, ""),
        "tar": {**shown(cell.utility("tar@far=0.1").json(), "tar@far=0.1"), "strong": False},
        "change": _change(cell, cells), "worst": [worst_text(cell, seat) for seat in seats],
    }  # fmt: skip


def _change(cell: Cell, cells: Sequence[Cell]) -> dict[str, Any] | None:
    """What the defense cost in AUC, on the same draws of people."""
    other = undefended(cell, cells)
    if other is None:
        return None
    found = utility_difference(cell, other, "auc", rng=np.random.default_rng(SEED))
    if found.measured.value is None:
        return None
    return {
        "text": difference(found.measured.value, ""), "interval": interval(found.measured.to_json(), ""), "notes": [],
        "strong": found.told,
    }  # fmt: skip
