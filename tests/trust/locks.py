"""Two processes on one run folder: the second is refused in one line, and the first ends as if nobody had come.

The first stops itself (SIGSTOP) at a write drawn by seed, the second comes then, and the first goes on. What trains is refused by
the lock, with exit code 3, whatever its configuration; what only reads needs no lock, and is refused because the run is not
finished. A finished run can be read, and attacked, while another process holds it.
"""

from __future__ import annotations

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from benchmarks.resume import POINTS, suicide
from fedgc.files import read_json
from fedgc.runs import RunDirectory
from tests.trust.cases import Case, Child, Outcome, command, refused, shown
from tests.trust.folders import people
from tests.trust.undisturbed import CONFIGS, copied, in_folder

WRITES = 30  # of a small run, at least
BEFORE_RUN = 7  # writes before run.json is there, so that nothing else says that the folder is taken
IN_USE = "in use by another process"
Second = Callable[[Path], Sequence[object]]  # the run folder -> arguments


def halted_at(write: int, *arguments: object, inside: Path | None = None) -> Child:
    """A first process, which waits before or after its write of that number."""
    point = POINTS[0] if write % 2 else POINTS[2]
    child = Child(*arguments, inside=inside, hook=suicide(point, write, signal.SIGSTOP))
    if not child.halted():
        raise AssertionError(f"the first did not get as far as {point} {write}: {shown(child.communicate()[1])}")
    return child


def ended(first: Child) -> Outcome:
    first.send_signal(signal.SIGCONT)
    return first.outcome()


def trained(
    case: tuple[str, str], write: int, second: Second | None, codes: Sequence[int], says: Sequence[str], folder: Path
) -> str | None:
    """second: None for the very same command."""
    trial, out = in_folder(case, folder), folder / "run"
    first = halted_at(write, *trial.command(out))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    complaint = refused(command(*(trial.command(out) if second is None else second(out))), codes, says)
    changed = [path for path in before if not path.exists() or path.read_bytes() != before[path]]
    outcome = ended(first)
    if complaint or changed:
        return complaint or f"the second changed {changed[0].name}"
    if outcome.code:
        return f"the first ended with {outcome.code}: {shown(outcome.err)}"
    wrong = trial.compared(out)
    return f"the first differs: {', '.join(wrong[:6])}" if wrong else None


def read(case: tuple[str, str], words: Sequence[str], folder: Path) -> str | None:
    """A finished run is read while another process holds it."""
    out = copied(case, folder / "run")
    with RunDirectory(out).locked():
        outcome = command(*(str(out) if word == "RUN" else word for word in words), inside=folder)
    return f"exit code {outcome.code}: {shown(outcome.err)}" if outcome.code else None


def swept(folder: Path) -> str | None:
    """The first of two sweeps ends with no cell marked as failed."""
    (folder / "grid.toml").write_text(
        '[data]\nsource = "synthetic:24x6"\nimage_size = 32\n[federation]\nclients = 2\nrounds = 1\n[record]\nvictims = 0\n'
        '[sweep]\nattacks = ["identity-linkage"]\nthreats = ["server"]\n'
    )
    words = ("sweep", "grid.toml", "--out", "grid", "--over", "seed=1")
    first = halted_at(1, *words, inside=folder)
    complaint = refused(command(*words, "--resume", inside=folder), (3,), [IN_USE])
    outcome = ended(first)
    if complaint or outcome.code:
        return complaint or f"the first ended with {outcome.code}: {shown(outcome.err)}"
    status = read_json(folder / "grid" / "sweep.json")["status"]
    return None if status == "finished" else f"the first sweep is {status}"


def prepared(folder: Path) -> str | None:
    """A folder of faces is being filled: a mistake in the command (2), as documented."""
    words = (
        "data",
        "prepare",
        people(folder / "faces"),
        folder / "out",
        "--align",
        "none",
        "--size",
        "64",
        "--jobs",
        "1",
    )
    first = halted_at(4, *words)
    complaint = refused(command(*words), (2,), ["being prepared by another process"])
    outcome = ended(first)
    return complaint or (f"the first ended with {outcome.code}: {shown(outcome.err)}" if outcome.code else None)


def _again(out: Path) -> list[str]:
    return ["train", "--out", str(out), "--resume"]


def _other(setting: str, case: tuple[str, str], out: Path) -> list[str]:
    return [*in_folder(case, out.parent).command(out), "--set", setting]


def _on(words: Sequence[str], out: Path) -> list[str]:
    return [str(out) if word == "RUN" else word for word in words]


READING = {
    "evaluate": ("evaluate", "RUN"),
    "attack": ("attack", "RUN", "-a", "identity-linkage", "-t", "server"),
    "report": ("report", "RUN", "-o", "page"),
    "train": ("train", "--out", "RUN", "--resume"),
}


def _cases(seed: int = 0) -> Iterator[Case]:
    drawn = random.Random(seed)
    late = lambda: drawn.randint(BEFORE_RUN + 5, WRITES)  # noqa: E731
    for case in CONFIGS:
        write = drawn.randint(2, BEFORE_RUN)
        yield Case(f"train at write {write}: {', '.join(case)}", partial(trained, case, write, None, (3,), [IN_USE]))
        write = late()
        work = partial(trained, case, write, _again, (3,), [IN_USE])
        yield Case(f"train --resume at write {write}: {', '.join(case)}", work)
    for case in CONFIGS[1:3]:
        work = partial(trained, case, late(), None, (3,), [IN_USE])
        yield Case(f"train in the midst of rounds: {', '.join(case)}", work)
    for setting, case in (("seed=5", CONFIGS[0]), ("federation.rounds=9", CONFIGS[3])):
        work = partial(trained, case, late(), partial(_other, setting, case), (3,), [IN_USE])
        yield Case(f"train with {setting}: {', '.join(case)}", work)
    for name in ("evaluate", "attack", "report"):
        work = partial(trained, CONFIGS[2], late(), partial(_on, READING[name]), (3,), ["stopped after round"])
        yield Case(f"{name} of a run that is being trained", work)
    for name in ("evaluate", "attack", "train"):
        yield Case(f"{name} of a finished run that another process holds", partial(read, CONFIGS[2], READING[name]))
    yield Case("sweep --resume beside a sweep", swept)
    yield Case("data prepare beside data prepare", prepared)


LOCKS = tuple(_cases())
