"""Exact resume: kill training at random and at aimed instants, go on with --resume, compare byte for byte with a run left alone.

The command line itself (`fedgc.cli.main`) runs in a process forked from this one, which has imported the libraries already:
a kill then falls into training rather than into two seconds of imports. Signals are sent to real processes of their own.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fedgc import cli, terminal
from fedgc import files as durable
from fedgc.errors import FedgcError
from fedgc.runs import RunDirectory
from tests.trust.faulty import readable

ROUNDS, WRITES = 8, 40  # of a run; under differential privacy there are more writes
TINY = (
    "data.source=synthetic:24x6", "data.image_size=32", "federation.clients=2", f"federation.rounds={ROUNDS}",
    "record.victims=2", "record.batch_sizes=[1, 2]", "model.embedding_size=32", "federation.server_momentum=0.5",
)  # fmt: skip
PRIVATE = ("defense.name=dp-sgd", "defense.noise_multiplier=1.0")
DEFENSES = {"none": (), "dp-sgd": (*PRIVATE, "defense.noise_seed=7"), "dp-sgd, own key": PRIVATE}
CASES = [(algorithm, defense) for algorithm in ("fedavg", "fedgc") for defense in DEFENSES]
FOLDERS = ("checkpoints", "state", "transcript", "private", "attacker")
POINTS = ("before replace", "after charge", "after replace")
IMPORTED = ("torch._dynamo", "opacus", "opacus.accountants", "fedgc.terminal", "fedgc.pipeline.training")

Hook = Callable[[], None]


def command(case: tuple[str, str], out: Path, *more: str, settings: tuple[str, ...] = ()) -> list[str]:
    flags = [part for setting in (*TINY, *DEFENSES[case[1]], *settings) for part in ("--set", setting)]
    return ["train", "--algorithm", case[0], *flags, "--out", str(out), *more]


def go_on(case: tuple[str, str], out: Path, settings: tuple[str, ...] = ()) -> list[str]:
    """What the tool tells a person to type: the same command before the run was begun, then --resume."""
    begun = RunDirectory(out).exists
    return ["train", "--out", str(out), "--resume"] if begun else command(case, out, settings=settings)


# -- one process


def start(arguments: list[str], hook: Hook | None = None) -> int:
    """Fork, and run the command line there; returns the process id."""
    child = os.fork()
    if child:
        return child
    code = 70
    try:
        sink = os.open(os.devnull, os.O_WRONLY)
        os.dup2(sink, 1)
        terminal.QUIET_SECONDS = float("inf")
        sys.argv = ["fedgc-priv", *arguments]
        if hook:
            hook()
        cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    finally:
        os._exit(code)


def finish(child: int, kill_after: float | None = None) -> int:
    """Wait for the end, or kill it at an instant; the exit code, negative for a signal."""
    deadline = None if kill_after is None else time.monotonic() + kill_after
    while True:
        pid, status = os.waitpid(child, os.WNOHANG if deadline else 0)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if deadline and time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = None
        time.sleep(0.0005)


def played(arguments: list[str]) -> float:
    """Seconds of a run that nobody disturbs."""
    clock = time.monotonic()
    code = finish(start(arguments))
    if code:
        sys.exit(f"{' '.join(arguments)} ended with {code}")
    return time.monotonic() - clock


def suicide(point: str, count: int, number: signal.Signals = signal.SIGKILL) -> Hook:
    """Kill the process itself, or send it another signal, at the count-th passing of a point."""

    def hook() -> None:
        left = count

        def passing() -> None:
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), number)

        if point == "after charge":
            RunDirectory.charge = after(RunDirectory.charge, passing)  # type: ignore[method-assign]
        else:
            durable.os = Patched(os, "replace", (before if "before" in point else after)(os.replace, passing))  # type: ignore[assignment]

    return hook


class Patched:
    """A module with one function of its own."""

    def __init__(self, module: Any, name: str, function: Any) -> None:
        self.module = module
        setattr(self, name, function)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def before(call: Callable[..., Any], passing: Hook) -> Callable[..., Any]:
    def patched(*arguments: Any, **named: Any) -> Any:
        passing()
        return call(*arguments, **named)

    return patched


def after(call: Callable[..., Any], passing: Hook) -> Callable[..., Any]:
    def patched(*arguments: Any, **named: Any) -> Any:
        result = call(*arguments, **named)
        passing()
        return result

    return patched


# -- what must be equal


def fingerprint(run: Path) -> dict[str, str]:
    """Everything of a run that must not depend on where it was interrupted: name -> hash or value."""
    files = [p for folder in FOLDERS for p in sorted((run / folder).iterdir()) if p.name != "noise-key.json"]
    found = {str(p.relative_to(run)): hashed(p) for p in files}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        metrics = json.loads(line)
        metrics.pop("seconds")
        found[f"metrics.jsonl, round {metrics['round']}"] = json.dumps(metrics)
    ledger = run / "privacy.json"
    found["privacy.json"] = hashed(ledger) if ledger.exists() else "none"
    about = json.loads((run / "run.json").read_text())
    for key in (
        "status",
        "utility",
        "baselines",
        "privacy",
        "defense",
        "dataset",
        "victims",
        "splits",
        "config_digest",
    ):
        found[f"run.json, {key}"] = json.dumps(about[key])
    found["left over"] = ", ".join(str(p.relative_to(run)) for p in run.rglob(".*.tmp"))
    return found


def hashed(path: Path) -> str:
    data = path.read_bytes()
    if path.parent.name == "state" and path.suffix == ".json":
        commit = json.loads(data)["content"]
        commit["metrics"].pop("seconds")
        data = json.dumps(commit).encode()
    return hashlib.sha256(data).hexdigest()


def differences(run: Path, reference: Path) -> list[str]:
    a, b = fingerprint(run), fingerprint(reference)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))


def phase(run: Path) -> str:
    """Where a kill fell, by what it left on disk."""
    directory = RunDirectory(run)
    if any(run.rglob(".*.tmp")):
        return "mid-write"
    if not directory.exists:
        return "before run.json"
    done, rounds = directory.last_round(), directory.about()["rounds"]
    return "in evaluation" if done == rounds else "mid-round"


# -- kills


@dataclass
class Tally:
    runs: int = 0
    identical: int = 0
    kills: int = 0


class Trial:
    """Runs of one case, killed and resumed, against one that was left alone. settings: beside those of the case."""

    def __init__(self, case: tuple[str, str], root: Path, settings: tuple[str, ...] = ()) -> None:
        self.case, self.root, self.settings = case, root, settings
        self.reference = root / "reference"
        self.seconds = played(self.command(self.reference))

    def command(self, out: Path, *more: str) -> list[str]:
        return command(self.case, out, *more, settings=self.settings)

    def go_on(self, out: Path) -> list[str]:
        return go_on(self.case, out, self.settings)

    def random(self, number: int, drawn: random.Random) -> tuple[list[str], list[str]]:
        """Kill at an instant of the reference's duration, and again with one chance in two; the phases, and what differs."""
        out, phases = self.root / f"random-{number}", []
        while True:
            kill_after = drawn.uniform(0, self.seconds) if not phases or drawn.random() < 0.5 else None
            code = finish(start(self.go_on(out)), kill_after)
            if code == 0 and phases:
                return phases, self.compared(out)
            if code == 0:  # it was faster than the reference
                shutil.rmtree(out)
            elif code == -signal.SIGKILL:
                phases.append(phase(out) if out.exists() else "before run.json")
            else:
                return phases, [f"exit code {code}"]

    def aimed(self, point: str, count: int) -> list[str] | None:
        """Kill at the count-th passing of a point; what differs, or None where the run passes it less often."""
        out = self.root / f"aimed-{point}-{count}"
        if finish(start(self.go_on(out), suicide(point, count))) != -signal.SIGKILL:
            return None
        code = finish(start(self.go_on(out)))
        return self.compared(out) if code == 0 else [f"exit code {code}"]

    def compared(self, out: Path) -> list[str]:
        """Against the reference; a run with a noise key of its own against a fresh one with that key."""
        reference = self.reference
        if "own key" in self.case[1]:
            reference = self.root / "same-key"
            (reference / "state").mkdir(parents=True)
            for name in ("config.toml", "state/noise-key.json"):
                shutil.copy(out / name, reference / name)
            played(self.command(reference))
        found = differences(out, reference)
        shutil.rmtree(self.root / "same-key", ignore_errors=True)
        if not found:
            shutil.rmtree(out)
        return found


