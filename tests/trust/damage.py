"""Damaged state files: bit flips, cuts, blocks of zeros, and files of other rounds in their place (reliability R5)."""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from fedgc.rounds import Rounds
from fedgc.types import State

SHARES = {"bit flip": 400, "cut": 300, "zeros": 200, "other round": 100}  # of 1,000


def flipped(data: bytes, draw: random.Random) -> bytes:
    place = draw.randrange(len(data))
    return data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :]


def cut(data: bytes, draw: random.Random) -> bytes:
    """Without its end, and more of it than white space."""
    return data[: draw.randrange(len(data.rstrip()))]


def zeroed(data: bytes, draw: random.Random) -> bytes:
    """A block that held something else than zeros."""
    while True:
        size = min(len(data), draw.choice((512, 4096)))
        start = draw.randrange(len(data) - size + 1)
        if any(data[start : start + size]):
            return data[:start] + bytes(size) + data[start + size :]


KINDS: dict[str, Callable[[bytes, random.Random], bytes]] = {"bit flip": flipped, "cut": cut, "zeros": zeroed}


def same(a: State | None, b: State | None) -> bool:
    if a is None or b is None:
        return a is b
    return (
        a.round == b.round
        and torch.equal(a.rows, b.rows)
        and all(torch.equal(x, b.backbone[n]) for n, x in a.backbone.items())
    )


def caught(run: Path, folder: Path, trials: int, seed: int = 0) -> tuple[Counter[str], list[str]]:
    """Damage the last state of a copy of a run, in turn; how much of each kind is noticed before use, and what was not.

    Noticed means: the state before it is loaded in its place.
    """
    copy = folder / "run"
    shutil.copytree(run, copy)
    rounds, draw = Rounds(copy), random.Random(seed)
    last = rounds.last_round()
    before = rounds.load_state(last - 1)
    assert before is not None
    files = [copy / "state" / f"round-{last:04d}.{kind}" for kind in ("safetensors", "json")]
    intact = {file: file.read_bytes() for file in files}
    others = {file: file.with_name(file.name.replace(f"{last:04d}", f"{last - 1:04d}")).read_bytes() for file in files}
    found, missed = Counter[str](), []
    for kind, share in SHARES.items():
        for _ in range(round(trials * share / 1000)):
            file = draw.choice(files)
            bad = others[file] if kind == "other round" else KINDS[kind](intact[file], draw)
            file.write_bytes(bad)
            if same(rounds.load_state(), before):
                found[kind] += 1
            else:
                missed.append(f"{kind} of {file.name}")
            file.write_bytes(intact[file])
    return found, missed
