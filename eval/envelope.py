"""How much the best attack of each seat gets: a defense is as good as its worst attack.

Success rates and AUCs are put on one scale, the advantage over chance: (value - chance) / (1 - chance), which is 2 AUC - 1 for an
AUC. 0 is a guess, 1 always right. Decibels and cosines have no such scale and stay out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.claims import absence
from eval.results import SEATS, Cell, Spread, algorithm_name, beats_chance, defense_text, headline_metric
from eval.wording import HARMS, WHO, interval, number, unit_of

SCALED = ("sar1@fmr=0.01", "rank1", "sar2@fmr=0.01", "reached", "label_accuracy", "tpr@fpr=0.01", "auc")


@dataclass(frozen=True)
class Worst:
    """The attack from a seat that shows the most: value as advantage over chance, and the figure it is made from."""

    attack: str
    metric: str
    figure: Spread
    value: float
    low: float | None
    high: float | None
    tried: int
    clear: int  # attacks whose whole interval lies above chance

    @property
    def n(self) -> int | None:
        return self.figure.n

    @property
    def told(self) -> bool:
        return self.low is not None and self.low > 0


def advantage(value: float | None, chance: float | None) -> float | None:
    """(value - chance) / (1 - chance); None where there is no value, or nothing above chance."""
    if value is None or chance is None or chance >= 1:
        return None
    return (value - chance) / (1 - chance)


def worst(cell: Cell, seat: str) -> Worst | None:
    """Of all attacks from a seat that with the highest lower end, so that many targets count and luck on few does not.

    It is the best of ``tried``, and its interval is its own: a little kind to the attacker.
    """
    found = [w for attack in _attacks(cell, seat) if (w := _scaled(cell, attack, seat)) is not None]
    if not found:
        return None
    best = max(found, key=lambda w: (w[3] if w[3] is not None else -1.0, w[2] or 0.0))
    clear = sum(low is not None and low > 0 for _, _, _, low, _, _ in found)
    attack, metric, value, low, high, figure = best
    return Worst(attack, metric, figure, value, low, high, len(found), clear)


def _attacks(cell: Cell, seat: str) -> list[str]:
    return list(dict.fromkeys(e["attack"] for r in cell.runs for e in r.entries if e["threat"] == seat))


def _scaled(cell: Cell, attack: str, seat: str) -> tuple[str, str, float, float | None, float | None, Spread] | None:
    for metric in (m for m in SCALED if m != "label_accuracy" or attack == "label-inference"):
        figure = cell.attack(attack, seat, metric)
        value = advantage(figure.value, figure.chance)
        if value is not None:
            ends = (advantage(figure.low, figure.chance), advantage(figure.high, figure.chance))
            return attack, metric, value, *ends, figure
    return None


def worst_text(cell: Cell, seat: str) -> dict[str, Any]:
    """The worst attack of a seat as a table prints it."""
    w = worst(cell, seat)
    if w is None:
        tried = _attacks(cell, seat)
        return {"text": "", "why": "nothing to attack" if tried else "not attacked"}
    unit = unit_of(w.metric)
    assert w.figure.value is not None and w.figure.chance is not None  # noqa: PT018
    return {
        "text": number(w.figure.value, unit), "what": HARMS.get(w.attack, w.attack), "attack": w.attack,
        "interval": interval(w.figure, unit), "chance": number(w.figure.chance, unit), "n": w.n, "strong": w.told,
        "above": w.clear, "tried": w.tried, "said": "" if w.told else absence(w.figure, unit),
    }  # fmt: skip


def matrix(cells: Sequence[Cell]) -> dict[str, Any]:
    """Who gets what where nothing, or the least, protects: rows are attacks, columns seats and algorithms."""
    federated = [c for c in cells if c.algorithm != "centralized"]
    weakest = list({c.algorithm: c for c in reversed(federated)}.values())[::-1]
    seats = [s for s in SEATS if any(_attacks(c, s) for c in weakest)]
    columns = [(seat, cell) for seat in seats for cell in weakest if _attacks(cell, seat)]
    attacks = list(dict.fromkeys(e["attack"] for c in weakest for r in c.runs for e in r.entries))
    attacks = [a for a in HARMS if a in attacks] + [a for a in attacks if a not in HARMS]
    rows = [
        {"what": HARMS.get(a, a), "attack": a, "marks": [_mark(cell, a, seat) for seat, cell in columns]}
        for a in attacks
    ]
    kept = [i for i, (seat, _) in enumerate(columns) if seat in SEATS[:3:2] or any(r["marks"][i]["text"] for r in rows)]
    silent = [columns[i][0] for i in range(len(columns)) if i not in kept]
    spans: dict[str, int] = {}
    for i in kept:
        name = WHO.get(columns[i][0], columns[i][0])
        spans[name] = spans.get(name, 0) + 1
    who = list(dict.fromkeys(WHO.get(seat, seat) for seat in silent))
    return {
        "spans": spans, "columns": [_short(columns[i][1]) for i in kept], "silent": who,
        "rows": [{**row, "marks": [row["marks"][i] for i in kept]} for row in rows],
    }  # fmt: skip


def _short(cell: Cell) -> str:
    text = defense_text(cell.first)
    return algorithm_name(cell.algorithm) + ("" if text == "no defense" else f", {text}")


def _mark(cell: Cell, attack: str, seat: str) -> dict[str, Any]:
    """One figure with its sign: above chance, not told from it, or nothing to attack."""
    entry = cell.first.leading(attack, seat)
    if entry is None:
        return {"sign": "", "text": "", "word": "not run", "above": False}
    metric = None if entry.get("refused") else headline_metric(entry)
    figure = Spread(None) if metric is None else cell.attack(attack, seat, metric)
    if metric is None or figure.value is None:
        word = "nothing to attack" if entry.get("refused") else "no figure"
        return {"sign": "–", "text": "", "word": word, "above": False}
    clear = beats_chance({"value": figure.value, "low": figure.low, "chance": figure.chance})
    unit = unit_of(metric)
    return {
        "sign": "●" if clear else "○", "text": number(figure.value, unit), "interval": interval(figure, unit), "n": figure.n,
        "word": "above chance" if clear else "not told from chance", "metric": metric, "above": clear,
        "chance": None if figure.chance is None or unit == "±dB" else number(figure.chance, unit),
    }  # fmt: skip
