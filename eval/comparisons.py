"""Which cells of a report are compared with which, and the tables of their paired differences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eval.paired import Difference, attack_difference, utility_difference
from eval.results import METRICS, Cell, flatten
from eval.wording import difference, interval

SEATS = ("server", "client")
UTILITY = ("auc", "tar@far=0.1")
OF_DEFENSE, OF_ALGORITHM = ("defense.",), ("federation.algorithm", "correction.")
SEED = 0  # of the draws behind the intervals: the same runs give the same page


def undefended(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """The cell that differs from this one in having no defense, and in nothing else."""
    return _twin(cell, [c for c in cells if c.defense == "none"], OF_DEFENSE) if cell.defense != "none" else None


def averaged(cell: Cell, cells: Sequence[Cell]) -> Cell | None:
    """FedAvg under the same settings, of a FedGC cell."""
    fedavg = [c for c in cells if c.algorithm == "fedavg"]
    return _twin(cell, fedavg, OF_ALGORITHM) if cell.algorithm == "fedgc" else None


def _twin(cell: Cell, others: Sequence[Cell], apart: tuple[str, ...]) -> Cell | None:
    own = _settings(cell, apart)
    return next((c for c in others if c is not cell and _settings(c, apart) == own), None)


def _settings(cell: Cell, apart: tuple[str, ...]) -> dict[str, Any]:
    return {k: v for k, v in flatten(cell.first.config).items() if k != "seed" and not k.startswith(apart)}


def comparisons(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Tables of differences: what a defense changed, and what FedGC changed. Columns are cells, rows what was measured."""
    tables = []
    for title, words, partner, name in (
        (
            "What a defense changed",
            "Each run less the run that differs from it in having no defense, and in nothing else.",
            undefended,
            lambda cell: cell.label,
        ),
        (
            "What FedGC changed",
            "FedGC less FedAvg, under the same settings.",
            averaged,
            lambda cell: cell.label.partition(", ")[2],
        ),
    ):
        pairs = [(cell, other) for cell in cells if (other := partner(cell, cells)) is not None]
        if pairs:
            columns = [name(cell) for cell, _ in pairs]
            rows = _rows(pairs)
            count = sum(bool(cell["interval"]) for row in rows for cell in row["cells"])
            tables.append({"title": title, "words": words, "columns": columns, "rows": rows, "count": count})
    return [table for table in tables if table["rows"]]


def _rows(pairs: Sequence[tuple[Cell, Cell]]) -> list[dict[str, Any]]:
    rng = np.random.default_rng(SEED)
    rows = []
    for metric in UTILITY:
        found: list[Difference | None] = [utility_difference(a, b, metric, rng=rng) for a, b in pairs]
        if any(d is not None and d.measured.value is not None for d in found):
            rows.append({"what": METRICS[metric][0], "who": "utility", "cells": [_cell(d) for d in found]})
    names = dict.fromkeys(e["attack"] for pair in pairs for c in pair for e in c.first.entries)
    for seat in SEATS:
        for attack in names:
            found = [attack_difference(a, b, attack, seat, rng=rng) for a, b in pairs]
            if any(d is not None and d.measured.value is not None for d in found):
                [metric, *_] = [d.metric for d in found if d is not None]
                what = f"{attack}: {METRICS.get(metric, (metric, ''))[0]}"
                rows.append({"what": what, "who": seat, "cells": [_cell(d) for d in found]})
    return rows


def _cell(d: Difference | None) -> dict[str, Any]:
    if d is None or d.measured.value is None:
        return {"text": "", "interval": "", "notes": [], "strong": False}
    unit = METRICS[d.metric][1] if d.metric in METRICS else ""
    notes = [f"n = {d.measured.n}"]
    if d.seeds:
        notes.append("seeds " + ", ".join(difference(s, unit) for s in d.seeds))
    return {
        "text": difference(d.measured.value, unit), "interval": interval(d.measured.to_json(), unit), "notes": notes,
        "strong": d.told,
    }  # fmt: skip
