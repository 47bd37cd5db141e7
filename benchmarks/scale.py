"""The cost model of docs/concepts/scale.md: its constants measured small, its predictions checked at more clients and identities.

A round of FedGC with one photo a person, 32 px, features of 128 numbers, one epoch, one thread:

    seconds = photos / rate + clients * overhead + correction * C² d

rate from 8 clients, overhead from clients of one photo, correction from 8,192 rows; then rounds of other sizes, as predicted
and as they are.
"""

from __future__ import annotations

import argparse
import resource
import time
from dataclasses import dataclass

import torch

from benchmarks.utility import one_thread
from fedgc import correction
from fedgc.config import load_config
from fedgc.federation import Federation
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.pipeline.setting import federation
from fedgc.rng import generator
from fedgc.schedule import Party

SIZE, D = 32, 128
SETTINGS = (f"data.image_size={SIZE}", f"model.embedding_size={D}", "data.augment=false", "federation.local_epochs=1",
            "federation.batch_size=32", "federation.algorithm=fedgc")  # fmt: skip
POINTS = (
    (8, 1_000),
    (100, 1_000),
    (1_000, 1_000),
    (8, 10_000),
    (100, 10_000),
    (1_000, 10_000),
    (100, 100_000),
    (1_000, 100_000),
)


@dataclass(frozen=True)
class Model:
    """Seconds: a photo, a client, and one C² d of the correction."""

    photo: float
    client: float
    pair: float

    def seconds(self, clients: int, people: int) -> float:
        return people * self.photo + clients * self.client + self.pair * people**2 * D


def parties(clients: int, people: int) -> Federation:
    """Random photos, one of each person, people dealt evenly."""

    class Setting:
        config = load_config(settings=(*SETTINGS, f"federation.clients={clients}"))
        canaries, device, classes = None, torch.device("cpu"), people
        parties = tuple(_party(k, people * k // clients, people * (k + 1) // clients) for k in range(clients))

    return federation(Setting())  # type: ignore[arg-type]


def _party(client: int, start: int, stop: int) -> Party:
    draw = generator("photos", client)
    photos = torch.randint(256, (stop - start, 3, SIZE, SIZE), generator=draw, dtype=torch.uint8)
    return Party(client, photos, torch.arange(start, stop), tuple(range(start, stop)))


def round_seconds(fed: Federation, rounds: int) -> float:
    """Of the fastest round."""
    state, found = fed.initial_state(), []
    for _ in range(rounds):
        clock = time.monotonic()
        fed.play(state, keep=lambda client: False)
        found.append(time.monotonic() - clock)
    return min(found)


def correction_seconds(people: int) -> float:
    W, owner = torch.randn(people, D, generator=generator("rows")), torch.arange(people) // 100
    clock = time.monotonic()
    correction.gradient(W, owner, 8.0)
    return time.monotonic() - clock


def fitted() -> Model:
    correction_seconds(512)
    pair = min(correction_seconds(8_192) for _ in range(3)) / (8_192**2 * D)
    many = round_seconds(parties(8, 2_048), 3) - pair * 2_048**2 * D
    few = round_seconds(parties(256, 512), 3) - pair * 512**2 * D  # two photos a client: a step each
    photo = many / 2_048
    return Model(photo, max(0.0, (few - 512 * photo) / 256), pair)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--most", type=int, default=100_000, help="identities")
    options = parser.parse_args()
    one_thread()
    keep_freed_memory()
    model = fitted()
    print(f"a photo {1000 * model.photo:.2f} ms, a client {1000 * model.client:.1f} ms, {model.pair:.2e} s times C² d")
    for clients, people in POINTS:
        if people > options.most:
            continue
        predicted, found = model.seconds(clients, people), round_seconds(parties(clients, people), 1)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        share = model.pair * people**2 * D / predicted
        print(
            f"{clients} clients, {people} identities: predicted {predicted:.1f} s, measured {found:.1f} s "
            f"({found / predicted:.2f}); correction {100 * share:.0f} % of it; peak so far {memory:.1f} GB",
            flush=True,
        )


if __name__ == "__main__":
    main()
