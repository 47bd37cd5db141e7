"""`--fail-if`: one comparison over the results of a report, so that a pipeline can stop on it."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from eval.results import METRICS, Entry
from fedgc.errors import UsageError

UTILITY = "utility"
FORM = "ATTACK@SEAT.METRIC > NUMBER or utility.METRIC < NUMBER, with >, >=, < or <="
_COMPARE: dict[str, Callable[[float, float], bool]] = {
    ">": operator.gt, ">=": operator.ge, "<": operator.lt, "<=": operator.le,
}  # fmt: skip
_PATTERN = re.compile(
    r"\s*(?P<attack>[a-z0-9-]+)(?:@(?P<threat>[a-z0-9-]+))?\.(?P<metric>[a-z0-9_@=.]+?)\s*(?P<op>[<>]=?)\s*(?P<limit>\S+)\s*"
)


@dataclass(frozen=True)
class Gate:
    """A parsed expression."""

    attack: str
    threat: str | None
    metric: str
    compare: str
    limit: float

    @property
    def source(self) -> str:
        return f"{self.attack}@{self.threat}" if self.threat else self.attack

    def trips(self, value: float) -> bool:
        return _COMPARE[self.compare](value, self.limit)


def parse(expression: str) -> Gate:
    """Raises UsageError, with the form, for anything but one comparison."""
    found = _PATTERN.fullmatch(expression)
    if not found:
        raise UsageError(f"--fail-if {expression!r} is not a comparison: write {FORM}")
    attack, threat, metric, compare, limit = found.group("attack", "threat", "metric", "op", "limit")
    if (attack == UTILITY) == (threat is not None):
        raise UsageError(f"--fail-if {expression!r}: an attack needs its seat and utility has none; write {FORM}")
    try:
        number = float(limit)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"--fail-if {expression!r}: {limit!r} is not a number; write {FORM}")
    return Gate(attack, threat, metric, compare, number)


def failing(expression: str, entries: Sequence[Entry]) -> list[str]:
    """One line for each entry that makes the expression true, and, if any does, one for each that could not be judged.

    entries: `eval.rows.gate_entries`, or entries of ``attack --json`` and documents of ``train --json``. Empty where
    the gate holds: what was refused or has no value does not trip it (see `unjudged`). Raises UsageError for an expression
    that is no comparison, or that names an attack, seat or metric which no entry has.
    """
    gate = parse(expression)
    tripped = []
    for entry in _matching(gate, expression, entries):
        measured = entry["metrics"].get(gate.metric) or {}
        value = measured.get("value")
        if value is None or not gate.trips(value):
            continue
        low, high = measured.get("low"), measured.get("high")
        interval = f" [{low:.4g}, {high:.4g}]" if low is not None and high is not None else ""
        tripped.append(
            f"{_where(entry)}: {gate.source}.{gate.metric} = {value:.4g}{interval} {gate.compare} {gate.limit:g}"
        )
    return tripped + unjudged(expression, entries) if tripped else []


def unjudged(expression: str, entries: Sequence[Entry]) -> list[str]:
    """One line, with the reason, for each entry that the expression names and that was refused or has no value."""
    gate = parse(expression)
    lines = []
    for entry in _matching(gate, expression, entries):
        measured = entry["metrics"].get(gate.metric) or {}
        if measured.get("value") is None:
            why = entry.get("refused") or measured.get("why") or f"{gate.metric} was not measured"
            lines.append(f"{_where(entry)}: not judged, {gate.source}.{gate.metric}: {why}")
    return lines


def _matching(gate: Gate, expression: str, entries: Sequence[Entry]) -> list[Entry]:
    entries = [_plain(entry) for entry in entries]
    found = [e for e in entries if (e["attack"], e.get("threat")) == (gate.attack, gate.threat)]
    if not found:
        known = sorted({f"{e['attack']}@{e['threat']}" if e.get("threat") else e["attack"] for e in entries})
        raise UsageError(
            f"--fail-if {expression!r}: no run has {gate.source!r}; there are {', '.join(known) or 'no results at all'}"
        )
    metrics = sorted({name for e in found for name in e["metrics"]})
    if gate.metric not in metrics and (metrics or gate.metric not in METRICS):
        known = metrics or sorted(METRICS)
        raise UsageError(f"--fail-if {expression!r}: {gate.source} has no {gate.metric!r}; it has {', '.join(known)}")
    return found


def _plain(entry: Entry) -> Entry:
    """An entry as an attack has it; what ``train --json`` prints becomes one named "utility"."""
    if "attack" in entry:
        return entry
    measured = {name: value for name, value in entry.get("utility", {}).items() if isinstance(value, dict)}
    return {"attack": UTILITY, "run": entry.get("run"), "metrics": measured}


def _where(entry: Entry) -> str:
    batch, steps = entry.get("batch_size"), entry.get("local_steps")
    size = f"batch of {batch}" + (f", {steps} steps" if steps else "")
    return f"{entry.get('run', 'run')}" + (f" ({size})" if batch else "")
