"""All of docs/trust.md, with a seed: faults, hostile files, bad updates, planted mistakes, nulls; a table and a sentence.

make trust                        # all of it
python -m tests.trust --quick     # a tenth of the largest rows, to try it

Two lanes run beside each other, each row in a process of its own: the killed runs, which take longest, and everything else.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import unittest
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
# a fork leaves the semaphores of a pool to its parent, which multiprocessing's tracker remarks on
QUIET = "ignore:resource_tracker:UserWarning"
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "PYTHONWARNINGS": QUIET}
Counts = tuple[int, int, Sequence[str]]  # handled, out of so many, and what was not

# a module of this package, whose constant of the same name in capitals lists its cases: what they are
LISTS = {
    "signals": "interrupted runs that end in time and resume bit-identical",
    "locks": "second processes that are refused, and change nothing",
    "disks": "full, read-only and failing disks that cost nothing",
    "repeats": "repeated runs that are bit-identical",
    "nans": "NaN and infinity that stop the work, or are counted",
    "limits": "memory limits that end cleanly, or are seen before",
    "models": "hostile model files that are refused, or normalised",
    "paths": "hostile archives and paths that are refused, or normalised",
    "images": "odd and hostile images that are refused, or normalised",
    "configs": "hostile configurations that are refused",
    "promises": "epsilons that are withheld, with the reason",
    "nulls": "attacks on nothing that the report shows at chance",
}
LONG = {"kills", "fuzz"}  # one lane; everything else is the other
HOSTILE = ("models", "paths", "images", "configs")


@dataclass(frozen=True)
class Row:
    what: str
    good: int
    of: int
    seconds: float
    wrong: tuple[str, ...] = ()

    def line(self) -> str:
        return f"{self.what:<62} {self.good:>5} of {self.of:<5} {self.seconds:>6.0f} s"

    @property
    def failed(self) -> bool:
        return self.good < self.of or self.of == 0


class Progress:
    """What a row is at; on a terminal only."""

    def __init__(self) -> None:
        self.began = time.monotonic()

    def __call__(self, what: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{time.monotonic() - self.began:5.0f} s {what[:80]:<80}", end="\r", file=sys.stderr)


def program(progress: Progress, module: str, *arguments: object, pattern: str) -> Counts:
    """Counts that a program prints in this form, added up."""
    command = [sys.executable, "-m", module, *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=err, text=True)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.strip())
            progress(line.strip())
        process.wait()
        err.seek(0)
        last = err.read().strip()[-300:]
    found = [(int(a), int(b)) for a, b in re.findall(pattern, "\n".join(lines))]
    good, of = (sum(pair[i] for pair in found) for i in (0, 1))
    wrong = [line for line in lines if "DIFFERS" in line or line.startswith("FAILED")]
    return good, of, wrong if found else [f"{module} printed no count: {last}"]


def damaged(trials: int, seed: int) -> Counts:
    from fedgc.config import load_config
    from fedgc.pipeline.training import train
    from tests.trust.damage import caught

    with tempfile.TemporaryDirectory() as folder:
        tiny = ("data.source=synthetic:24x6", "data.image_size=32", "federation.rounds=3", "record.victims=0")
        train(load_config(settings=tiny), Path(folder) / "whole")
        found, missed = caught(Path(folder) / "whole", Path(folder), trials, seed)
    return sum(found.values()), sum(found.values()) + len(missed), missed


def listed(progress: Progress, module: str, share: int) -> Counts:
    """Cases of a module of this package, every share-th; one that this machine cannot play counts as not handled."""
    good, wrong = 0, []
    cases = getattr(importlib.import_module(f"tests.trust.{module}"), module.upper())[::share]
    for case in cases:
        progress(case.name)
        with tempfile.TemporaryDirectory() as folder:
            try:
                said = case.run(Path(folder))
            except unittest.SkipTest as missing:
                said = f"not played: {missing}"
        good += said is None
        wrong += [] if said is None else [f"{case.name}: {said}"]
    return good, len(cases), wrong


def updates() -> Counts:
    from tests.trust.updates import cases

    said = {bad: bad.run() for bad in cases()}
    wrong = [f"{bad.kind}, {bad.rule}: {why}" for bad, why in said.items() if why is not None]
    return len(said) - len(wrong), len(said), wrong


def planted(seeds: int) -> Counts:
    """Mistakes that are flagged with every seed, in both units; a false alarm on the mechanism as it is takes one away."""
    sys.path.insert(0, str(ROOT / "tests/defenses"))
    from planted_bugs import PLANTED, runs_needed

    from defenses.dp_sgd import DPSGD
    from fedgc.pipeline.auditing import audit

    def flagged(kind: type[DPSGD], runs: int) -> list[bool]:
        units, numbers = ("image", "identity"), range(100, 100 + seeds)
        mechanisms = [(kind(noise_multiplier=1.0, delta=1e-3, unit=unit), seed) for unit in units for seed in numbers]
        return [bool(audit(mechanism, runs=runs, seed=seed)["exceeded"]) for mechanism, seed in mechanisms]

    wrong = []
    for bug in PLANTED:
        found = flagged(bug, runs_needed(bug))
        wrong += [] if all(found) else [f"{bug.__name__}: flagged in {sum(found)} of {len(found)} audits"]
    alarms = sum(flagged(DPSGD, 200))
    wrong += [f"{alarms} false alarms in {2 * seeds} audits of the mechanism as it is"] if alarms else []
    return len(PLANTED) - len(wrong), len(PLANTED), wrong


def work(progress: Progress, share: int, seed: int) -> dict[str, tuple[str, Callable[[], Counts]]]:
    """Every row by its name: what it counts, and how. share: one in so many."""
    kills = ("--kills", 200 // share, "--aimed", 20 // share, "--seed", seed, "--no-signals")
    inputs = ("--runs", 20000 // share, "--seed", seed)
    killed = r"(\d+) of (\d+) (?:killed runs|runs killed)"

    def cases(name: str) -> Callable[[], Counts]:
        return lambda: listed(progress, name, 1 if name in HOSTILE else min(5, share))

    return {
        "kills": ("killed runs that resume bit-identical",
                  lambda: program(progress, "benchmarks.resume", *kills, pattern=killed)),
        "fuzz": ("fuzzed inputs that are read, or refused in words",
                 lambda: program(progress, "tests.trust.fuzz", *inputs, pattern=r"(\d+) of (\d+) fuzzed")),
        "damage": ("damaged state files that are noticed before use", lambda: damaged(1000 // share, seed)),
        **{name: (words, cases(name)) for name, words in LISTS.items()},
        "updates": ("bad updates that are refused or bounded", updates),
        "planted": ("planted mistakes in DP that an audit flags", lambda: planted(1 if share > 1 else 20)),
    }  # fmt: skip


def play(name: str, what: str, counted: Callable[[], Counts]) -> Row:
    clock = time.monotonic()
    try:
        good, of, wrong = counted()
    except Exception as error:  # the other rows are of no less worth
        good, of, wrong = 0, 1, [f"{type(error).__name__}: {error}"]
    row = Row(what, good, of, time.monotonic() - clock, tuple(wrong))
    print("\n".join([row.line(), *(f"    {line}" for line in row.wrong[:10])]), flush=True)
    return row


def apart(name: str, options: argparse.Namespace) -> Row:
    """A row in a process of its own: the children that it forks inherit no thread, and no lock, of another row."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "row.json"
        given = [*(["--quick"] if options.quick else []), "--seed", str(options.seed), "--row", str(file)]
        subprocess.run(
            [sys.executable, "-m", "tests.trust", *given, "--only", name], cwd=ROOT, env=ENVIRONMENT, check=False
        )
        return Row(**json.loads(file.read_text())) if file.exists() else Row(name, 0, 0, 0.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="a tenth of the largest rows")
    parser.add_argument("--only", metavar="ROW", nargs="+", help="these rows alone, by the names that --names prints")
    parser.add_argument("--names", action="store_true", help="print the names of all rows, and end")
    parser.add_argument("--row", type=Path, help=argparse.SUPPRESS)  # where a process leaves its row
    options = parser.parse_args()
    every = work(Progress(), 10 if options.quick else 1, options.seed)
    if options.names:
        print(*(f"{name:<10} {words}" for name, (words, _) in every.items()), sep="\n")
        return
    chosen = [name for name in every if options.only is None or name in options.only]
    if options.row is not None:
        import torch

        torch.set_num_threads(1)
        options.row.write_text(json.dumps(asdict(play(chosen[0], *every[chosen[0]]))))
        return
    began = time.monotonic()
    lanes = [[name for name in chosen if (name in LONG) is long] for long in (True, False)]
    with ThreadPoolExecutor(len(lanes)) as beside:  # threads that wait for processes
        played = beside.map(lambda lane: {name: apart(name, options) for name in lane}, lanes)
        rows = {name: row for lane in played for name, row in lane.items()}
    print(f"\n{time.monotonic() - began:.0f} s")
    if options.only is None:
        print(sentence(rows))
    sys.exit(any(row.failed for row in rows.values()))


def sentence(every: dict[str, Row]) -> str:
    refused, of = (sum(getattr(every[name], key) for name in HOSTILE) for key in ("good", "of"))
    of_row = lambda name: f"{every[name].good}/{every[name].of}"  # noqa: E731
    return (
        f"faults survived {of_row('kills')}, damaged files caught {of_row('damage')}, hostile inputs refused {refused}/{of}, "
        f"bad updates handled {of_row('updates')}, planted DP bugs caught {of_row('planted')}"
    )


if __name__ == "__main__":
    main()
