"""Data parallel training of each client over the processes that torchrun starts, one a GPU: process 0 plays the federation, and
all share the batches of whichever client trains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from fedgc.config import Config, read_toml, validated
from fedgc.errors import UsageError
from fedgc.federation import Federation
from fedgc.pipeline.setting import Setting, federation, prepare
from fedgc.pipeline.watch import Watch, silent
from fedgc.team import Team
from fedgc.uploads import Answers, Ask, Asked


def processes() -> int:
    """How many torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def crew(config: Config | None, out: Path) -> Iterator[bool]:
    """Whether this process plays the federation, which others help with until the block is left. True without torchrun.

    config: None for that of the run in ``out``, which is to go on.
    """
    if processes() == 1:
        yield True
        return
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if cuda else "gloo")
    first = dist.get_rank() == 0
    try:
        if not first:
            help_out(config or validated(read_toml(out / "config.toml"), str(out / "config.toml")))
        yield first
        if first:
            _tell(None)
    finally:
        dist.destroy_process_group()


class DataParallel:
    """Process 0's engine; the others are in `help_out` meanwhile."""

    here = True

    def prepare(self, config: Config, watch: Watch) -> Setting:
        return prepare(config, watch)

    @contextmanager
    def reached(self, config: Config, parties: Federation) -> Iterator[Ask | None]:
        require_shareable(config, parties)
        parties.team = Team()

        def ask(orders: Asked) -> Answers:
            for party, order, home in orders:
                _tell((party.client, _to(order, "cpu"), _to(home, "cpu"), parties.noise_key))
                yield party, parties.answer(party, order, home)

        yield ask
        parties.team = None


def help_out(config: Config) -> None:
    """Share the batches of every client that process 0 names, until it is done."""
    parties = federation(prepare(config, silent))
    require_shareable(config, parties)
    parties.team = Team()
    while (work := _told()) is not None:
        client, order, home, parties.noise_key = work
        parties.answer(parties.parties[client], _to(order, parties.device), _to(home, parties.device))


def require_shareable(config: Config, parties: Federation) -> None:
    """Raises UsageError where a batch cannot be split: gradients of single photos, statistics of a whole batch."""
    if parties.defense.per_photo or config.model.norm == "batch":
        what = f"defense {parties.defense.name}" if parties.defense.per_photo else "model.norm = batch"
        raise UsageError(
            f"{what} looks at whole batches and cannot be trained by several processes: start one without torchrun"
        )
    if config.engine != "inprocess":
        raise UsageError("engine = flower has processes of its own: start one without torchrun")


def _to(x: Any, device: torch.device | str) -> Any:
    """A copy of an order or of what is kept at home, its tensors on that device."""
    move = lambda t: t.to(device) if isinstance(t, torch.Tensor) else t  # noqa: E731
    changes = {name: move(value) for name, value in vars(x).items()}
    if "backbone" in changes:
        changes["backbone"] = {name: t.to(device) for name, t in x.backbone.items()}
    return replace(x, **changes)


def _tell(work: object) -> None:
    dist.broadcast_object_list([work], src=0)


def _told() -> Any:
    work = [None]
    dist.broadcast_object_list(work, src=0)
    return work[0]
