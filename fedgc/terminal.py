"""What a person sees: progress with the time left on stderr, tables on stdout."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedgc.pipeline.watch import Watch

QUIET_SECONDS = 10.0  # between lines where stderr is not a terminal


@contextmanager
def progress() -> Iterator[Watch]:
    console = Console(file=sys.stderr)
    if not console.is_terminal:
        yield _lines()
        return
    columns = (TextColumn("{task.description:<34}"), BarColumn(24), TextColumn("{task.completed:.0f}/{task.total:.0f}"),
               TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))  # fmt: skip
    with Progress(*columns, console=console) as bars:
        tasks: dict[str, Any] = {}

        def watch(stage: str, done: int, total: int, note: str = "") -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(escape(stage), total=max(total, 1), note="")
            bars.update(tasks[stage], completed=done, total=max(total, 1), note=escape(note))

        yield watch


def _lines() -> Watch:
    """One line when a stage starts to take long, then every few seconds, with the time left."""
    started: dict[str, float] = {}
    last = time.monotonic()

    def watch(stage: str, done: int, total: int, note: str = "") -> None:
        nonlocal last
        now = time.monotonic()
        since = now - started.setdefault(stage, now)
        if now - last >= QUIET_SECONDS:
            last = now
            left = f", {since / done * (total - done):.0f} s left" if 0 < done < total else ""
            print(f"{stage} {done}/{total}{left}{', ' + note if note else ''}", file=sys.stderr, flush=True)

    return watch


def out() -> Console:
    return Console(file=sys.stdout, soft_wrap=not sys.stdout.isatty())


def text(value: str) -> None:
    print(value, end="" if value.endswith("\n") else "\n")


def measured(entry: Mapping[str, Any] | None, digits: int = 3) -> str:
    """0.853 [0.84, 0.87], or the reason why there is no number."""
    if not entry:
        return "-"
    if entry.get("value") is None:
        return f"- ({entry.get('why', 'unsupported')})"
    value = f"{entry['value']:.{digits}f}"
    low, high = entry.get("low"), entry.get("high")
    return value if low is None or high is None else f"{value} [{low:.{digits}f}, {high:.{digits}f}]"


def training(result: Mapping[str, Any]) -> None:
    console = out()
    table = Table(title=f"{result['algorithm']}, {result['rounds']} rounds: utility on people never trained on")
    for heading in ("measure", "trained", "untrained", "chance"):
        table.add_column(heading)
    untrained = result["baselines"]["untrained"]
    for name, entry in result["utility"].items():
        if isinstance(entry, dict):
            chance = entry.get("chance")
            table.add_row(
                name, measured(entry), measured(untrained.get(name)), "-" if chance is None else f"{chance:.3g}"
            )
    console.print(table)
    u = result["utility"]
    console.print(
        f"{u['identities']} people, {u['images']} photos; 95 % intervals by resampling people", highlight=False
    )
    privacy = result["privacy"]
    if privacy and privacy["epsilon"] is None:
        console.print(f"privacy: ε is withheld: {escape(str(privacy.get('why')))}", style="red", highlight=False)
    elif privacy:
        console.print(
            f"privacy: {privacy['unit']}-level, {privacy['adjacency']}: ε = {privacy['epsilon']:.3f} at δ = {privacy['delta']:g} "
            f"({privacy['accountant']}), σ = {privacy['noise_multiplier']:.3f}, C = {privacy['max_grad_norm']:g}, "
            f"{privacy['sampling']} sampling, {privacy['steps']} steps; {privacy['covers']}; "
            f"randomness: {privacy['randomness']}", highlight=False,
        )  # fmt: skip
    else:
        console.print("privacy: none promised (no differential privacy)", highlight=False)
    console.print(f"{result['seconds']:.1f} s of training, {result['images_per_second']:.0f} images/s", highlight=False)
    console.print(f"next: fedgc-priv attack {escape(str(result['run']))}", highlight=False)


def evaluation(result: Mapping[str, Any]) -> None:
    training(result)
    if result.get("excluded_trained"):
        say(f"{result['excluded_trained']} people are left out: they have the names of people who were trained on")
    if "pairs" in result:
        listed_pairs(result["pairs"])


def listed_pairs(found: Mapping[str, Any]) -> None:
    """What `evaluate --pairs` found: two measures, the rule behind them, and which pairs were left out."""
    say(f"listed pairs of {found['source']}: accuracy {measured(found['accuracy'])}, AUC {measured(found['auc'])}")
    say(f"{found['pairs']} of {found['listed']} pairs ({found['matched']} matched) of {found['people']} people; "
        f"threshold from {found['threshold_from']}")  # fmt: skip
    say(f"{'95 % intervals' if found['folds'] == 1 else 'AUC: 95 % interval'} by resampling people")
    for name in ("accuracy", "auc"):
        if found[name].get("note"):
            say(f"{name}: {found[name]['note']}")
    reasons = (
        ("trained", "of people trained on"),
        ("calibration", "of calibration people"),
        ("missing", "without a photo"),
    )
    left_out = [f"{found[f'excluded_{key}']} {what}" for key, what in reasons if found[f"excluded_{key}"]]
    if left_out:
        say("pairs left out: " + ", ".join(left_out), style="yellow")
    if found["missing"]:
        named = "; ".join(f"{m['path']} ({m['reason']})" for m in found["missing_files"])
        unnamed = found["missing"] - len(found["missing_files"])
        more = f", and {unnamed} more" if unnamed else ""
        say(f"photos missing or unusable: {named}{more}", style="yellow")


def preparation(made: Mapping[str, Any]) -> None:
    table = Table(title=f"{made['destination']}: {made['people']} people")
    table.add_column("photos", justify="right")
    table.add_column("what became of them")
    table.add_row(str(made["kept"]), f"kept ({made['reused']} done before)" if made["reused"] else "kept")
    for reason, about in made["reasons"].items():
        table.add_row(str(about["count"]), escape(f"dropped: {reason} ({about['examples'][0]}, ...)"))
    out().print(table)
    if made["terms"]:
        say(f"terms: {made['terms']}")
    say(f"{made['seconds']:.1f} s; every file is named in {made['manifest']}")
    say(f"next: fedgc-priv train --data {made['destination']}")


def say(line: str, style: str | None = None) -> None:
    out().print(line, style=style, highlight=False, markup=False)


def attacks(entries: Sequence[Mapping[str, Any]]) -> None:
    console = out()
    table = Table(title="what leaks, to whom")
    for heading in ("attack", "seat", "measure", "result", "chance", "beside it"):
        table.add_column(heading, overflow="fold")
    for entry in entries:
        if entry["refused"]:
            continue
        variants = {"": entry, **{f" ({k})": v for k, v in entry.get("variants", {}).items()}}
        for suffix, shown in variants.items():
            for name, m in shown["metrics"].items():
                values = {label: b.get(name, {}).get("value") for label, b in shown["baselines"].items()}
                values["ceiling"] = m.get("ceiling")
                others = ", ".join(f"{label} {value:.3g}" for label, value in values.items() if value is not None)
                chance = m.get("chance")
                cell = "" if chance is None else f"{chance:.3g}"
                table.add_row(entry["attack"], entry["threat"], name + suffix, measured(m), cell, others)
        table.add_section()
    if table.row_count:
        console.print(table)
    noted = [(entry, m["note"]) for entry in entries for m in entry["metrics"].values() if m.get("note")]
    for line in dict.fromkeys(f"{entry['attack']} from {entry['threat']}: {note}" for entry, note in noted):
        say(line, style="dim")
    for entry in entries:
        if "why" in entry:
            labels = "" if entry["labels"] is None else f"classes {', '.join(map(str, entry['labels']))}; "
            found = f"{labels}{entry['targets']} photos, in {entry['folder']}"
            say(f"{entry['attack']} from {entry['threat']}: {found}; {entry['why']}")
    for judge in {e["judge"]["name"]: e["judge"] for e in entries if "judge" in e}.values():
        say(f"judge {judge['name']}, on {judge['people']} people whom nobody trained on: AUC {measured(judge['auc'])}, "
            f"EER {measured(judge['eer'])}, TAR at FMR 1 % {measured(judge['tar@fmr=0.01'])}")  # fmt: skip
        if judge.get("note"):
            say(f"judge {judge['name']}: {judge['note']}", style="yellow")
    for entry in entries:
        if entry["refused"]:
            console.print(
                f"{entry['attack']} from {entry['threat']}: refused, {escape(entry['refused'])}",
                style="yellow",
                highlight=False,
            )
    console.print("a failed or refused attack is not a guarantee", style="dim")


def audited(found: Mapping[str, Any]) -> None:
    bound = found["epsilon_lower_bound"]
    say(f"claimed: {found['unit']}-level, {found['adjacency']}: ε = {found['claimed']:.3f} at δ = {found['delta']:g} "
        f"({found['accountant']}), {found['rounds']} rounds at rate {found['sample_rate']:g}, "
        f"σ = {found['defense']['noise_multiplier']:.3f}, C = {found['defense']['max_grad_norm']:g}; "
        f"randomness: {found['randomness']}")  # fmt: skip
    say(f"found:   ε ≥ {bound['value']:.3f} at {100 * bound['confidence']:g} % confidence ({found['method']}); a perfect attack "
        f"on {bound['n']} counted runs in each world would show {bound['ceiling']:.3f}")  # fmt: skip
    say(found["verdict"], style="red" if found["exceeded"] else None)


def report_table(summary: Mapping[str, Any]) -> None:
    console = out()
    for sentence in summary.get("verdict", ()):
        console.print(f"• {escape(sentence)}", highlight=False)
    for failure in summary.get("failed", ()):
        console.print(f"failed: {escape(failure['cell'])}: {escape(failure['error'])}", style="red")


def listing_table(kind: str, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title=kind)
    for heading in rows[0]:
        table.add_column(heading, no_wrap=heading == "name", overflow="fold")
    for row in rows:
        table.add_row(*(escape("\n".join(map(str, v)) if isinstance(v, list) else str(v)) for v in row.values()))
    out().print(table)


def inspection(found: Mapping[str, Any]) -> None:
    say(f"{found['people']} people, {found['images']} usable photos in {found['source']}")
    spread = found["images_per_person"]
    if spread:
        say(f"photos a person: {spread['min']} to {spread['max']}, median {spread['median']:g}")
    say("formats: " + (", ".join(f"{name} {n}" for name, n in found["formats"].items()) or "none"))
    for where, about in found["duplicates"].items():
        if about["count"]:
            say(
                f"identical photos {where.replace('_', ' ')}: {about['count']}, for example {about['examples'][0]}",
                style="yellow",
            )
    for reason, about in found["skipped"].items():
        more = ", ..." if about["count"] > len(about["examples"]) else ""
        say(f"skipped {about['count']}: {reason}: {', '.join(map(str, about['examples']))}{more}", style="yellow")
    for line in found["suggestions"]:
        say(f"• {line}")
