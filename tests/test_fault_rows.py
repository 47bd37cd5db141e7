"""Signals, two processes, failing disks, repeats and NaN: there are as many cases as promised, and a few of each are played here.

All of them are `make trust`'s.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.trust.cases import Case
from tests.trust.disks import DISKS
from tests.trust.locks import LOCKS
from tests.trust.nans import NANS
from tests.trust.repeats import REPEATS
from tests.trust.signals import SIGNALS

GROUPS = {"signals": SIGNALS, "locks": LOCKS, "disks": DISKS, "repeats": REPEATS, "nans": NANS}
QUICK = {
    "SIGTERM during a round: fedgc, none",
    "SIGINT twice during reading faces: fedgc, none",
    "train --resume at write 27: fedgc, none",
    "evaluate of a finished run that another process holds",
    "train: a folder without permission to write",
    "data prepare: write of the journal: ENOSPC",
    "update export: fsync: EIO",
    "fedgc, none: in a fork",
    "fedgc, none: cut off after every round",
    "NaN in the gradient of a search: gradinversion",
}
QUICK_SITES = ("NaN in correction", "infinity in server momentum", "NaN in photo, ")


def quick(case: Case) -> bool:
    return case.name in QUICK or (case.name.startswith(QUICK_SITES) and "none" in case.name)


def test_there_are_as_many_as_promised() -> None:
    promised = {"signals": 50, "locks": 20, "disks": 20, "repeats": 40, "nans": 50}
    assert {name: len(cases) for name, cases in GROUPS.items()} == promised
    for cases in GROUPS.values():
        assert len({case.name for case in cases}) == len(cases)
        assert any(map(quick, cases))
    assert {case.name for cases in GROUPS.values() for case in cases} >= QUICK


@pytest.mark.parametrize(
    "case",
    [pytest.param(case, id=f"{group}-{case.name}") for group, cases in GROUPS.items() for case in cases if quick(case)],
)
def test_a_fault_is_handled(case: Case, tmp_path: Path) -> None:
    assert case.run(tmp_path) is None
