"""Injected failures of nodes under Flower's simulation: each run has one, in another round, at another client, of another kind.

A run counts as survived where it finishes with a finite model, says which client was missing in which round, and asks it again.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from flwr.app import Array, Context, Message
from flwr.clientapp import ClientApp

from benchmarks.utility import one_thread
from fedgc.config import Config, load_config
from fedgc.errors import FedgcError
from fedgc.federation import Federation
from fedgc.pipeline.engines import Simulation
from fedgc.pipeline.flower.wire import ABOUT, SENT, about, note
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory

CLIENTS, ROUNDS, TIMEOUT = 3, 4, 45.0
SETTINGS = (
    "data.source=synthetic:24x6", "data.image_size=32", f"federation.clients={CLIENTS}", f"federation.rounds={ROUNDS}",
    "federation.local_epochs=1", "record.victims=0", "model.embedding_size=32", f"flower.timeout={TIMEOUT:g}",
    "engine=flower", "defense.name=dp-sgd", "defense.noise_multiplier=1", "defense.noise_seed=1",
)  # fmt: skip


def dies(reply: Message) -> Message:
    raise RuntimeError("the node died in mid-round")


def is_late(reply: Message) -> Message:
    time.sleep(TIMEOUT + 5)
    return reply


def is_not_finite(reply: Message) -> Message:
    record = reply.content.array_records[SENT]
    record["head.weight"] = Array(record["head.weight"].numpy() * float("nan"))
    return reply


def has_another_shape(reply: Message) -> Message:
    reply.content.array_records[SENT]["head.weight"] = Array(torch.zeros(2, 2).numpy())
    return reply


def is_of_another_round(reply: Message) -> Message:
    reply.content[ABOUT] = note(**{**about(reply.content), "where": ["round", 1]})
    return reply


KINDS: tuple[Callable[[Message], Message], ...] = (dies, is_late, is_not_finite, has_another_shape, is_of_another_round)


class Failing(Simulation):
    def __init__(self, round: int, client: int, kind: Callable[[Message], Message]) -> None:
        self.round, self.client, self.kind = round, client, kind

    def app(self, config: Config, parties: Federation) -> ClientApp:
        app = super().app(config, parties)
        honest = app._registered_funcs["train.default"]
        when, who, kind = self.round, self.client, self.kind

        def train_or_fail(message: Message, context: Context) -> Message:
            reply = honest(message, context)
            at = about(message.content)["where"][1]
            return kind(reply) if (at, context.node_config["partition-id"]) == (when, who) else reply

        app._registered_funcs["train.default"] = train_or_fail
        return app


def survived(number: int, folder: Path) -> tuple[bool, str]:
    round, client, kind = 2 + number % (ROUNDS - 1), number % CLIENTS, KINDS[number % len(KINDS)]
    name = f"client {client}'s answer of round {round} {kind.__name__.replace('_', ' ')}"
    try:
        train(load_config(settings=SETTINGS), folder, engine=Failing(round, client, kind))
    except FedgcError as error:
        return False, f"{name}: {error}"
    run = RunDirectory(folder)
    state = run.load_state()
    missing = {m["round"]: list(m["missing"]) for m in run.metrics() if "missing" in m}
    finite = state is not None and all(bool(x.isfinite().all()) for x in (*state.backbone.values(), state.rows))
    paid = state is not None and len(state.ledger) == CLIENTS * ROUNDS
    told = next((m["missing"][str(client)] for m in run.metrics() if "missing" in m), "nothing")
    return missing == {round: [str(client)]} and finite and paid, f"{name}: {told[:90]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--failures", type=int, default=20)
    options = parser.parse_args()
    one_thread()
    count = 0
    with tempfile.TemporaryDirectory() as folder:
        for number in range(options.failures):
            good, said = survived(number, Path(folder) / str(number))
            count += good
            print(f"{'survived' if good else 'LOST'}: {said}", flush=True)
    print(
        f"runs that finished with a finite model, went on without the node and asked it again: {count} of {options.failures}"
    )
    os._exit(0 if count == options.failures else 1)


if __name__ == "__main__":
    main()
