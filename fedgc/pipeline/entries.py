"""What was asked for, and the entry that each attack and seat gets in the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from attacks.registry import ATTACKS, AnyAttack
from fedgc.config import parse_setting
from fedgc.errors import UsageError
from fedgc.types import Attack


def make_attack(name: str, settings: Sequence[str] = ()) -> Attack:
    """An attack with its defaults and the settings that name it (``gradient-inversion.iterations=100``)."""
    one_of(name, ATTACKS, "attack")
    fields: dict[str, Any] = {"name": name}
    for setting in settings:
        key, value = parse_setting(setting)
        owner, _, field = key.rpartition(".")
        one_of(owner, ATTACKS, "attack")
        if field not in ATTACKS[owner].model_fields:
            known = ", ".join(f for f in ATTACKS[owner].model_fields if f != "name")
            raise UsageError(f"--set {key}: {owner} has no '{field}'; it has {known or 'nothing to set'}")
        if owner == name:
            fields[field] = value
    try:
        return TypeAdapter(AnyAttack).validate_python(fields)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"--set {name}.{first['loc'][-1]} = {first['input']!r}: {first['msg']}") from None


def one_of(name: str, names: Mapping[str, Any], what: str) -> str:
    """The name itself; raises UsageError where there is no such one."""
    if name not in names:
        raise UsageError(f"no {what} '{name}': choose from {', '.join(names)}")
    return name


def entry_of(
    path: Path, attack: Attack, threat: str, t: int, granted: Sequence[str], refused: str | None,
    batch_size: int | None = None, local_steps: int = 1,
) -> dict[str, Any]:  # fmt: skip
    """One entry of the document of ``attack --json``, without results yet."""
    several = {"local_steps": local_steps} if local_steps > 1 else {}
    return {
        "attack": attack.name, "threat": threat, "run": str(path), "targets": 0, "seconds": 0.0,
        "granted": list(granted), "refused": refused, "metrics": {}, "baselines": {}, "round": t,
        "batch_size": batch_size, **several, "settings": attack.model_dump(mode="json"), "samples": [],
    }  # fmt: skip
