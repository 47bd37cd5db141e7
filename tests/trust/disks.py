"""A disk that is full, read-only or failing, at each site where something is written.

Handled means: exit code 1 and one line that names the file and what the system said; nothing half-written under any name; all
that was complete before is as it was; and the same command works once the disk does, for a run with the bytes of one that nobody
disturbed. Most faults are pretended, at the write of one file; where the system can be made to refuse by itself, without root's
help, it is (a limit on the size of files, a folder without permission to write).
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from fedgc import files, foreign
from fedgc.data import prepared
from fedgc.errors import WorkFailedError
from fedgc.heads import CosineHead
from fedgc.models import FaceModel, build_backbone
from tests.trust.cases import Case, command, refused, shown
from tests.trust.faulty import FAULTS, Faulty, readable
from tests.trust.folders import people
from tests.trust.undisturbed import ROUNDS, config_of, copied, first_of, in_folder, trial

CASE = ("fedgc", "dp-sgd")  # writes everything that a run can write
LAST = f"round-{ROUNDS:04d}"
Fault = tuple[str, int]  # a function of the module os that fails, and how
TRAINING = (
    "config.toml", "attacker/knowledge.safetensors", "run.json", "transcript/round-0001.safetensors", "privacy.json",
    "checkpoints/round-0002.safetensors", "state/round-0002.safetensors", f"state/{LAST}.json", "metrics.jsonl",
    "utility-draws.safetensors",
)  # fmt: skip
ATTACK = ("attack", "run", "-a", "identity-linkage", "-t", "server")
PREPARE = ("data", "prepare", "faces", "out", "--align", "none", "--size", "64", "--jobs", "1")


def held(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"}


def note_writes(log: Path) -> None:
    """In a child: every file that is written, in this order, one a line."""
    real = os.replace

    def replace(old: Any, new: Any) -> None:
        with log.open("a") as file:
            file.write(f"{new}\n")
        real(old, new)

    files.os = _With(os, replace)  # type: ignore[assignment]


class _With:
    def __init__(self, module: Any, replace: Callable[[Any, Any], None]) -> None:
        self.module, self.replace = module, replace

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def place_of(name: str, written: Sequence[str]) -> int:
    """How many files are written before the first whose path ends so."""
    return next(at for at, path in enumerate(written) if path.endswith(name))


def writes_of(words: Sequence[object], folder: Path) -> list[str]:
    """Every file that the command writes when nothing fails."""
    log = folder.parent / f"{folder.name}.log"
    outcome = command(*words, inside=folder, hook=partial(note_writes, log))
    written = log.read_text().splitlines()
    log.unlink()
    assert outcome.code == 0, outcome.err
    return written


@cache
def writes_of_training() -> list[str]:
    whole = trial(CASE)
    return writes_of(whole.command(whole.root / "look"), whole.root)


def pretend(fault: Fault, place: int) -> None:
    """In a child: the write of that number fails, and all after it."""
    call, number = fault
    files.os = Faulty(call, 2 * place if call == "fsync" else place, number)  # type: ignore[assignment]


def limit_size(most: int) -> None:
    """In a child: the system lets no file grow beyond that."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))


def failed(words: Sequence[object], names: Sequence[str], folder: Path, **how: Any) -> str | None:
    """A complaint unless the command fails as it should, and leaves all that was there."""
    before = held(folder)
    complaint = refused(command(*words, inside=folder, **how), (1,), names)
    after = held(folder)
    changed = [path.name for path, data in before.items() if after.get(path) != data]
    half = [path.name for path in after if files.is_temporary(path)]
    empty = [path.name for path, data in after.items() if not data]
    return complaint or next((f"half-written, changed or empty: {name}" for name in (*half, *changed, *empty)), None)


def works(words: Sequence[object], folder: Path) -> str | None:
    outcome = command(*words, inside=folder)
    return None if outcome.code == 0 else f"and then: exit code {outcome.code}: {shown(outcome.err)}"


# -- a run


def trained(names: Sequence[str], folder: Path, **how: Any) -> str | None:
    """Training fails, what was complete is readable, and going on ends with the bytes of the undisturbed run."""
    ours, out = in_folder(CASE, folder), folder / "run"
    complaint = refused(command(*ours.command(out), **how), (1,), names)
    if complaint:
        return complaint
    (folder / "run").chmod(0o700)
    try:
        readable(out)
    except AssertionError as unreadable:
        return f"what was complete cannot be read: {unreadable}"
    if half := [path.name for path in out.rglob("*") if files.is_temporary(path)]:
        return f"left {half[0]}"
    return works(ours.go_on(out), folder) or ", ".join(ours.compared(out)[:6]) or None


def failing_run(name: str, fault: Fault, folder: Path) -> str | None:
    place = place_of(name, writes_of_training())
    return trained([os.strerror(fault[1]), name], folder, hook=partial(pretend, fault, place))


def full_run(folder: Path) -> str | None:
    """The system itself refuses to write more of the first round's state."""
    state = trial(CASE).reference / "state" / "round-0001.safetensors"
    how = partial(limit_size, state.stat().st_size - 1)
    return trained([os.strerror(errno.EFBIG), str(folder / "run")], folder, hook=how)


def forbidden_run(folder: Path) -> str | None:
    (folder / "run").mkdir()
    (folder / "run").chmod(0o500)
    return trained([os.strerror(errno.EACCES), str(folder / "run")], folder, powerless=True)


# -- other commands


