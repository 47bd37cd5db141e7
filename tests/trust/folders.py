"""A small folder of good faces to put something odd into, and what `data inspect` says of it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.pictures import picture
from tests.trust.cases import Outcome, command, costly, shown

PEOPLE, PHOTOS = ("ada", "bob"), 3
GOOD = len(PEOPLE) * PHOTOS
PROGRESS = "looking "  # lines on stderr of what takes long


def people(root: Path) -> Path:
    """A new folder of good people: PHOTOS photos of each."""
    for at, name in enumerate(PEOPLE):
        (root / name).mkdir(parents=True)
        for number in range(PHOTOS):
            picture(10 * at + number).save(root / name / f"{number}.png")
    return root


def inspected(root: Path, good: int, skipped: Mapping[str, str], **how: Any) -> str | None:
    """A complaint unless inspect counts so many good images and leaves out exactly these paths, each for its reason."""
    outcome = command("data", "inspect", root, "--json", **how)
    complaint, found = report(outcome)
    if found is None:
        return complaint
    if found["images"] != good:
        return f"{found['images']} images are good, not {good}: {shown(json.dumps(found['skipped']))}"
    named = {path: reason for reason, some in found["skipped"].items() for path in some["examples"]}
    if named != dict(skipped):
        return f"left out {shown(str(named))}, not {shown(str(dict(skipped)))}"
    return None


def report(outcome: Outcome) -> tuple[str | None, dict[str, Any] | None]:
    """(complaint, None), or (None, the document)."""
    if outcome.code or any(not line.startswith(PROGRESS) for line in outcome.err.splitlines()):
        return f"exit code {outcome.code}: {shown(outcome.err or outcome.out)}", None
    complaint = costly(outcome)
    return (complaint, None) if complaint else (None, json.loads(outcome.out))
