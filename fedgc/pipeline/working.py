"""A job of attacking: what the attacker sees of each transcript, and a costly attack shared out over the cores.

A costly attack takes one victim's update at a time, in a process of its own, and what it finds is kept as soon as it is found, so
that a repeated command goes on where the last was cut off.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from fedgc.config import PROBER
from fedgc.errors import FedgcError, RunError
from fedgc.files import PRIVATE, make_folder, read_tensors, write_tensors
from fedgc.pipeline.blinding import as_clients_read
from fedgc.pipeline.processes import processes
from fedgc.rng import generator
from fedgc.runs import RunDirectory
from fedgc.threats import THREATS, Knowledge
from fedgc.types import Attack, Observation, Reconstruction

SEAT = PROBER  # the client that is curious; where one probes, it is the same
CLIENTS = ("client", "probing-client")  # seats of a client
POLL_SECONDS = 0.25
FIELDS = ("images", "labels", "scores", "embeddings", "loss", "every")
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Job:
    """One attack from one seat on one set of transcripts that share a batch size, a number of local steps and, unless evidence
    adds up, a round."""

    attack: Attack
    threat: str
    transcripts: tuple[str, ...]
    rounds: tuple[int, ...]
    batch_size: int | None
    targets: int | None
    local_steps: int = 1

    @property
    def seat(self) -> int | None:
        return SEAT if self.threat in CLIENTS else None

    def folder(self) -> str:
        about = [self.attack.model_dump(mode="json"), self.threat, self.transcripts, self.targets]
        digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
        return f"{self.attack.name}@{self.threat}-{digest}"


def observed(
    run: RunDirectory, job: Job, name: str, photos: int | None, knowledge: Knowledge
) -> tuple[Observation, int]:
    """What the attacker sees of one transcript, with no more updates than hold so many photos, and how many those hold."""
    transcript = run.load_transcript(name)
    if job.seat is not None:
        transcript = as_clients_read(run, transcript)
    return limited(THREATS[job.threat].observe(transcript, knowledge, SEAT), photos)


def limited(observation: Observation, photos: int | None) -> tuple[Observation, int]:
    """The observation with no more updates than are needed for so many photos, and how many photos that is."""
    if observation.client_updates is None:
        return observation, observation.aggregate.images if observation.aggregate else 0
    kept, count = [], 0
    for update in observation.client_updates:
        if photos is not None and count >= photos:
            break
        kept.append(update)
        count += update.images
    return replace(observation, client_updates=tuple(kept)), count


def reconstruct(run: RunDirectory, job: Job, seen: Mapping[str, Observation], tick: Tick) -> dict[str, Reconstruction]:
    """What the job's attack finds in each transcript."""
    if not job.attack.apart or any(o.client_updates is None for o in seen.values()):
        whole = enumerate(seen.items())
        return {
            name: job.attack(o, stream(run, job, name), partial(_within, tick, done, len(seen)))
            for done, (name, o) in whole
        }
    make_folder(run.path / "attacks" / job.folder() / "parts", private=True)
    parts = [(name, i) for name, o in seen.items() for i in range(len(o.client_updates or ()))]
    missing = [p for p in parts if kept(_file(run.path, job, *p)) is None]
    workers = min(os.cpu_count() or 1, len(missing))
    if workers > 1 and multiprocessing.parent_process() is None:  # a sweep's processes have the cores already
        _share_out(run.path, job, missing, workers, len(parts), tick)
    else:
        for done, (name, i) in enumerate(missing, len(parts) - len(missing)):
            part(run.path, job, name, i, partial(_within, tick, done, len(parts)), seen[name])
    found = {p: one for p in parts if (one := kept(_file(run.path, job, *p))) is not None}
    return {name: joined([one for (of, _), one in found.items() if of == name]) for name in seen}


def _file(path: Path, job: Job, name: str, number: int) -> Path:
    return path / "attacks" / job.folder() / "parts" / f"{name}-{number}.safetensors"


def _within(tick: Tick, before: int, parts: int, done: int, total: int) -> None:
    tick(before * total + done, parts * total)


def part(
    path: Path, job: Job, name: str, number: int, tick: Tick | None = None, observation: Observation | None = None
) -> None:
    """Attack the update of that number alone, with one thread and random numbers of its own, and keep what is found."""
    run = RunDirectory(path)
    if observation is None:
        observation, _ = observed(run, job, name, None, run.load_knowledge())
    assert observation.client_updates is not None
    keep_graphs()
    alone = replace(observation, client_updates=observation.client_updates[number : number + 1])
    with one_thread():
        found = job.attack(alone, stream(run, job, name, number), tick)
    tensors = {field: value for field in FIELDS if (value := getattr(found, field)) is not None}
    about = {"sources": found.sources, "iterations": found.iterations, "failed": found.failed}
    write_tensors(_file(path, job, name, number), tensors, about, PRIVATE)


def stream(run: RunDirectory, job: Job, name: str, *number: int) -> torch.Generator:
    return generator(run.about()["seed"], "attack", job.attack.name, job.threat, name, *number)


@contextmanager
def one_thread() -> Iterator[None]:
    """A second thread gains a tenth on images this small; a second attack gains all."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _share_out(path: Path, job: Job, missing: list[tuple[str, int]], workers: int, count: int, tick: Tick) -> None:
    with processes(workers) as pool:
        waiting = [pool.submit(_part_of_pool, path, job, name, i) for name, i in missing]
        seen = -1
        while not all(future.done() for future in waiting):
            time.sleep(POLL_SECONDS)
            done = sum(future.done() for future in waiting)
            if done != seen:
                tick(count - len(missing) + done, count)
                seen = done
            failed = next((e for future in waiting if future.done() and (e := future.exception())), None)
            if failed is not None:
                raise failed
    for future in waiting:
        future.result()


def keep_graphs() -> None:
    """Compiled graphs outlive a reboot, which the place where torch puts them does not everywhere."""
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(caches / "fedgc-priv" / "graphs"))


def _part_of_pool(path: Path, job: Job, name: str, number: int) -> None:
    from fedgc.pipeline.memory import keep_freed_memory

    keep_freed_memory()
    try:
        part(path, job, name, number)
    except FedgcError as error:
        raise type(error)(str(error)) from None  # without what a process cannot hand over


def kept(file: Path) -> Reconstruction | None:
    """What a part found, or None where it is missing or damaged and has to be found again."""
    if not file.exists():
        return None
    try:
        tensors, about = read_tensors(file)
        return Reconstruction(
            tuple(about["sources"]), **tensors, iterations=about["iterations"], failed=about["failed"]
        )
    except (RunError, TypeError, KeyError):
        return None


def joined(parts: list[Reconstruction]) -> Reconstruction:
    """One reconstruction of several; a field that one part lacks is lacking."""

    def together(field: str) -> torch.Tensor | None:
        values = [getattr(p, field) for p in parts]
        return None if any(v is None for v in values) else torch.cat(values, dim=1 if field == "every" else 0)

    return Reconstruction(
        tuple(s for p in parts for s in p.sources), **{field: together(field) for field in FIELDS},
        iterations=sum(p.iterations for p in parts), failed=sum(p.failed for p in parts),
    )  # fmt: skip
