"""How a stage tells its caller how far it is: one callable, so that the stages know no user interface."""

from __future__ import annotations

from typing import Protocol


class Watch(Protocol):
    def __call__(self, stage: str, done: int, total: int, note: str = "") -> None: ...


def silent(stage: str, done: int, total: int, note: str = "") -> None:
    pass
