"""A federation small enough to attack in a second: 32 px synthetic faces, two or three parties of six people
each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch

from defenses.none import NoDefense
from fedgc.algorithms import ALGORITHMS, Push
from fedgc.data.synthetic import synthetic_faces
from fedgc.doors import Defense
from fedgc.federation import Federation
from fedgc.schedule import Party, Schedule
from fedgc.threats import THREATS, Knowledge
from fedgc.types import Gallery, ModelSpec, Norm, Observation, Transcript, Truth

SIZE, PEOPLE, PHOTOS = 32, 6, 3


@dataclass(frozen=True)
class World:
    """One recorded step, what is true of it, and what an attacker owns."""

    transcript: Transcript
    truth: Truth
    knowledge: Knowledge
    parties: Sequence[Party] = ()

    def seen_by(self, threat: str, knows: bool = True) -> Observation:
        return THREATS[threat].observe(self.transcript, self.knowledge if knows else None)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world() -> Callable[..., World]:
    """world(algorithm, batch=1, clients=2, kind="step", defense=NoDefense(), steps=1, norm="group") at the initial state."""
    strangers, _ = synthetic_faces(60, 1, SIZE, seed=2)
    cache: dict[tuple[str, int, int, str, str, int, Norm], World] = {}

    def build(
        algorithm: str = "fedgc", batch: int = 1, clients: int = 2, kind: str = "step", defense: Defense | None = None,
        steps: int = 1, norm: Norm = "group",
    ) -> World:  # fmt: skip
        defense = defense or NoDefense()
        key = algorithm, batch, clients, kind, repr(defense), steps, norm
        if key not in cache:
            cache[key] = _world(algorithm, batch, clients, kind, strangers.float() / 255, defense, steps, norm)
        return cache[key]

    return build


def _world(
    algorithm: str, batch: int, clients: int, kind: str, strangers: torch.Tensor, defense: Defense, steps: int, norm: Norm,
) -> World:  # fmt: skip
    faces, people = synthetic_faces(PEOPLE * clients, PHOTOS, SIZE, seed=1)
    parties = [
        Party(k, faces[mine], people[mine], tuple(range(k * PEOPLE, (k + 1) * PEOPLE)))
        for k in range(clients)
        for mine in [(people // PEOPLE) == k]
    ]
    schedule = Schedule(
        rounds=3, local_epochs=1, batch_size=4, lr=0.05, head_lr_factor=2.0, momentum=0.9, weight_decay=1e-3,
        clip_norm=1.0, participation=1.0, push=Push(weight=1.0), augment=False,
    )  # fmt: skip
    spec = ModelSpec("small", norm, 32, SIZE, "cosface", 0.25, 16.0)
    cpu = torch.device("cpu")
    federation = Federation(ALGORITHMS[algorithm], spec, schedule, parties, defense, 0, 1, cpu)
    first = [slice(0, batch * PHOTOS, PHOTOS)] * clients  # a photo each of the first people
    photos = torch.stack([p.photos[i] for p, i in zip(parties, first, strict=True)])
    labels = torch.stack([p.labels[i] for p, i in zip(parties, first, strict=True)])
    state = federation.initial_state()
    transcript, truth = federation.play_step(state, 0, photos, labels, steps=steps)
    if kind == "round":
        transcript = federation.play(state).transcript
    gallery = Gallery(faces.float() / 255, people)
    return World(transcript, truth, Knowledge(strangers, gallery), parties)
