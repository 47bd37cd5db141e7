"""Seconds per round of the engines on the same network and data: in this process, Flower's simulation, pfl-research's.

FedAvg with plain SGD and no defense. Start-up is left out: the first round is not counted. pfl (pip install 'pfl[pytorch]') is
measured where it is installed.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.utility import one_thread
from fedgc import heads
from fedgc.config import Config, load_config
from fedgc.errors import UsageError
from fedgc.heads import CosineHead
from fedgc.models import FaceModel, build_backbone
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.pipeline.setting import federation, prepare
from fedgc.pipeline.training import train

SETTINGS = (
    "data.image_size=32", "data.augment=false", "model.embedding_size=64", "federation.algorithm=fedavg",
    "federation.local_epochs=1", "federation.batch_size=16", "federation.momentum=0", "federation.weight_decay=0",
    "federation.clip_norm=0", "record.victims=0", "record.rounds=last",
)  # fmt: skip


def configured(clients: int, rounds: int, engine: str) -> Config:
    people = max(24, 4 * clients)
    sized = (f"data.source=synthetic:{people * 2}x8", f"federation.clients={clients}", f"federation.rounds={rounds}")
    return load_config(settings=(*SETTINGS, *sized, f"engine={engine}"))


def rounds_of(config: Config) -> list[float]:
    """Seconds of each round but the first, from one round on disk to the next, of the round alone as metrics record it."""
    with tempfile.TemporaryDirectory() as folder:
        from fedgc.runs import RunDirectory

        train(config, Path(folder) / "run")
        return [m["seconds"] for m in RunDirectory(Path(folder) / "run").metrics()][1:]


def in_process(clients: int, rounds: int) -> list[float]:
    """The round alone: training and aggregation, nothing written."""
    parties = federation(prepare(configured(clients, rounds, "inprocess")))
    state, found = parties.initial_state(), []
    for _ in range(rounds):
        clock = time.monotonic()
        state = parties.play(state, keep=lambda client: False).state
        found.append(time.monotonic() - clock)
    return found[1:]


def of_pfl(clients: int, rounds: int) -> list[float]:
    """pfl's FederatedAveraging in its own simulation, over the same photos, batches and steps."""
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.hyperparam import NNTrainHyperParams
    from pfl.metrics import Metrics, Weighted
    from pfl.model.pytorch import PyTorchModel

    config = configured(clients, rounds, "inprocess")
    parties = federation(prepare(config))
    spec = parties.spec

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.face = FaceModel(build_backbone(spec, 0), CosineHead(parties.classes, spec.embedding_size))

        def loss(self, x: torch.Tensor, y: torch.Tensor, is_eval: bool = False) -> torch.Tensor:
            return heads.loss(self.face(x), y, spec)

        @torch.no_grad()
        def metrics(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, Any]:
            return {"loss": Weighted(0.0, len(x))}

    class Clock(TrainingProcessCallback):
        def __init__(self) -> None:
            self.at: list[float] = []

        def after_central_iteration(
            self, aggregate_metrics: Metrics, model: Any, *, central_iteration: int
        ) -> tuple[bool, Metrics]:
            self.at.append(time.monotonic())
            return False, Metrics()

    network = Network()
    model = PyTorchModel(
        network, local_optimizer_create=torch.optim.SGD, central_optimizer=torch.optim.SGD(network.parameters(), lr=1.0)
    )
    photos = {p.client: [p.photos.float() / 255, p.labels] for p in parties.parties}
    order = iter(int(i) for _ in range(rounds + 1) for i in np.arange(clients))
    data = FederatedDataset(lambda k: Dataset(raw_data=photos[k], user_id=str(k)), lambda: next(order))
    params = NNTrainHyperParams(local_num_epochs=1, local_learning_rate=0.05, local_batch_size=16)
    clock = Clock()
    FederatedAveraging().run(
        algorithm_params=NNAlgorithmParams(
            central_num_iterations=rounds, evaluation_frequency=10**9, train_cohort_size=clients, val_cohort_size=0
        ),
        backend=SimulatedBackend(training_data=data, val_data=None),
        model=model, model_train_params=params, model_eval_params=None, callbacks=[clock],
    )  # fmt: skip
    return [b - a for a, b in zip(clock.at, clock.at[1:], strict=False)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[8, 32])
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args()
    one_thread()
    keep_freed_memory()
    measured: dict[str, Callable[[int, int], list[float]]] = {
        "in process": in_process,
        "in process, with everything on disk": lambda k, r: rounds_of(configured(k, r, "inprocess")),
        "Flower's simulation, with everything on disk": lambda k, r: rounds_of(configured(k, r, "flower")),
        "pfl": of_pfl,
    }
    for clients in options.clients:
        for name, measure in measured.items():
            try:
                seconds = measure(clients, options.rounds)
            except (ImportError, UsageError) as error:
                print(f"{clients} clients, {name}: not measured, {error}")
                continue
            spread = f"{min(seconds):.3f} to {max(seconds):.3f}"
            print(
                f"{clients} clients, {name}: {statistics.median(seconds):.3f} s a round (median; {spread})", flush=True
            )


if __name__ == "__main__":
    main()
