"""The sections of the report as plain data: what the template prints, decided here so that it only lays out."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from eval.results import (
    METRICS,
    SEATS,
    UTILITY,
    Cell,
    Entry,
    RunResult,
    Value,
    algorithm_name,
    beats_chance,
)
from eval.wording import ATTACKS, BASELINES, GRANTS, HARMS, interval, number
from fedgc.threats import THREATS

DECIMAL = re.compile(r"\d+\.\d+")
BRIEF_NOTE = 36  # letters that a note in a cell may have; what is longer stands below the table
WORTH_KEEPING = 0.02  # gain of AUC by training below which there is no share of it to speak of


def shown(value: Value | None, metric: str) -> dict[str, Any]:
    """A measured value as a table prints it: text, interval, notes in small print; why there is none."""
    unit = METRICS[metric][1] if metric in METRICS else ""
    cell: dict[str, Any] = {"text": "", "interval": "", "notes": [], "strong": False, "chance": "", "why": ""}
    if not value:
        return cell
    if value.get("value") is None:
        what, _, why = str(value.get("why") or "no reason given").partition(":")
        return {**cell, "notes": [what], "why": why.strip()}
    notes = [f"realised FAR {value['far']:.3f}"] if value.get("far") is not None else []
    notes += [f"ceiling {number(value['ceiling'], unit)}"] if value.get("ceiling") is not None else []
    notes += [f"{value['exact']} exact copies"] if value.get("exact") else []
    remark = str(value.get("note") or "")
    notes += [brief if len(brief := remark.partition(":")[0]) <= BRIEF_NOTE else "see note"] if remark else []
    chance = value.get("chance") if unit != "±dB" else None
    return {
        **cell, "text": number(value["value"], unit), "interval": interval(value, unit), "notes": notes,
        "strong": beats_chance(value), "chance": "" if chance is None else number(chance, unit),
        "why": remark if notes and notes[-1] == "see note" else "",
    }  # fmt: skip


def seeds_apart(cell: Cell, metric: str) -> list[str]:
    """Each seed's own value, where there are several: their spread is not in the mean."""
    values, unit = cell.utility(metric).seeds, METRICS[metric][1]
    return [f"seeds {', '.join(number(v, unit) for v in values)}"] if len(values) > 1 else []


def seats_of(cells: Sequence[Cell]) -> list[str]:
    found = {e["threat"] for c in cells for r in c.runs for e in r.entries}
    return [s for s in SEATS if s in found] + sorted(found - set(SEATS))


def threats(cells: Sequence[Cell]) -> dict[str, Any]:
    """Grants per seat and algorithm, as the entries record them: "yes", "no", or "in part" where runs differ."""
    algorithms = list(dict.fromkeys(c.algorithm for c in cells if c.algorithm != "centralized"))
    columns = []
    for seat in seats_of(cells):
        for algorithm in algorithms:
            runs = [r for c in cells if c.algorithm == algorithm for r in c.runs]
            held = [{g for e in r.entries if e["threat"] == seat for g in e.get("granted", ())} for r in runs]
            held = [h for h in held if h]
            if held:
                columns.append((seat, algorithm, held))
    rows = [
        {"grant": grant, "words": words, "marks": [_mark(grant, held) for _, _, held in columns]}
        for grant, words in GRANTS.items()
    ]
    spans: dict[str, int] = {}
    for seat, _, _ in columns:
        spans[seat] = spans.get(seat, 0) + 1
    known = [(s, THREATS[s].position, THREATS[s].behaviour) for s in spans if s in THREATS]
    server = [algorithm_name(a) for s, a, held in columns if s == "server" and _mark("client-updates", held) == "yes"
              and _mark("class-embeddings", held) == "yes"]  # fmt: skip
    return {
        "columns": [(seat, algorithm_name(a)) for seat, a, _ in columns], "spans": spans, "rows": rows, "seats": known,
        "server": server, "refusals": _refusals(cells),
    }  # fmt: skip


def _mark(grant: str, held: Sequence[set[str]]) -> str:
    count = sum(grant in h for h in held)
    return "yes" if count == len(held) else "no" if count == 0 else "in part"