def killed(trials: dict[tuple[str, str], Trial], kills: int, drawn: random.Random) -> bool:
    tallies, phases = {case: Tally() for case in CASES}, Counter[str]()
    for number in range(kills):
        case = CASES[number % len(CASES)]
        found, wrong = trials[case].random(number, drawn)
        tally = tallies[case]
        tally.runs, tally.kills, tally.identical = (
            tally.runs + 1,
            tally.kills + len(found),
            tally.identical + (not wrong),
        )
        phases.update(found)
        verdict = f"DIFFERS: {', '.join(wrong[:6])}" if wrong else "identical"
        print(f"  {number + 1:>3}/{kills} {', '.join(case):<24} killed {', '.join(found)}: {verdict}", flush=True)
    print(f"\n{'scheme':<10} {'defense':<18} {'runs':>5} {'kills':>6} {'identical':>10}")
    for (algorithm, defense), tally in tallies.items():
        print(f"{algorithm:<10} {defense:<18} {tally.runs:>5} {tally.kills:>6} {tally.identical:>10}")
    print("kills by phase: " + ", ".join(f"{name} {count}" for name, count in phases.most_common()))
    identical = sum(tally.identical for tally in tallies.values())
    print(f"{identical} of {kills} killed runs resumed bit-identical\n", flush=True)
    return identical == kills


