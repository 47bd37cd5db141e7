"""demo: FedAvg and FedGC on synthetic faces, without privacy and at three epsilons, attacked from every seat, reported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fedgc.pipeline.grids import Cell
from fedgc.pipeline.sweeping import run_sweep
from fedgc.pipeline.watch import Watch, silent

EPSILONS = (None, 300.0, 50.0, 8.0)
# Small enough for two cores in minutes; the noise seed makes the demo repeatable, and the report says what that costs.
SETTINGS: dict[str, Any] = {
    "data": {"source": "synthetic:160x10", "image_size": 32, "augment": False},
    "federation": {"clients": 4, "rounds": 10, "lr": 0.1},
    "record": {"rounds": "last", "victims": 16, "batch_sizes": [1, 4]},
}
ATTACK_SETTINGS = (
    "gradient-inversion.iterations=100",
    "feature-inversion.iterations=100",
    "template-inversion.iterations=50",
    "membership-inference.epochs=12",
)


def demo_cells() -> list[Cell]:
    out = []
    for epsilon in EPSILONS:
        for algorithm in ("fedavg", "fedgc"):
            tree = {**SETTINGS, "federation": {**SETTINGS["federation"], "algorithm": algorithm}}
            if epsilon is not None:
                tree["defense"] = {"name": "dp-sgd", "epsilon": epsilon, "noise_seed": 0}
            name = f"{algorithm}-" + ("no-dp" if epsilon is None else f"eps{epsilon:g}")
            out.append(Cell(name, tree, ATTACK_SETTINGS, targets=4))
    return out


def run_demo(out: Path, watch: Watch = silent) -> dict[str, Any]:
    """Train, attack and report; a second call finds everything done. Returns the report's summary."""
    return run_sweep(demo_cells(), out, resume=True, watch=watch)
