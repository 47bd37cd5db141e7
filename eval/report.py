"""report: runs and their attacks become one self-contained page, tables and figures. Reads results only."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from eval import pictures, provenance, sections
from eval.comparisons import comparisons
from eval.curves import curves
from eval.empirical import empirical
from eval.front import front
from eval.modelcard import model_card
from eval.narrative import accounting, verdict
from eval.plotting import Drawn
from eval.results import Cell, Failure, RunResult, algorithm_name, cells, headline_metric
from eval.rows import COLUMNS, table
from eval.wording import CAPTIONS, LEDGER, LIMITS
from fedgc.errors import UsageError
from fedgc.files import PRIVATE, SHARED, make_folder, write_bytes, write_json, write_text

SCHEMA = 1
TEMPLATE, STYLE, SCRIPT = "report.template.html", "report.css", "report.js"
WITHHELD = (
    "This copy was made to be shared: neither private photos nor pictures made from them are in it. Build the report "
    "without --no-originals to see them."
)


def build(
    runs: Sequence[RunResult],
    out: Path,
    *,
    originals: bool = True,
    commands: Sequence[str] = (),
    failures: Sequence[Failure] = (),
) -> dict[str, Any]:
    """Write report.html, results.csv, results.json and figures/ into ``out``; returns what was written and found.

    originals: whether private photos and their reconstructions may be shown; a page with faces is readable by its owner
    only. commands: printed as the way to reproduce; without, the arguments that each run recorded. failures: runs that were asked
    for and have no result. Raises UsageError where there is no run.
    """
    if not runs:
        raise UsageError("no run to report: give run directories, or a folder that holds some")
    grouped = cells(runs)
    drawn = curves(grouped, failures)
    grids = pictures.grids(grouped) if originals else []
    said = verdict(grouped)
    page = _page(runs, grouped, drawn, grids, originals, commands, failures)
    make_folder(out / "figures")
    for figure in drawn:
        write_bytes(out / "figures" / f"{figure.name}.svg", figure.svg)
        write_bytes(out / "figures" / f"{figure.name}.png", figure.png)
    rows = table(runs, failures)
    headline = [_headline(cell) for cell in grouped]
    write_text(out / "results.csv", _csv(rows))
    write_json(out / "results.json", {"schema": SCHEMA, "verdict": said, "headline": headline, "rows": rows})
    write_text(out / "report.html", page, PRIVATE if grids else SHARED)
    return {
        "report": str(out / "report.html"), "results": [str(out / "results.csv"), str(out / "results.json")],
        "figures": [str(out / "figures" / f"{f.name}.{kind}") for f in drawn for kind in ("svg", "png")],
        "private": bool(grids), "runs": len(runs), "headline": headline, "verdict": said,
    }  # fmt: skip


def _page(
    runs: Sequence[RunResult], grouped: Sequence[Cell], drawn: Sequence[Drawn], grids: Sequence[dict[str, Any]],
    originals: bool, commands: Sequence[str], failures: Sequence[Failure],
) -> str:  # fmt: skip
    import jinja2
    from markupsafe import Markup

    def text(name: str) -> str:
        return (resources.files("eval") / name).read_text(encoding="utf-8")

    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(text), autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    script = text(SCRIPT)
    return environment.get_template(TEMPLATE).render(
        style=Markup(text(STYLE)), script=Markup(script), script_hash=_hash(script), title=_title(grouped),
        front=front(grouped), failures=failures, threats=sections.threats(grouped), utility=sections.utility(grouped),
        attacks=sections.attacks(grouped), ledger=LEDGER, captions=CAPTIONS, comparisons=comparisons(grouped),
        figures=[{"svg": Markup(inline(f)), "alt": f.alt, "name": f.name} for f in drawn],
        originals=originals, withheld=WITHHELD, grids=grids, selection=pictures.SELECTION,
        accounting=accounting(grouped), empirical=empirical(grouped), limits=LIMITS, data=provenance.data(runs),
        card=model_card(grouped), reproduction=provenance.reproduction(runs, commands),
        seeds=any(len(c.runs) > 1 for c in grouped),
    )  # fmt: skip


def _hash(script: str) -> str:
    """Of the only script that a browser may run in the page (Content-Security-Policy)."""
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"


def _title(grouped: Sequence[Cell]) -> str:
    names = list(dict.fromkeys(algorithm_name(c.algorithm) for c in grouped))
    return f"What leaks, and to whom: {', '.join(names)}"


def inline(figure: Drawn) -> str:
    """The SVG as an element of a page: no prolog, no namespaces (a page needs none), identifiers that are its own."""
    text = figure.svg.decode()
    text = text[text.index("<svg") :]
    text = re.sub(r'\sxmlns(:xlink)?="[^"]*"', "", text)
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{figure.name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\g<1>#{figure.name}-", text)
    return re.sub(r'<svg width="[^"]*" height="[^"]*"', '<svg aria-hidden="true"', text, count=1)


def _headline(cell: Cell) -> dict[str, Any]:
    """One cell in figures: utility beside the untrained net, and each seat's attacks by their headline metric."""
    first = cell.first
    leakage = []
    for entry in first.entries:
        metric = headline_metric(entry)
        if entry.get("refused") or metric is None or entry != first.leading(entry["attack"], entry["threat"]):
            continue
        measured = cell.attack(entry["attack"], entry["threat"], metric).json()
        leakage.append({"attack": entry["attack"], "threat": entry["threat"], "metric": metric, **measured})
    utility = {m: cell.utility(m).json() for m in ("auc", "tar@far=0.1")}
    return {
        "label": cell.label, "algorithm": cell.algorithm, "defense": cell.defense, "epsilon": cell.epsilon,
        "runs": [r.path for r in cell.runs], "seeds": [r.seed for r in cell.runs], "utility": utility,
        "untrained": {"auc": cell.utility("auc", "untrained").json()}, "leakage": leakage,
    }  # fmt: skip


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


__all__ = ["RunResult", "build"]
