"""Alignment once and for all: a folder of photos becomes a folder of face images.

Every photo is done once. Killed at any instant and run again, the work goes on where it stopped and ends with the same
bytes; files of the source that changed meanwhile are done again.
"""

from __future__ import annotations

import hashlib
import io
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from fedgc import __version__
from fedgc.data.align import Align, aligned, check_alignment, shorter_side_needed
from fedgc.data.folder import Folder, Skipped, UnusableImageError, by_reason, decode, read_bytes, scan
from fedgc.data.prepared import MANIFEST, Entry, PreparedFolder, distinct, document
from fedgc.errors import DataError, UsageError, WorkFailedError
from fedgc.files import PRIVATE, make_folder, write_bytes

Stages = Callable[[str, int, int], None]

FILES_PER_WORKER = 16  # fewer are not worth the seconds that another process takes to start


@dataclass(frozen=True)
class Recipe:
    """How a photo becomes a face image; ``original`` keeps the photo as it is, upright and as RGB."""

    align: Align | Literal["original"]
    size: int | None = None
    center_fraction: float | None = None

    def __call__(self, data: bytes) -> Image.Image:
        """Raises UnusableImageError where there is no such image."""
        if self.align == "original" or self.size is None:
            return decode(data)
        fraction = self.center_fraction or 1.0
        photo = decode(data, shorter_side=shorter_side_needed(self.align, self.size, fraction))
        return Image.fromarray(np.moveaxis(aligned(photo, self.align, self.size, fraction), 0, -1))


@dataclass(frozen=True)
class Task:
    """One photo to do. file, output: relative to the roots of source and destination."""

    file: str
    output: str
    root: Path
    destination: Path
    recipe: Recipe

    def __call__(self) -> Entry:
        output = self.destination / self.output
        digest = None
        try:
            data = read_bytes(self.root / self.file)
            digest = hashlib.sha256(data).hexdigest()
            png = io.BytesIO()
            self.recipe(data).save(png, "PNG")
        except UnusableImageError as problem:
            output.unlink(missing_ok=True)
            return Entry(self.file, digest, None, str(problem))
        make_folder(output.parent, private=True)
        write_bytes(output, png.getvalue(), PRIVATE)
        return Entry(self.file, digest, self.output, None)


def prepare(
    source: str,
    destination: Path,
    *,
    align: Align = "mtcnn",
    size: int = 112,
    center_fraction: float = 0.52,
    jobs: int | None = None,
    progress: Stages = lambda stage, done, total: None,
) -> dict[str, Any]:
    """Align the photos of ``source`` into ``destination``, a folder with one sub-folder of PNGs a person.

    The PNGs are ``size`` pixels square; ``center_fraction`` matters to ``align = center`` alone. ``jobs``: processes
    (default: one a core). Returns the document of ``data prepare --json``.

    Raises:
        DataError: the source cannot be used, no photo of it can, or the destination holds something else.
        WorkFailedError: something could not be written, or a process died.
    """
    check_alignment(align, size, center_fraction)
    recipe = Recipe(align, size, center_fraction if align == "center" else None)
    folder = scan(source)
    return fill(folder, str(folder.root), destination, recipe, jobs=jobs, progress=progress)


