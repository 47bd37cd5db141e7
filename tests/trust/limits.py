"""Training, attacking and reporting while the address space may grow by so much and no more (R8).

A command either finishes, with the bytes that it has without a limit, or says in one line that memory does not do; then
nothing is marked complete, and the same command without the limit ends as if nothing had happened.
"""

from __future__ import annotations

import atexit
import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import SkipTest

# imported here, so that a child has them from the start, and its room is for the work alone
import jinja2  # noqa: F401
import torch._dynamo  # noqa: F401

import fedgc.limits
import fedgc.pipeline.reporting
from tests.tiny import TINY
from tests.trust.cases import Case, Outcome, command, limit_room, refused, shown

SIZES = (0, 8, 16, 32, 64, 128, 256, 512, 1024, 4096)  # MiB
BIG = (
    "federation.batch_size=32",
    "data.source=synthetic:24x9",
    "model.embedding_size=256",
)  # 100 MiB of gradients of photos
HOOKS = ("defense.name=dp-sgd", "defense.noise_multiplier=0.5", "defense.noise_seed=1", "defense.mode=hooks")
FINISHED, REFUSED, RAN_OUT = "finished", "refused", "ran out"
CRASHED = "ended by signal"  # where compiled code does not look whether it was given memory, or went on for ever
PROGRESS = re.compile(r"[a-z][\w ,-]* \d+/\d+.*\n")  # a line now and then of what takes long
RUN, PAGE = "run", "page"


class Work(NamedTuple):
    """prepare: puts into a folder what the command needs; again: the command once more, after it was cut off; marks: files
    of which each one says that something is complete; same: what is compared with an undisturbed folder."""

    name: str
    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    again: Callable[[Path], tuple[str, ...]]
    marks: Callable[[Path], list[str]]
    same: Callable[[Path], dict[str, Any]]


ended: dict[tuple[str, int], str] = {}  # how each command ended with each room, since this module was loaded
said: dict[tuple[str, int], str] = {}  # and its line


def played(room: int, folder: Path, works: Iterable[str] = (), least: int | None = None) -> str | None:
    """A complaint unless every command keeps to its promise with so much room, in MiB. All are played, whatever one does. least:
    in place of what a command asks for before it begins."""
    if not sys.platform.startswith("linux"):
        raise SkipTest("the address space is limited on Linux alone")
    complaints = []
    for work in WORKS:
        if not works or work.name in works:
            (folder / work.name).mkdir()
            if complaint := _played(work, room, folder / work.name, least):
                complaints.append(f"{work.name}: {complaint}")
    return next((c for c in complaints if CRASHED not in c), complaints[0] if complaints else None)


def _played(work: Work, room: int, folder: Path, least: int | None) -> str | None:
    def limit() -> None:
        if least is not None:
            fedgc.limits.LEAST_ADDRESS_SPACE = least
        limit_room(room)

    work.prepare(folder)
    outcome = command(*work.words, inside=folder, hook=limit)
    outcome = outcome._replace(err=PROGRESS.sub("", outcome.err))
    ended[work.name, room], said[work.name, room] = _how(outcome), outcome.err
    if outcome.code == 0:
        return _other(work, folder)
    crash = f"{CRASHED} {-outcome.code}, with nothing lost" if outcome.code < 0 else None
    return _lasting(work, folder) or crash or refused(outcome, (1, 2), ("memory",))


def _how(outcome: Outcome) -> str:
    return CRASHED if outcome.code < 0 else {0: FINISHED, 2: REFUSED, 1: RAN_OUT}.get(outcome.code, str(outcome.code))


def _lasting(work: Work, folder: Path) -> str | None:
    """A complaint where a command that did not finish left something that counts as complete, or cannot be gone on with."""
    if marks := work.marks(folder):
        return f"did not finish, and yet marked as complete: {', '.join(marks)}"
    outcome = command(*work.again(folder), inside=folder)
    if outcome.code != 0:
        return f"afterwards, without a limit: exit code {outcome.code}: {shown(outcome.err)}"
    return _other(work, folder)


