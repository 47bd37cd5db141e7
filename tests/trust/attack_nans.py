"""NaN and infinity in the search of an attack: in its loss, its gradient or its variable.

The start that failed ends there and is counted (`failed` of the answer); the answer is what the other starts found, and what is
found of other photos is what it would have been.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks import feature_inversion, gradient_inversion
from fedgc.files import read_json, read_tensors
from tests.trust.cases import command, shown
from tests.trust.undisturbed import copied, trial

CASE = ("fedgc", "none")
TARGETS, SICK, ITERATIONS, STARTS = 2, 0, 6, 2  # photos; the one whose search fails; of a search
QUICK = (f"iterations={ITERATIONS}", f"restarts={STARTS}")
FACES = ("components=10", "copies=1", "polish=0")
ATTACKS = {
    "cascade": ("gradient-inversion", (*QUICK, *FACES)),
    "inverting-gradients": ("gradient-inversion", ("method=inverting-gradients", *QUICK)),
    "gradinversion": ("gradient-inversion", ("method=gradinversion", *QUICK)),
    "dlg": ("gradient-inversion", ("method=dlg", *QUICK)),
    "feature-inversion": ("feature-inversion", QUICK),
}  # fmt: skip


@dataclass(frozen=True)
class Search:
    """attack: of `ATTACKS`; where: loss, gradient or variable; all: whether every start fails."""

    attack: str
    where: str
    value: float
    all: bool = False

    def once(self, images: Tensor) -> Tensor:
        """Images that are themselves, and whose gradient is not finite."""
        images.register_hook(lambda gradient: gradient * self.value)
        return images


class Spoilt:
    """A prior whose images, after some more of them, are not finite: as if the variable were not."""

    def __init__(self, prior: Any, spoilt: Callable[[Tensor], Tensor]) -> None:
        self._prior, self._spoilt = prior, spoilt

    def images(self, parameters: Tensor) -> Tensor:
        images = self._prior.images(parameters)
        with torch.no_grad():
            parameters.copy_(self._spoilt(parameters))
        return images

    def __getattr__(self, name: str) -> Any:
        return getattr(self._prior, name)


def spoil(search: Search, module: Any) -> None:
    """In a child: spoil the second evaluation of the first photo's search, or all of them."""
    real, seen = module.match, 0
    os.cpu_count = lambda: 1  # type: ignore[assignment]

    def match(distance: Any, prior: Any, *more: Any) -> Any:
        nonlocal seen
        seen, calls = seen + 1, 0
        if seen - 1 != SICK:
            return real(distance, prior, *more)

        def now() -> bool:
            nonlocal calls
            calls += 1
            return search.all or calls == 2

        def measured(images: Tensor) -> Tensor:
            bad = now()
            found = distance(
                search.once(images) if bad and search.where == "gradient" and images.requires_grad else images
            )
            return found * search.value if bad and search.where == "loss" else found

        if search.where == "variable":
            spoilt = lambda z: torch.full_like(z, search.value) if now() else z  # noqa: E731
            return real(distance, Spoilt(prior, spoilt), *more)
        return real(measured, prior, *more)

    module.match = match


def played(attack: str, run: Path, hook: Callable[[], None] | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The answer of an attack from the server's seat, and what it found. Raises AssertionError where it has none."""
    name, settings = ATTACKS[attack]
    flags = [part for setting in settings for part in ("--set", f"{name}.{setting}")]
    words = ("attack", run, "-a", name, "-t", "server", "--targets", TARGETS, *flags)
    outcome = command(*words, hook=hook)
    assert outcome.code == 0, f"exit code {outcome.code}: {shown(outcome.err)}"
    entry = next(path for path in sorted(run.glob("attacks/*/summary.json")) if read_json(path)["batch_size"] == 1)
    return read_json(entry), read_tensors(entry.parent / "reconstructions.safetensors")[0]


@cache
def undisturbed(attack: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    folder = trial(CASE).root / f"attacked-{attack}"
    return played(attack, copied(CASE, folder), partial(setattr, os, "cpu_count", lambda: 1))


def searched(search: Search, folder: Path) -> str | None:
    module = feature_inversion if search.attack == "feature-inversion" else gradient_inversion
    before, whole = undisturbed(search.attack)
    try:
        entry, found = played(search.attack, copied(CASE, folder / "run"), partial(spoil, search, module))
    except AssertionError as wrong:
        return str(wrong)
    expected = before["failed"] + (STARTS if search.all else 1)
    if entry["failed"] != expected or entry["targets"] != before["targets"]:
        return f"failed {entry['failed']} of {entry['targets']} targets, not {expected} of {before['targets']}"
    images, others = (torch.cat([t for name, t in x.items() if name.endswith("/images")]) for x in (found, whole))
    if not bool(images.isfinite().all()):
        return "an image is not finite"
    other = [place for place in range(len(images)) if place != SICK]
    return None if torch.equal(images[other], others[other]) else "what was found of other photos has changed"


def _searches() -> dict[str, Search]:
    found = {}
    for attack in ATTACKS:
        for number, where in enumerate(("loss", "gradient", "variable")):
            word, value = (("NaN", float("nan")), ("infinity", float("inf")))[(number + len(found)) % 2]
            found[f"{word} in the {where} of a search: {attack}"] = Search(attack, where, value)
    found["NaN in the loss of every search: cascade"] = Search("cascade", "loss", float("nan"), all=True)
    return found


SEARCHES = _searches()