def attacked(name: str, fault: Fault, folder: Path) -> str | None:
    """An answer that is there already stands; one that was cut off is not taken for complete."""
    copied(CASE, folder / "look" / "run")
    place = place_of(name, writes_of(ATTACK, folder / "look"))
    copied(CASE, folder / "run")
    return first_of(
        lambda: works((*ATTACK[:3], "label-inference", "-t", "server"), folder),
        lambda: failed(ATTACK, [os.strerror(fault[1]), name], folder, hook=partial(pretend, fault, place)),
        lambda: "it counts as complete" if list((folder / "run").rglob(f"{ATTACK[3]}*/summary.json")) else None,
        lambda: works(("report", "run", "-o", "page"), folder),
        lambda: works(ATTACK, folder),
    )


def reported(folder: Path) -> str | None:
    """Over an earlier page, which a limit on the size of files does not let be written again."""
    copied(CASE, folder / "run")
    words = ("report", "run", "-o", "page")
    return first_of(
        lambda: works(words, folder),
        lambda: failed(words, [os.strerror(errno.EFBIG), "page"], folder, hook=partial(limit_size, 2000)),
        lambda: works(words, folder),
    )


def swept(fault: Fault, folder: Path) -> str | None:
    (folder / "grid.toml").write_text('[data]\nsource = "synthetic:24x6"\nimage_size = 32\n[federation]\nrounds = 1\n'
                                      'clients = 2\n[record]\nvictims = 0\n[sweep]\nattacks = ["identity-linkage"]\n'
                                      'threats = ["server"]\n')  # fmt: skip
    words = ("sweep", "grid.toml", "--out", "grid", "--over", "seed=1")
    fails = partial(failed, words, [os.strerror(fault[1]), "sweep.json"], folder, hook=partial(pretend, fault, 0))
    return first_of(fails, lambda: works(words, folder))


def faces_prepared(names: Sequence[str], hook: Callable[[], object], folder: Path) -> str | None:
    people(folder / "faces")
    return first_of(lambda: failed(PREPARE, names, folder, hook=hook), lambda: works(PREPARE, folder))


def full_journal() -> None:
    """In a child: a line of the journal does not fit on the disk any more, after the first."""

    class Full:
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self.file, self.left = open(*arguments, **named), 1  # noqa: SIM115

        def write(self, text: str) -> None:
            self.left -= 1
            self.file.write(text if self.left >= 0 else text[: len(text) // 2])
            if self.left < 0:
                self.file.flush()
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    prepared.open = Full  # type: ignore[attr-defined]


def evaluated(folder: Path) -> str | None:
    """Nothing is written, and so nothing fails."""
    copied(CASE, folder / "run")
    before = held(folder)
    outcome = command("evaluate", "run", inside=folder, hook=partial(pretend, ("fdopen", errno.EROFS), 0))
    if outcome.code:
        return f"exit code {outcome.code}: {shown(outcome.err)}"
    return None if held(folder) == before else "something was written"


def exported(fault: Fault, folder: Path) -> str | None:
    """An update for a bare file, over an earlier one."""
    spec = config_of(CASE).spec()
    before = FaceModel(build_backbone(spec, 0), CosineHead(3, spec.embedding_size)).state_dict()
    out = folder / "update.safetensors"
    save = lambda by: foreign.save_update(  # noqa: E731
        out, before, {n: t + by if t.is_floating_point() else t for n, t in before.items()}, spec, lr=0.1, batch_size=1
    )
    save(0.5)
    held_before = held(folder)
    with patch.object(files, "os", Faulty(fault[0], 0, fault[1])):
        try:
            save(0.25)
        except WorkFailedError as error:
            if str(out) not in str(error) or os.strerror(fault[1]) not in str(error):
                return f"says {shown(str(error))}"
        else:
            return "it was taken for written"
    if held(folder) != held_before:
        return "what was there has changed"
    save(0.25)
    return None if torch.equal(*_heads(out, before)) else "the second is not what it should be"


def _heads(out: Path, before: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return files.read_tensors(out)[0]["after/head.weight"], before["head.weight"] + 0.25


def _cases() -> Iterator[Case]:
    for number, name in enumerate(TRAINING):
        fault = FAULTS[number % len(FAULTS)]
        yield Case(f"train: {fault[0]} of {name}: {errno.errorcode[fault[1]]}", partial(failing_run, name, fault))
    yield Case("train: a limit on the size of files", full_run)
    yield Case("train: a folder without permission to write", forbidden_run)
    for name, fault in (("reconstructions.safetensors", FAULTS[0]), ("summary.json", FAULTS[1])):
        yield Case(f"attack: {fault[0]} of {name}: {errno.errorcode[fault[1]]}", partial(attacked, name, fault))
    yield Case("report: a limit on the size of files", reported)
    yield Case("sweep: replace of sweep.json: ENOSPC", partial(swept, FAULTS[2]))
    sizes = partial(faces_prepared, [os.strerror(errno.EFBIG), ".png"], partial(limit_size, 1000))
    yield Case("data prepare: a limit on the size of files", sizes)
    lines = partial(faces_prepared, [os.strerror(errno.ENOSPC), str(prepared.JOURNAL)], full_journal)
    yield Case("data prepare: write of the journal: ENOSPC", lines)
    yield Case("evaluate: a disk that nothing can be written to", evaluated)
    yield Case("update export: fsync: EIO", partial(exported, FAULTS[1]))


DISKS = tuple(_cases())
