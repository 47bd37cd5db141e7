"""A federation of three clients on 32 px synthetic faces that trains a round in a tenth of a second."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

from defenses.none import NoDefense
from fedgc.algorithms import ALGORITHMS, Push
from fedgc.data.synthetic import synthetic_faces
from fedgc.doors import Defense
from fedgc.federation import Federation
from fedgc.schedule import Party, Schedule
from fedgc.types import ModelSpec

PEOPLE = (2, 3, 2)  # of each client
PHOTOS = (4, 3, 6)  # of each of its people
SPEC = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)
SCHEDULE: dict[str, Any] = {
    "rounds": 3, "local_epochs": 1, "batch_size": 4, "lr": 0.05, "head_lr_factor": 2.0, "momentum": 0.9,
    "weight_decay": 1e-3, "clip_norm": None, "participation": 1.0, "push": Push(weight=3.0), "augment": False,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def parties() -> list[Party]:
    faces, people = synthetic_faces(sum(PEOPLE), max(PHOTOS), 32, seed=1)
    out, first = [], 0
    for client, (count, photos) in enumerate(zip(PEOPLE, PHOTOS, strict=True)):
        classes = tuple(range(first, first + count))
        index = torch.cat([torch.nonzero(people == c)[:photos, 0] for c in classes])
        out.append(Party(client, faces[index], people[index], classes))
        first += count
    return out


@pytest.fixture(scope="session")
def federation(parties: list[Party]) -> Callable[..., Federation]:
    """federation("fedgc", defense=..., seed=..., clients=..., spec=..., and any field of the schedule)."""

    def build(
        algorithm: str = "fedgc", *, defense: Defense | None = None, seed: int = 0, noise_key: int = 1,
        clients: Sequence[Party] | None = None, spec: ModelSpec = SPEC, **changes: Any,
    ) -> Federation:  # fmt: skip
        schedule = Schedule(**{**SCHEDULE, **changes})
        return Federation(
            ALGORITHMS[algorithm], spec, schedule, clients or parties, defense or NoDefense(), seed, noise_key,
            torch.device("cpu"),
        )  # fmt: skip

    return build
