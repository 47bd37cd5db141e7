"""evaluate: utility of a model on people it was not trained on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from eval.recognition import verification
from eval.statistics import Measured
from fedgc.config import Config, put, read_toml, validated
from fedgc.data.faces import FaceSet
from fedgc.data.splits import Splits
from fedgc.errors import RunError
from fedgc.models import build_backbone, embed, state_tensors
from fedgc.pipeline.initial import kept_initial
from fedgc.pipeline.setting import Setting, load_config_faces
from fedgc.pipeline.watch import Watch, silent
from fedgc.rng import numpy_generator
from fedgc.runs import RunDirectory
from fedgc.types import BACKBONE, State

Embedding = Callable[[Tensor], Tensor]


def embedding(backbone: torch.nn.Module, state: State) -> Embedding:
    """uint8 photos -> unit features with the backbone of that state (loaded into the given module, in place)."""
    own = state_tensors(backbone)
    for name, tensor in state.backbone.items():
        own[name.removeprefix(BACKBONE)].copy_(tensor)
    return lambda photos: embed(backbone, photos)


def untrained_state(config: Config) -> State:
    """The network as it is before anybody's training, public training included."""
    fresh = state_tensors(build_backbone(config.spec(), config.seed))
    return State(0, {BACKBONE + name: tensor for name, tensor in fresh.items()}, torch.empty(0))


def utility(embed_photos: Embedding, setting: Setting) -> dict[str, Any]:
    """Verification and identification on the test people, thresholds from the calibration people."""
    return people_utility(
        embed_photos, setting.faces, setting.splits.test, setting.splits.calibration, setting.config.seed
    )


def people_utility(
    embed_photos: Embedding, faces: FaceSet, test: tuple[int, ...], calibration: tuple[int, ...], seed: int
) -> dict[str, Any]:
    index, held = faces.of(test), faces.of(calibration)
    measured = verification(
        embed_photos(faces.images[index]), faces.labels[index],
        embed_photos(faces.images[held]), faces.labels[held], rng=numpy_generator(seed, "utility"),
    )  # fmt: skip
    return {name: m.to_json() if isinstance(m, Measured) else m for name, m in measured.items()}


def evaluate(path: Path, data: str | None = None, watch: Watch = silent) -> dict[str, Any]:
    """Measure a finished run again: on its own test people, or on the people of another source, none of them trained on.

    Of another source, half of the people serve for thresholds and half for the test. Nothing in the run changes.
    """
    run = RunDirectory(path)
    result = document(run)
    config = validated(read_toml(path / "config.toml"), str(path / "config.toml"))
    state = run.load_state()
    if state is None:
        raise RunError(f"{path} has no intact state left: train again")
    if data is not None:
        tree = config.model_dump(mode="json", exclude_none=True)
        put(tree, "data.source", data)
        config = validated(tree)
    faces = load_config_faces(config, watch)
    test, calibration = _unseen(run, faces, config) if data is None else _halves(faces, config.seed)
    backbone = build_backbone(config.spec(), config.seed)
    initial = kept_initial(run)

    def measured(state: State) -> dict[str, Any]:
        return people_utility(embedding(backbone, state), faces, test, calibration, config.seed)

    baselines = {**result["baselines"], "untrained": measured(untrained_state(config))}
    if initial is not None:
        baselines["public-only"] = measured(initial.state())
    trained = measured(state)
    return {**result, "source": config.data.source, "utility": trained, "baselines": baselines}


def _unseen(run: RunDirectory, faces: FaceSet, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if faces.fingerprint() != run.about()["dataset"]:
        raise RunError(f"{config.data.source} no longer holds the faces that {run.path} was trained on")
    splits = Splits.from_json(run.load_identities()["splits"])
    return splits.test, splits.calibration


def _halves(faces: FaceSet, seed: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    order = torch.randperm(len(faces.names), generator=torch.Generator().manual_seed(seed)).tolist()
    half = len(order) // 2
    return tuple(sorted(order[half:])), tuple(sorted(order[:half]))


def document(run: RunDirectory) -> dict[str, Any]:
    """What ``train --json`` and ``evaluate --json`` print."""
    about = run.finished()
    keys = (
        "status",
        "algorithm",
        "rounds",
        "seconds",
        "images_per_second",
        "utility",
        "baselines",
        "privacy",
        "skipped",
    )
    return {"run": str(run.path), **{key: about[key] for key in keys}, "skipped_files": about["skipped_files"]}
