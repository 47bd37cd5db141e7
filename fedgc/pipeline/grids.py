"""A grid of configurations: from a file, its [sweep] table, and axes KEY=V1,V2,... of the command line."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedgc.config import SWEEP, Config, environment_settings, parse_value, put, read_toml, validated
from fedgc.errors import UsageError
from fedgc.pipeline.entries import make_attack, one_of
from fedgc.threats import THREATS

MOST_CELLS = 10_000


class Plan(BaseModel):
    """The [sweep] table. over: values of each axis by its key; attacks and threats: which, all where empty; targets: photos for a
    costly attack; settings: of attacks, as `attack --set` takes them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    over: dict[str, list[Any]] = Field(default_factory=dict)
    seeds: int = Field(default=1, ge=1)
    attacks: tuple[str, ...] = ()
    threats: tuple[str, ...] = ()
    targets: int | None = Field(default=None, ge=1)
    settings: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cell:
    """One configuration of a grid, and what attacks it. attacks, threats: all where empty; targets: photos for a costly one."""

    name: str
    tree: Mapping[str, Any]
    attack_settings: tuple[str, ...] = ()
    targets: int | None = None
    attacks: tuple[str, ...] = ()
    threats: tuple[str, ...] = ()

    def config(self) -> Config:
        return validated(self.tree, self.name)

    def identity(self) -> dict[str, Any]:
        """What makes this cell what it is: resuming another is refused."""
        asked = [list(part) for part in (self.attacks, self.threats, self.attack_settings)]
        return {"name": self.name, "config": self.config().digest(), "attacked": [*asked, self.targets]}

    def about(self) -> dict[str, Any]:
        """What a report says of a cell that has no run."""
        config = self.config()
        epsilon = getattr(config.defense, "epsilon", None)
        return {
            "algorithm": config.federation.algorithm,
            "defense": config.defense.name,
            "epsilon": epsilon,
            "seed": config.seed,
        }


def cells(
    file: Path | None, over: Sequence[str] = (), seeds: int | None = None, environment: Mapping[str, str] | None = None
) -> list[Cell]:
    """Every combination of axes on top of a file, each cell checked before any work; `none` in defense.epsilon means no defense.

    over: axes ``KEY=V1,V2,...``, which go before those of the file's [sweep] table with the same key; seeds likewise.
    """
    base = read_toml(file) if file else {}
    plan = _plan(base.pop(SWEEP, {}), file)
    axes = {**plan.over, **dict(_axis(text) for text in over)}
    for key, value in environment_settings(environment or {}).items():
        put(base, key, value)
    if (many := (seeds or plan.seeds) * math.prod(map(len, axes.values()))) > MOST_CELLS:
        raise UsageError(f"a grid of {many:,} cells, and {MOST_CELLS:,} are the limit: take fewer values or seeds")
    found = [
        _cell(base, plan, dict(zip(axes, values, strict=True)), offset if (seeds or plan.seeds) > 1 else None)
        for values in itertools.product(*axes.values())
        for offset in range(seeds or plan.seeds)
    ]
    for cell in found:
        cell.config()
    return found


def _cell(base: Mapping[str, Any], plan: Plan, values: Mapping[str, Any], offset: int | None) -> Cell:
    tree = _copy(base)
    named = []
    for key, value in values.items():
        _put_axis(tree, key, value)
        named.append(f"{key.rpartition('.')[2]}={value}")
    if offset is not None:
        first = validated(tree, "the grid")  # that seeds are numbers is seen there
        put(tree, "seed", first.seed + offset)
        named.append(f"seed={tree['seed']}")
        if (noise_seed := getattr(first.defense, "noise_seed", None)) is not None:
            # the same noise under every seed would make seeds look alike
            put(tree, "defense.noise_seed", noise_seed + offset)
    name = "_".join(named).replace("/", "-") or "only"
    return Cell(name, tree, plan.settings, plan.targets, plan.attacks, plan.threats)


def _plan(table: Any, file: Path | None) -> Plan:
    try:
        plan = Plan.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, (SWEEP, *first["loc"])))
        raise UsageError(f"{file}: {where}: {first['msg']}; [{SWEEP}] takes {', '.join(Plan.model_fields)}") from None
    for key, values in plan.over.items():
        if not values:
            raise UsageError(f"{file}: {SWEEP}.over: {key} has no values: give a list such as [8, 50]")
    for name in plan.attacks:
        make_attack(name, plan.settings)
    for name in plan.threats:
        one_of(name, THREATS, "threat")
    return plan


def _axis(text: str) -> tuple[str, list[Any]]:
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise UsageError(f"--over {text!r}: write KEY=V1,V2,..., for example --over defense.epsilon=none,50,8")
    return key.strip(), [parse_value(v.strip()) for v in values.split(",")]


def _put_axis(tree: dict[str, Any], key: str, value: Any) -> None:
    if key == "defense.epsilon" and value in ("none", "inf", float("inf")):
        tree["defense"] = {"name": "none"}
        return
    if key == "defense.epsilon" and tree.get("defense", {}).get("name", "none") == "none":
        put(tree, "defense.name", "dp-sgd")
    put(tree, key, value)


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, dict) else value for key, value in tree.items()}