def _refusals(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Each reason once, with the attacks and the cells that it holds for."""
    found: dict[tuple[str, str], tuple[dict[str, None], list[str]]] = {}
    for cell in cells:
        for entry in cell.first.entries:
            if entry.get("refused"):
                names, labels = found.setdefault((entry["threat"], entry["refused"]), ({}, []))
                names[entry["attack"]] = None
                labels.append(cell.label)
    return [
        {"seat": seat, "attack": ", ".join(names), "why": why, "cells": _briefly(labels, cells)}
        for (seat, why), (names, labels) in found.items()
    ]


def _briefly(labels: Sequence[str], cells: Sequence[Cell]) -> str:
    """Which cells: "every FedGC run" rather than a list of all of them."""
    parts = []
    for algorithm in dict.fromkeys(c.algorithm for c in cells):
        mine = list(dict.fromkeys(c.label for c in cells if c.algorithm == algorithm))
        hit = [label for label in mine if label in labels]
        parts += [f"every {algorithm_name(algorithm)} run"] if len(hit) == len(mine) > 1 else hit
    return "; ".join(parts)


def utility(cells: Sequence[Cell]) -> dict[str, Any]:
    """Every utility figure, then the baselines; "kept" is the share of the best undefended gain over the untrained net."""
    rows: list[dict[str, Any]] = []
    best = max(
        (v for c in cells if c.epsilon is None and not c.withheld and (v := c.utility("auc").value) is not None),
        default=None,
    )
    baselines = Shared([c.label for c in cells])
    for cell in cells:
        trained, untrained = cell.utility("auc").value, cell.utility("auc", "untrained").value
        kept = None
        if trained is not None and untrained is not None and best is not None and best - untrained > WORTH_KEEPING:
            kept = f"{100 * (trained - untrained) / (best - untrained):.0f} %".replace("-", "−")
        run = cell.first
        people, photos = (run.about.get("utility", {}).get(k) for k in ("identities", "images"))
        values = [shown(cell.utility(m).json() | _extra(run.utility(m)), m) for m in UTILITY]
        for metric, value in zip(UTILITY, values, strict=True):
            value["notes"] += seeds_apart(cell, metric)
        rows.append({"label": cell.label, "values": values, "kept": kept, "people": people, "photos": photos})
        for name in run.about.get("baselines", {}):
            if any((run.utility(m, name) or {}).get("value") is not None for m in UTILITY):
                baselines.add(name, [shown(run.utility(m, name), m) for m in UTILITY], cell.label)
    values_of = [c.first.utility(m) or {} for c in cells for m in UTILITY]
    notes = {text for v in values_of for text in (v.get("note"), v.get("why")) if text}
    return {
        "metrics": [METRICS[m][0] for m in UTILITY],
        "rows": rows,
        "baselines": baselines.rows,
        "notes": sorted(notes),
    }


class Shared:
    """Baseline rows, each once with the runs that it belongs to; named plainly where it belongs to all of them."""

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = set(labels)
        self._found: dict[str, tuple[str, list[dict[str, Any]], set[str]]] = {}

    def add(self, name: str, values: list[dict[str, Any]], label: str) -> None:
        key = f"{name} {[(v['text'], v['interval']) for v in values]}"
        self._found.setdefault(key, (name, values, set()))[2].add(label)

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [
            {"label": name, "of": "" if labels >= self.labels else "; ".join(sorted(labels)), "values": values}
            for name, values, labels in self._found.values()
        ]


def _extra(value: Value | None) -> dict[str, Any]:
    return {k: v for k, v in (value or {}).items() if k in ("far", "note")}


def attacks(cells: Sequence[Cell]) -> list[dict[str, Any]]:
    """Every attack: per seat the runs and batch sizes with their metrics, or why it was refused, then the baselines."""
    out = []
    for attack in dict.fromkeys(e["attack"] for c in cells for r in c.runs for e in r.entries):
        entries = [(c, r, e) for c in cells for r in c.runs for e in r.entries if e["attack"] == attack]
        used = {m for _, _, e in entries for m in e["metrics"]}
        metrics = [m for m in METRICS if m in used] + sorted(used - set(METRICS))
        groups = [
            _seat(seat, [t for t in entries if t[2]["threat"] == seat], metrics)
            for seat in seats_of(cells) if any(e["threat"] == seat for _, _, e in entries)
        ]  # fmt: skip
        names = [METRICS.get(m, (m, ""))[0] for m in metrics]
        settings = sorted({_settings(e) for _, _, e in entries} - {""})
        words = ATTACKS.get(attack, "")
        whys = once(dict.fromkeys(
            (f"{name}, {v['notes'][0]}" if not v["text"] else name, v["why"])
            for g in groups for row in g["rows"] for name, v in zip(names, row["values"], strict=True) if v["why"]
        ))  # fmt: skip
        named = {"name": attack, "words": words, "metrics": names, "settings": settings}
        out.append({**named, "groups": groups, "whys": whys})
    return sorted(out, key=lambda a: list(HARMS).index(a["name"]) if a["name"] in HARMS else len(HARMS))


def once(remarks: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Remarks (about what, text); those that differ in one decimal number only as one, with the least and the greatest."""
    found: dict[tuple[str, str], list[str]] = {}
    for what, text in remarks:
        decimals = DECIMAL.findall(text)
        key = (what, DECIMAL.sub("{}", text)) if len(decimals) == 1 and "{" not in text else (what, text)
        found.setdefault(key, []).extend(decimals if key[1] != text else [])
    return [(what, text.format(_ends(values)) if values else text) for (what, text), values in found.items()]


def _ends(values: Sequence[str]) -> str:
    low, high = min(values, key=float), max(values, key=float)
    return low if low == high else f"{low} to {high}"


def _seat(seat: str, entries: Sequence[tuple[Cell, RunResult, Entry]], metrics: Sequence[str]) -> dict[str, Any]:
    rows: list[dict[str, Any]] = []
    held: dict[str, list[str]] = {}
    refused: dict[str, list[Cell]] = {}
    sizes: dict[str, Shared] = {}
    for cell, run, entry in entries:
        label = cell.label + (f", seed {run.seed}" if len(cell.runs) > 1 else "")
        held.setdefault(", ".join(entry.get("granted") or ()) or "nothing", []).append(algorithm_name(run.algorithm))
        if entry.get("refused"):
            refused.setdefault(entry["refused"], []).append(cell)
            continue
        values = [shown(entry["metrics"].get(m), m) for m in metrics]
        keys, size = ("targets", "round", "failed"), batch_text(entry)
        rows.append({"label": label, "values": values, "batch": size, **{k: entry.get(k) for k in keys}})
        shared = sizes.setdefault(
            size, Shared([c.label for c, _, e in entries if not e.get("refused") and batch_text(e) == size])
        )
        for name, baseline in entry.get("baselines", {}).items():
            if name != "random-labels":  # that is what chance is, beside each value
                shared.add(BASELINES.get(name, name), [shown(baseline.get(m), m) for m in metrics], cell.label)
    grants = [{"held": h, "who": " and ".join(dict.fromkeys(names))} for h, names in held.items()]
    baselines = [{**row, "batch": size} for size, shared in sizes.items() for row in shared.rows]
    everyone = [c for c, _, _ in entries]
    refusals = [(_briefly([c.label for c in those], everyone), why) for why, those in refused.items()]
    return {"seat": seat, "rows": rows, "grants": grants, "baselines": baselines, "refusals": refusals}


def batch_text(entry: Entry) -> str:
    """How many photos are behind an update, and how many steps were taken on them if several."""
    steps = entry.get("local_steps") or 1
    return f"{entry.get('batch_size') or 'whole round'}" + (f", {steps} steps" if steps > 1 else "")


def _settings(entry: Entry) -> str:
    settings = [f"{k} = {v}" for k, v in (entry.get("settings") or {}).items() if k != "name"]
    judge = entry.get("judge")
    if judge:
        auc = shown(judge["auc"], "auc")
        settings.append(
            f"judge {judge['name']}: AUC {auc['text']} {auc['interval']} on {judge['people']} calibration people"
        )
    return ", ".join(settings)