def fill(
    folder: Folder,
    origin: str,
    destination: Path,
    recipe: Recipe,
    *,
    terms: str | None = None,
    jobs: int | None = None,
    progress: Stages,
) -> dict[str, Any]:
    """As :func:`prepare`, of a folder that was scanned; ``origin`` names the source in the manifest."""
    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs {jobs}: choose 1 or more")
    _refuse_overlap(folder.root, destination)
    clock = time.monotonic()
    settings = {"align": recipe.align, "size": recipe.size, "center_fraction": recipe.center_fraction}
    place = PreparedFolder(destination, {"source": origin, "settings": settings, "terms": terms})
    with place.locked():
        tasks = _tasks(folder, destination, recipe)
        recorded = place.entries()
        known = {e.output for e in recorded.values() if e.output} | {task.output for task in tasks.values()}
        place.refuse_strangers(known)
        entries = {e.file: e for e in _still_valid(tasks, recorded, progress)}
        todo = [task for file, task in tasks.items() if file not in entries]
        reused = len(entries)
        if todo or not place.complete or set(recorded) != set(entries):
            place.reopen(list(entries.values()))
            with place.recording() as record, closing(_results(todo, jobs or os.cpu_count() or 1)) as results:
                progress("preparing faces", 0, len(todo))
                for done, entry in enumerate(results, 1):
                    record(entry)
                    entries[entry.file] = entry
                    progress("preparing faces", done, len(todo))
        made = document(entries.values(), folder.skipped)
        place.close({"tool": f"fedgc-priv {__version__}", **made})
    dropped = [Skipped(str(e["file"]), str(e["reason"])) for e in made["dropped"]]
    if not made["kept"]:
        reasons = "; ".join(f"{about['count']} x {why}" for why, about in by_reason(dropped, 0).items())
        raise DataError(
            f"no photo of {origin} could be kept ({reasons}); see {place.manifest}, or choose another --align"
        )
    return {
        "destination": str(destination), "source": origin, "settings": settings, "terms": terms, **made["counts"],
        "reused": reused, "reasons": by_reason(dropped), "manifest": str(destination / MANIFEST),
        "fingerprint": made["fingerprint"], "seconds": round(time.monotonic() - clock, 2),
    }  # fmt: skip


def _refuse_overlap(root: Path, destination: Path) -> None:
    place = destination.expanduser().resolve()
    if place.is_relative_to(root) or root.is_relative_to(place):
        raise DataError(f"{destination} and the source {root} must not lie inside one another: choose another folder")


def _tasks(folder: Folder, destination: Path, recipe: Recipe) -> dict[str, Task]:
    people = distinct(person.name for person in folder.people)
    tasks = {}
    for person in folder.people:
        for name, output in distinct(person.files, ".png").items():
            file = f"{person.name}/{name}"
            tasks[file] = Task(file, f"{people[person.name]}/{output}", folder.root, destination, recipe)
    return tasks


def _still_valid(tasks: dict[str, Task], recorded: dict[str, Entry], progress: Stages) -> Iterator[Entry]:
    """The entries whose source has the bytes it had, and whose output is where it should be."""
    for done, entry in enumerate(recorded.values(), 1):
        task = tasks.get(entry.file)
        if task is not None and _same_bytes(task, entry):
            there = entry.output == task.output and (task.destination / task.output).is_file()
            if there or entry.reason is not None:
                yield entry
        progress("checking what is done", done, len(recorded))


def _same_bytes(task: Task, entry: Entry) -> bool:
    try:
        return hashlib.sha256(read_bytes(task.root / task.file)).hexdigest() == entry.sha256
    except UnusableImageError:
        return False


def _results(tasks: Sequence[Task], jobs: int) -> Generator[Entry]:
    """Each task's entry, in the order in which they are done."""
    jobs = min(jobs, math.ceil(len(tasks) / FILES_PER_WORKER))
    if jobs <= 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # as in a worker: the same bytes whatever the number of jobs
        try:
            yield from (task() for task in tasks)
        finally:
            torch.set_num_threads(threads)
        return
    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn"), initializer=_start_worker)
    try:
        rest = iter(tasks)
        waiting: set[Future[Entry]] = {pool.submit(task) for task in islice(rest, 4 * jobs)}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            waiting |= {pool.submit(task) for task in islice(rest, len(done))}
            yield from (future.result() for future in done)
    except BrokenProcessPool:
        raise WorkFailedError("a worker process died (out of memory?): run it again with fewer --jobs") from None
    except BaseException:
        for process in list((pool._processes or {}).values()):
            process.terminate()
        raise
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _start_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides when to stop
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that was killed tells nobody, and its workers would wait for ever."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
