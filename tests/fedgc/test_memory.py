"""What memory there is, what a run under dp-sgd needs of it, and how its end is told from other errors."""

from __future__ import annotations

import errno
import math
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from defenses.dp_sgd import DPSGD, EXCEEDED
from fedgc import limits
from fedgc.doors import ClientPlan
from fedgc.errors import UsageError, WorkFailedError
from fedgc.federation import Federation
from fedgc.limits import available, explained, raise_if_short, ran_out, shown

HOOKS = DPSGD(noise_multiplier=1.0, delta=1e-2, mode="hooks")
TORCH = (
    "[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4194304 bytes. Error code 12 (Cannot allocate memory)"
)
GONE = "No such file or directory"


# -- what there is


def test_memory_of_the_machine_counts_swap(tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 900 kB\nMemAvailable:     300 kB\nSwapFree:   20 kB\n")
    assert limits._machine(tmp_path / "meminfo") == 320 * 1024
    assert limits._machine(tmp_path / "none") is None


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("inside", [True, False])
def test_every_control_group_upwards_counts(tmp_path: Path, version: int, inside: bool) -> None:
    """inside: a container, where the group's own path is that of the host and leads nowhere."""
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    top = tmp_path / ("memory" if version == 1 else "")
    (top / "a" / "b").mkdir(parents=True)
    for folder, limit, used, cache in (
        (top, "1000", 300, 50),
        (top / "a", "max", 200, 0),
        (top / "a/b", "500", 100, 7),
    ):
        for name, text in zip((*names[:2], "memory.stat"), (limit, used, f"{names[2]} {cache}\n"), strict=True):
            (folder / name).write_text(f"{text}\n" if name != "memory.stat" else str(text))
    path = "/nowhere/here" if inside else "/a/b"
    (tmp_path / "mine").write_text(f"4:memory:{path}\n5:cpu:/x\n" if version == 1 else f"0::{path}\n")
    assert list(limits._groups(tmp_path, tmp_path / "mine")) == ([750] if inside else [407, 750])


def test_the_least_limit_counts_and_none_is_no_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, found in (("_machine", 500), ("_address_space", 300)):
        monkeypatch.setattr(limits, name, lambda found=found: found)
    monkeypatch.setattr(limits, "_groups", lambda: iter([400, -7]))
    assert available() == 0
    monkeypatch.setattr(limits, "_groups", lambda: iter([400]))
    assert available() == 300
    for name in ("_machine", "_address_space"):
        monkeypatch.setattr(limits, name, lambda: None)
    monkeypatch.setattr(limits, "_groups", lambda: iter([]))
    assert available() is None


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says how much of it is in use")
def test_what_is_left_of_the_address_space(monkeypatch: pytest.MonkeyPatch) -> None:
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (held + 100 * 2**20, resource.RLIM_INFINITY))
    left = available()
    assert left is not None
    assert abs(left - 100 * 2**20) < 20 * 2**20
    monkeypatch.setattr(limits.resource, "getrlimit", lambda _: (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert limits._address_space() is None
    assert available() is None or available() > 2**20  # type: ignore[operator]


# -- what is needed


def test_the_largest_batch_is_exceeded_as_seldom_as_said() -> None:
    draw = np.random.default_rng(0)
    for images, batch, steps in ((400, 32, 100), (5000, 64, 300), (40, 32, 50), (2000, 4, 100)):
        largest = HOOKS.largest_batch(ClientPlan(0, images, batch, steps))
        assert batch < largest <= images
        exceeded = (draw.binomial(images, batch / images, (2000, steps)) > largest).any(axis=1).mean()
        assert exceeded <= EXCEEDED
        assert largest <= batch + 6 * math.sqrt(batch) + 6  # and no more than is plausible


def test_the_largest_batch_of_people_counts_their_photos() -> None:
    plan = ClientPlan(0, 60, 12, 10, torch.arange(20).repeat_interleave(3))
    people = DPSGD(noise_multiplier=1.0, delta=1e-2, unit="identity", photos_per_person=4)
    odds, spread = math.log(1000), 20 * 0.15 * 0.85
    margin = odds / 3 + math.sqrt(odds**2 / 9 + 2 * odds * spread)
    assert people.largest_batch(plan) == 3 * min(20, math.ceil(3 + margin))
    everybody = people.model_copy(update={"photos_per_person": 2})
    assert everybody.largest_batch(ClientPlan(0, 60, 60, 10, plan.people)) == 2 * 20


def test_gradients_that_do_not_fit_are_refused_with_figures(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = federation(defense=HOOKS, batch_size=8)
    need, photos, client = max(fed._photo_gradients(p) for p in fed.parties)
    backbone = [p.numel() for p in fed.backbone.parameters()]
    rows = [len(fed.visible_rows(p)) * fed.spec.embedding_size for p in fed.parties]
    assert photos == fed.defense.largest_batch(fed.plan(fed.parties[client]))
    assert need == 4 * photos * (sum(backbone) + rows[client] + max(*backbone, rows[client]))
    monkeypatch.setattr("fedgc.client.available", lambda device: need - 1)
    with pytest.raises(
        UsageError, match=r"dp-sgd .* up to \d+ photos of client \d .* MiB of memory, and .* available"
    ) as e:
        fed.require_memory()
    assert shown(need) in str(e.value)
    assert "batch_size (now 8)" in str(e.value)
    assert "bookkeeping" in str(e.value)


def test_what_fits_and_what_forms_no_gradients_is_not_refused(
    federation: Callable[..., Federation], monkeypatch: pytest.MonkeyPatch
) -> None:
    fed = federation(defense=HOOKS)
    for there in (None, max(fed._photo_gradients(p) for p in fed.parties)[0]):
        monkeypatch.setattr("fedgc.client.available", lambda device, there=there: there)
        fed.require_memory()
    monkeypatch.setattr("fedgc.client.available", lambda device: 0)
    for mode in ("bookkeeping", "auto"):
        federation(defense=HOOKS.model_copy(update={"mode": mode})).require_memory()
    federation().require_memory()


MEASURED = """
import sys, torch
from pathlib import Path
torch.set_num_threads(1)
from defenses.dp_sgd import DPSGD
from defenses.none import NoDefense
from fedgc import heads
from fedgc.doors import ClientPlan
from fedgc.heads import CosineHead
from fedgc.models import FaceModel, build_backbone
from fedgc.types import ModelSpec

rows, photos = map(int, sys.argv[1:])
spec = ModelSpec("small", "group", 64, 32, "cosface", 0.2, 8.0)
model = FaceModel(build_backbone(spec, 0), CosineHead(rows, 64))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
def memory(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024
def step(n):
    plan = ClientPlan(0, n, n, 1, torch.arange(n))
    defense = DPSGD(noise_multiplier=1.0, mode="hooks")
    with defense.local_training(model, optimizer, iter([torch.arange(n)]), plan, None, torch.Generator()) as session:
        for index in session.batches:
            session.optimizer.zero_grad()
            heads.loss(model(torch.rand(n, 3, 32, 32)), torch.arange(n), spec).backward()
            session.optimizer.step()
step(2)
held = memory("VmRSS")
step(photos)
sizes = [p.numel() for p in model.parameters()]
print((memory("VmHWM") - held) / (4 * photos * (sum(sizes) + max(sizes))))
"""


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the peak is read where Linux puts it")
@pytest.mark.parametrize("rows", [100, 5000])
def test_the_estimate_is_below_the_peak_and_near_it(rows: int) -> None:
    root = str(Path(__file__).parent.parent.parent)
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, str(rows), "64"], capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert 1.0 <= float(done.stdout) <= 2.0


# -- its end


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(), RuntimeError(TORCH), torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("std::bad_alloc"), RuntimeError("unable to mmap 400 bytes from file <x>: Cannot allocate memory (12)"),
        RuntimeError("can't start new thread"), OSError(errno.ENOMEM, os.strerror(errno.ENOMEM), "x"),
        OSError("out of memory error when reading image file"),
        ImportError("libx.so: failed to map segment from shared object"),
    ],
    ids=repr,
)  # fmt: skip
def test_libraries_say_in_many_ways_that_memory_is_short(error: Exception) -> None:
    assert ran_out(error)
    wrapped = ValueError("reading failed")
    wrapped.__cause__ = error
    assert ran_out(wrapped)
    with pytest.raises(MemoryError):
        raise_if_short(error)


@pytest.mark.parametrize(
    "error",
    [
        None, ValueError("x"), RuntimeError("shapes differ"), OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        FileNotFoundError(errno.ENOENT, GONE, "out of memory.png"), UsageError("out of memory.png is no photo"),
        WorkFailedError("training diverged"),
    ],
    ids=repr,
)  # fmt: skip
def test_other_errors_do_not(error: Exception | None) -> None:
    assert not ran_out(error)


def test_the_line_says_what_where_and_what_next() -> None:
    try:
        shown(None)  # type: ignore[arg-type]
    except TypeError as error:
        short = RuntimeError(TORCH).with_traceback(error.__traceback__)
    said = explained(short, "train")
    assert "train ran out of memory (in fedgc.limits.shown; 4.0 MiB more were asked for)" in said
    assert "batch_size" in said
    assert "--resume" in said
    assert "repeat the command" in explained(MemoryError(), "list")
