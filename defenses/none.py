"""No defense: the baseline that every other figure stands beside."""

from __future__ import annotations

from typing import ClassVar, Literal

from fedgc.doors import Defense


class NoDefense(Defense):
    name: Literal["none"] = "none"
    summary: ClassVar[str] = "nothing; the baseline"
