"""What was measured of epsilon beside what was promised: lower bounds from canaries, for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from eval.results import Cell, Entry, Value, epsilon_text, promise_text

METRIC = "epsilon_lower_bound"
COLUMNS = ("Run", "Seat", "ε promised", "ε at least", "If all guesses were right", "At δ", "Guesses right", "Canaries")
MEANING = (
    "An ε that is promised is an upper bound, from a proof; what canaries show is a lower bound, each with 95 % confidence. A "
    "small one means a weak attack or good privacy, and cannot tell which. With so many canaries and this δ no attack could "
    "show more than if all its guesses were right."
)


def empirical(cells: Sequence[Cell]) -> dict[str, Any]:
    """Rows of `COLUMNS` for every run and seat whose canaries were attacked, why rows are not compared, and what is false."""
    rows: list[dict[str, Any]] = []
    notes: dict[str, None] = {}
    for cell, seed, entry, value in _found(cells):
        claim: Mapping[str, Any] = value.get("claim") or {}
        promised = claim.get("value")
        if promised is None and cell.epsilon is not None:
            notes[str(claim.get("why"))] = None
        text = "not compared" if promised is None and cell.epsilon is not None else promise_text(cell, promised)
        at_most = "" if value.get("ceiling") is None else f"{value['ceiling']:.2f}"
        right = f"{value.get('right')} of {value.get('guesses')}"
        words = [text, f"{value['value']:.2f}", at_most, f"{value.get('delta'):g}", right, str(value.get("n"))]
        label = cell.label + (f", seed {seed}" if len(cell.runs) > 1 else "")
        rows.append({"label": label, "cells": [entry["threat"], *words], "false": broken(value)})
    return {"columns": COLUMNS, "rows": rows, "meaning": MEANING, "notes": list(notes), "alarms": alarms(cells)}


def alarms(cells: Sequence[Cell]) -> list[str]:
    """A sentence for each promise that canaries prove false."""
    return [
        f"The promise of {cell.label} is false: canaries show that ε is at least {value['value']:.2f} at δ = {value['delta']:g}, "
        "with 95 % confidence, and "
        f"{epsilon_text(value['claim']['value'])} was promised. Rely neither on this run nor on its accounting."
        for cell, _, _, value in _found(cells)
        if broken(value)
    ]


def broken(value: Value) -> bool:
    """Whether the bound exceeds the epsilon that was promised at the same delta."""
    promised = (value.get("claim") or {}).get("value")
    return promised is not None and value["value"] > promised


def statement(cell: Cell) -> dict[str, str]:
    """The terms that stand beside a promised epsilon, of the seat that shows most; empty where no canary was attacked."""
    found = [(entry, value) for _, _, entry, value in _found([cell])]
    if not found:
        return {}
    entry, value = max(found, key=lambda pair: pair[1]["value"])
    most = f"; {value['ceiling']:.2f} if every guess were right" if value.get("ceiling") is not None else ""
    return {"ε measured, at least": f"{value['value']:.2f} ({value['n']} canaries, {entry['threat']}{most})"}


def _found(cells: Sequence[Cell]) -> list[tuple[Cell, int, Entry, Value]]:
    return [
        (cell, run.seed, entry, value)
        for cell in cells
        for run in cell.runs
        for entry in run.entries
        if (value := entry["metrics"].get(METRIC)) and value.get("value") is not None and "claim" in value
    ]
