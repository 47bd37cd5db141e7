"""Bad updates and damaged files: a part of `make trust`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.damage import SHARES, caught
from tests.trust.updates import Bad, cases

CASES = list(cases())


@pytest.mark.parametrize("bad", CASES, ids=lambda bad: f"{bad.kind}, {bad.rule}")
def test_a_bad_update_is_refused_or_bounded(bad: Bad) -> None:
    assert bad.run() is None


def test_there_are_as_many_as_promised() -> None:
    assert len(CASES) == 75


def test_damage_is_noticed_before_use(runs: dict[str, Path], tmp_path: Path) -> None:
    found, missed = caught(runs["fedgc"], tmp_path, trials=100)
    assert missed == []
    assert found == {kind: share // 10 for kind, share in SHARES.items()}
