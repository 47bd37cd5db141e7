"""model.init: the weights that training starts from, checked against the network before anything uses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgc.algorithms import backbone_part
from fedgc.config import Config
from fedgc.errors import RunError, UsageError
from fedgc.files import read_tensors, sha256, write_tensors
from fedgc.models import BACKBONES, build_backbone, check_spec, state_tensors, told_spec
from fedgc.pipeline.published import BACKBONE_OF_PUBLISHED, PUBLISHED, check_hash, downloaded, read_published
from fedgc.runs import RunDirectory
from fedgc.types import BACKBONE, ModelSpec, State, Tensors

PICKLES = (".pt", ".pth")
KEYS = {"backbone": "model.backbone", "embedding_size": "model.embedding_size", "image_size": "data.image_size"}
WHY_NORM = (
    "GroupNorm keeps no running statistics, and a network trained with one does not work with the other's normalisation"
)


@dataclass(frozen=True)
class Initial:
    """tensors: those of the backbone by their names on the wire; about: what run.json says of them under "init".

    about: path, sha256, source and datasets (fingerprints of the faces behind it, as far as they are known).
    """

    tensors: dict[str, Tensor]
    about: dict[str, Any]

    def state(self) -> State:
        return State(0, self.tensors, torch.empty(0))


def read_initial(config: Config) -> Initial | None:
    """What model.init names, or None where training starts at random.

    Raises UsageError (RunError for a damaged file) where it cannot be the start of the network of this configuration.
    """
    name, spec = config.model.init, config.spec()
    check_spec(spec)
    if name is None:
        return None
    if name in PUBLISHED or name.endswith(PICKLES):
        tensors, about = _published(name, spec, config.model.init_sha256)
    else:
        tensors, about = _own(Path(name), spec, config.model.init_sha256)
    return Initial(fitting(tensors, spec, config.seed, f"model.init = {name}"), {"path": name, **about})


def _published(name: str, spec: ModelSpec, expected: str | None) -> tuple[Tensors, dict[str, Any]]:
    """facenet-pytorch's weights by their name, or such a file in the user's hands."""
    chosen = BACKBONES[BACKBONE_OF_PUBLISHED]
    side = spec.image_size if spec.image_size >= chosen.smallest else chosen.side  # its maps are averaged at any size
    of = replace(spec, backbone=BACKBONE_OF_PUBLISHED, norm="batch", embedding_size=chosen.features, image_size=side)
    _same(name, of, spec)
    known = name in PUBLISHED
    if not known:
        _require(Path(name))
    tensors, digest = read_published(downloaded(name) if known else Path(name), expected, trusted=known)
    source = f"published by facenet-pytorch, trained on {name}" if known else None
    return {BACKBONE + n: t for n, t in tensors.items()}, {"sha256": digest, "source": source, "datasets": []}


def _own(path: Path, spec: ModelSpec, expected: str | None) -> tuple[Tensors, dict[str, Any]]:
    """A finished run (its last checkpoint) or a checkpoint that this tool wrote."""
    _require(path)
    run = RunDirectory(path if path.is_dir() else path.parent.parent)
    about = run.finished() if path.is_dir() else around(run, path)
    file = run.checkpoint_path(run.last_round()) if path.is_dir() else path
    tensors, header = read_tensors(file)
    trained = told_spec(header, str(file))
    digest = sha256(file)
    check_hash(file, digest, expected)
    _same(str(path), trained, spec)
    seen = [about["dataset"], *(about.get("init") or {"datasets": []})["datasets"]] if about else []
    return backbone_part(tensors), {"sha256": digest, "source": about.get("source"), "datasets": seen}


def around(run: RunDirectory, file: Path) -> dict[str, Any]:
    """run.json of the run that a checkpoint lies in, if it lies in one."""
    return run.about() if file.parent == run.checkpoint_path(0).parent and run.exists else {}


def _require(path: Path) -> None:
    if not path.exists():
        known = " or ".join(PUBLISHED)
        raise UsageError(
            f"model.init = {path} does not exist: give a finished run, a checkpoint (.safetensors), {known}"
        )


def _same(name: str, trained: ModelSpec, spec: ModelSpec) -> None:
    """Refuse weights of another network, with the settings that would fit."""
    wrong = [key for key in KEYS if getattr(trained, key) != getattr(spec, key)]
    if wrong:
        is_for = ", ".join(f"{KEYS[key]} = {getattr(trained, key)}" for key in wrong)
        settings = " ".join(f"--set {KEYS[key]}={getattr(trained, key)}" for key in wrong)
        raise UsageError(f"model.init = {name} is for {is_for}: add {settings}")
    if (trained.norm == "group") != (spec.norm == "group"):
        fits = "group" if trained.norm == "group" else "frozen (or batch)"
        raise UsageError(
            f"model.init = {name} was trained with norm = {trained.norm}, which cannot become {spec.norm} ({WHY_NORM}): "
            f"set model.norm = {fits}"
        )


def fitting(tensors: Tensors, spec: ModelSpec, seed: int, name: str) -> dict[str, Tensor]:
    """The tensors in the order of the network's own, once names, shapes, types and values are those of a network."""
    own = {BACKBONE + n: t for n, t in state_tensors(build_backbone(spec, seed)).items()}
    say = f"{name} does not fit {spec.backbone} with norm = {spec.norm}"
    if odd := sorted(own.keys() ^ tensors.keys()):
        which = "lacks" if odd[0] in own else "also holds"
        raise UsageError(f"{say}: it {which} {odd[0]} ({len(odd)} names differ); it may be of another version")
    for n, t in own.items():
        given = tensors[n]
        if given.shape != t.shape or given.dtype != t.dtype:
            raise UsageError(
                f"{say}: {n} is {given.dtype} {tuple(given.shape)} there and {t.dtype} {tuple(t.shape)} here"
            )
        if not bool(given.isfinite().all()) or (n.endswith("running_var") and bool((given < 0).any())):
            raise UsageError(f"{say}: {n} holds numbers that no training leaves; the file is damaged or diverged")
    return {n: tensors[n].clone(memory_format=torch.contiguous_format) for n in own}


def require_other_people(initial: Initial | None, dataset: str) -> None:
    """Public weights must not know the people that are to be protected, nor those that utility is measured on."""
    if initial is not None and dataset in initial.about["datasets"]:
        raise UsageError(
            f"model.init = {initial.about['path']} was trained on the very faces of data.source: pre-train on other people"
        )


def keep_initial(run: RunDirectory, initial: Initial, spec: ModelSpec) -> dict[str, Any]:
    """Copy the weights into the run as the checkpoint before its first round; returns the "init" of run.json."""
    digest = write_tensors(run.checkpoint_path(0), initial.tensors, {"round": 0, "spec": asdict(spec)})
    return {**initial.about, "checkpoint": digest}


def kept_initial(run: RunDirectory) -> Initial | None:
    """What a run started from, out of its own copy: the file that model.init names may have changed or gone."""
    about: Mapping[str, Any] | None = run.about().get("init")
    if about is None:
        return None
    file = run.checkpoint_path(0)
    if not file.exists() or sha256(file) != about["checkpoint"]:
        raise RunError(
            f"{file} is missing or damaged: it holds the weights this run began with; restore it or train again"
        )
    return Initial(read_tensors(file)[0], dict(about))