def aimed(trials: dict[tuple[str, str], Trial], count: int, drawn: random.Random) -> bool:
    """Kills at the write points themselves, spread over the writes of a run from the very first on."""
    done = identical = 0
    while done < count:
        case, point = CASES[done % len(CASES)], POINTS[done % len(POINTS)]
        passing = (
            drawn.randint(1, ROUNDS) if point == "after charge" else 1 + drawn.randrange(3) + WRITES * done // count
        )
        wrong = trials[case].aimed(point, passing)
        if wrong is None:
            wrong = [f"not passed {passing} times"]
        done, identical = done + 1, identical + (not wrong)
        verdict = f"DIFFERS: {', '.join(wrong[:6])}" if wrong else "identical"
        print(f"  {done:>3}/{count} {', '.join(case):<24} killed {point} {passing}: {verdict}", flush=True)
    print(f"{identical} of {count} runs killed at a write point resumed bit-identical\n", flush=True)
    return identical == count


# -- signals


class Process(Protocol):
    """As `subprocess.Popen`."""

    returncode: Any

    def poll(self) -> int | None: ...
    def send_signal(self, number: int, /) -> None: ...
    def communicate(self, *, timeout: float) -> tuple[str, str]: ...


def real(arguments: list[str]) -> Process:
    return subprocess.Popen(
        [sys.executable, "-m", "fedgc.cli", *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


def stopped(
    trial: Trial,
    stage: str | float,
    number: signal.Signals,
    times: int,
    begin: Callable[[list[str]], Process] = real,
) -> tuple[float, str]:
    """Seconds until the end after one or two signals in a stage, or so many seconds after the start, and what is wrong: exit
    code, message, the last round, weights after going on."""
    out = trial.root / f"stopped-{number.name}-{times}-{stage}".replace(" ", "-")
    process, began = begin(trial.command(out)), time.monotonic()
    while process.poll() is None and not reached(out, stage, began):
        time.sleep(0.001)
    time.sleep(0.02 if isinstance(stage, str) else 0)
    clock = time.monotonic()
    for _ in range(times):
        process.send_signal(number)
        time.sleep(0.002)
    err = process.communicate(timeout=60)[1]
    spent = time.monotonic() - clock
    if process.returncode != 128 + number:
        return spent, f"exit code {process.returncode}: {err.strip()[-200:]}"
    if times == 1 and ("Traceback" in err or not any(w in err for w in ("--resume", "repeat the command"))):
        return spent, f"said {err.strip()[-200:]!r}"
    try:
        readable(out)
    except (AssertionError, FedgcError) as unreadable:
        return spent, f"the last round is not intact: {unreadable}"
    if finish(start(trial.go_on(out))) != 0:
        return spent, "did not go on"
    return spent, ", ".join(trial.compared(out)[:6])


def reached(out: Path, stage: str | float, began: float) -> bool:
    run = RunDirectory(out)
    match stage:
        case float():
            return time.monotonic() >= began + stage
        case "reading faces":
            return (out / ".lock").exists()
        case "a round":
            return run.last_round() >= 2
        case _:
            return run.exists and run.last_round() == run.about()["rounds"]


def signalled(trials: dict[tuple[str, str], Trial]) -> bool:
    stages = [("reading faces", "none"), ("a round", "none"), ("evaluation", "none"), ("a round", "dp-sgd")]
    stages.append(("accounting and evaluation", "dp-sgd"))
    wanted: Iterator[tuple[str, str, signal.Signals, int]] = (
        (stage, defense, number, times)
        for stage, defense in stages for number, times in ((signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2))
    )  # fmt: skip
    good = True
    print(f"{'signal':<10} {'during':<28} {'defense':<10} {'seconds':>8}")
    for stage, defense, number, times in wanted:
        spent, wrong = stopped(trials["fedgc", defense], stage, number, times)
        good &= not wrong and spent < 5
        name = number.name + (" twice" if times == 2 else "")
        print(f"{name:<12} {stage:<26} {defense:<10} {spent:>8.2f} {wrong or 'resumed bit-identical'}", flush=True)
    return good


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=60, help="runs killed at random instants")
    parser.add_argument("--aimed", type=int, default=18, help="runs killed at a write point")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-signals", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for name in IMPORTED:  # so that no fork spends its time on it
        importlib.import_module(name)

    drawn, clock = random.Random(options.seed), time.monotonic()
    root = Path(tempfile.mkdtemp(prefix="resume-"))
    print(
        f"torch {torch.__version__}, 1 thread; synthetic:24x6, 32 px, 2 clients, {ROUNDS} rounds; seed {options.seed}"
    )
    trials = {case: Trial(case, root / "-".join(case).replace(", ", "-")) for case in CASES}
    for case, trial in trials.items():
        print(f"  {', '.join(case):<24} {trial.seconds:.2f} s when left alone")
    good = killed(trials, options.kills, drawn)
    good &= aimed(trials, options.aimed, drawn)
    good &= options.no_signals or signalled(trials)
    print(f"{time.monotonic() - clock:.0f} s" + ("" if good else f"; what differed lies in {root}"))
    if good:
        shutil.rmtree(root)
    sys.exit(not good)


if __name__ == "__main__":
    main()