def _other(work: Work, folder: Path) -> str | None:
    found, expected = work.same(folder), work.same(undisturbed(work.name))
    different = sorted(k for k in found.keys() | expected.keys() if found.get(k) != expected.get(k))
    return f"other than without a limit: {', '.join(different)}" if different else None


@cache
def undisturbed(name: str) -> Path:
    """A folder in which the command was given all that it asked for."""
    folder = Path(tempfile.mkdtemp())
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    work = next(work for work in WORKS if work.name == name)
    work.prepare(folder)
    outcome = command(*work.words, inside=folder)
    if outcome.code != 0:
        raise RuntimeError(f"{name} fails without a limit: {shown(outcome.err)}")
    return folder


# -- the commands


def _nothing(folder: Path) -> None:
    pass


def _a_run(folder: Path) -> None:
    shutil.copytree(undisturbed("train") / RUN, folder / RUN)


def _an_attacked_run(folder: Path) -> None:
    shutil.copytree(undisturbed("attack") / RUN, folder / RUN)


def _train(name: str, *settings: str) -> Work:
    flags = tuple(word for setting in (*TINY, *BIG, *settings) for word in ("--set", setting))
    words = ("train", *flags, "--out", RUN, "--json")

    def again(folder: Path) -> tuple[str, ...]:
        return ("train", "--out", RUN, "--resume") if (folder / RUN / "run.json").exists() else words

    return Work(name, words, _nothing, again, _finished_run, _weights)


def _finished_run(folder: Path) -> list[str]:
    file = folder / RUN / "run.json"
    return [file.name] if file.exists() and json.loads(file.read_text())["status"] == "finished" else []


def _weights(folder: Path) -> dict[str, Any]:
    """Every released model, the states that are kept, what was recorded, and the privacy that was spent."""
    run = folder / RUN
    files = (
        *run.glob("checkpoints/*"),
        *run.glob("state/*.safetensors"),
        *run.glob("transcript/*"),
        run / "privacy.json",
    )
    about = json.loads((run / "run.json").read_text())
    return {str(f.relative_to(run)): f.read_bytes() for f in files if f.exists()} | {
        k: about[k] for k in ("status", "utility", "privacy")
    }


def _summaries(folder: Path) -> list[str]:
    return [str(path.relative_to(folder)) for path in folder.glob(f"{RUN}/attacks/*/summary.json")]


def _partial(folder: Path) -> list[str]:
    """Marked as complete, and not as they are without a limit: each number of photos is a result of its own."""
    whole = _found(undisturbed("attack"))
    return [name for name in _summaries(folder) if _found(folder)[name] != whole[name]]


def _found(folder: Path) -> dict[str, Any]:
    """What an attack found, but for the time it took."""
    summaries = {name: json.loads((folder / name).read_text()) | {"seconds": 0} for name in _summaries(folder)}
    tensors = folder.glob(f"{RUN}/attacks/*/*.safetensors")
    return summaries | {str(path.relative_to(folder)): path.read_bytes() for path in tensors}


def _pages(folder: Path) -> list[str]:
    return [path.name for path in folder.glob(f"{PAGE}/report.html")]


def _tables(folder: Path) -> dict[str, Any]:
    return {path.name: path.read_bytes() for path in folder.glob(f"{PAGE}/results.*")} | {"page": _pages(folder)}


ATTACK = (
    "attack", RUN, "-a", "gradient-inversion", "-t", "server", "--targets", "1", "--set", "gradient-inversion.iterations=10",
    "--set", "gradient-inversion.compiled=false", "--json",
)  # fmt: skip
REPORT = ("report", RUN, "-o", PAGE, "--json")
WORKS = (
    _train("train"),
    _train("train dp-sgd", *HOOKS),
    Work("attack", ATTACK, _a_run, lambda _: ATTACK, _partial, _found),
    Work("report", REPORT, _an_attacked_run, lambda _: REPORT, _pages, _tables),
)
LIMITS: tuple[Case, ...] = tuple(Case(f"{size} MiB of room", partial(played, size)) for size in SIZES)
