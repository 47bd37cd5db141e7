"""attack on a file that is no run: a checkpoint, which an outsider holds, or one client's update, which a server holds.

What is found goes into a folder beside the file. Without the true photos there is nothing to measure it by, and no figure.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attacks.registry import ATTACKS
from eval.figures import save_grid, save_row
from eval.scoring import Batch, Features, Scores, batches
from fedgc.algorithms import backbone_part
from fedgc.data.faces import load_faces
from fedgc.errors import UsageError
from fedgc.files import PRIVATE, make_folder, read_tensors, sha256, write_json, write_tensors
from fedgc.foreign import holds_update, unpack_update
from fedgc.models import told_spec
from fedgc.pipeline.entries import entry_of, make_attack, one_of
from fedgc.pipeline.judging import STRANGERS, of_steps, unit_features
from fedgc.pipeline.records import Summary, checked
from fedgc.pipeline.setting import AUXILIARY_PHOTOS
from fedgc.pipeline.watch import Watch, silent
from fedgc.pipeline.working import FIELDS, keep_graphs
from fedgc.rng import generator, numpy_generator, stream_seed
from fedgc.threats import THREATS, Knowledge, outsider_observation, update_observation
from fedgc.types import BACKBONE, HEAD, Attack, LocalConstants, Observation, Reconstruction, Tensors, Truth

UPDATE = frozenset({"client-updates", "public-constants", "global-model"})  # what an update file grants by itself
UNMEASURED = "no figure: the true photos are not known (if they are, give them with --truth)"


@dataclass(frozen=True)
class Foreign:
    """An update file as an attack meets it. truth: for scoring alone; inputs: hashes of the file, of the attacker's faces and
    of the truth, by which results are found again."""

    path: Path
    observation: Observation
    truth: Truth | None
    inputs: tuple[str, ...]


def attack_file(
    path: Path, attacks: Sequence[str] = (), threats: Sequence[str] = (), settings: Sequence[str] = (), *,
    faces: str | None = None, truth: Path | None = None, force: bool = False, watch: Watch = silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Entries of ``attack --json`` for a bare file. faces: a source of the attacker's own faces, as ``train --data`` takes it;
    truth: safetensors of the photos behind an update, images (B, 3, S, S) uint8 or float in [0, 1], and labels int64 (B,)."""
    tensors, about = read_tensors(path)
    update = holds_update(tensors)
    if not update and (faces is not None or truth is not None):
        raise UsageError(
            f"--faces and --truth are for an update, and {path} is a checkpoint: no photo is behind it alone"
        )
    chosen = [make_attack(name, settings) for name in attacks or (of_updates() if update else tuple(ATTACKS))]
    seats = [one_of(name, THREATS, "threat") for name in threats or ("server" if update else "outsider",)]
    if not update:
        return [_checkpoint_entry(path, tensors, about, a, seat) for a in chosen for seat in seats]
    foreign = _read(path, tensors, about, faces, truth, watch)
    return [_update_entry(foreign, a, seat, force, watch) for a in chosen for seat in seats]


def of_updates() -> tuple[str, ...]:
    """The attacks that need no more than one update."""
    return tuple(
        name for name, kind in ATTACKS.items() if kind.target == "step" and any(need <= UPDATE for need in kind.needs)
    )


def _checkpoint_entry(file: Path, tensors: Tensors, about: Any, attack: Attack, threat: str) -> dict[str, Any]:
    """A bare checkpoint: all that it holds is in the hands of an outsider, who owns no photos."""
    backbone = backbone_part(tensors)
    if not backbone:
        raise UsageError(
            f"{file} holds no tensor named '{BACKBONE}...': give a checkpoint written by `fedgc-priv train`, or an update "
            "(docs/how-to/foreign-update.md)"
        )
    constants = LocalConstants(told_spec(about, str(file)), 0.0, 1.0, 0.0, 0.0, None, 1, None, False)
    observation = outsider_observation(backbone, tensors.get(HEAD), constants, Knowledge())
    refused = (
        attack.refusal(observation)
        if threat == "outsider"
        else f"a checkpoint shows what an outsider sees; the seat '{threat}' needs a run directory"
    )
    return entry_of(
        file, attack, threat, 0, observation.granted, refused or "an attack on a bare checkpoint needs photos"
    )


def _read(
    path: Path, tensors: Tensors, about: Any, faces: str | None, truth: Path | None, watch: Watch
) -> Foreign:  # fmt: skip
    update, constants = unpack_update(tensors, about, str(path))
    side = constants.spec.image_size
    owned, inputs = Knowledge(), [sha256(path)]
    if faces is not None:
        # drawn people are others than those of a training run, whatever its seed
        seed = stream_seed("faces of whoever attacks an update")
        people = load_faces(faces, image_size=side, align="none", seed=seed, progress=partial(watch, "reading faces"))
        kept = torch.randperm(len(people), generator=generator(0, "auxiliary"))[:AUXILIARY_PHOTOS].sort().values
        owned = Knowledge(
            people.float_images(kept), auxiliary_people=people.labels[kept].unique(return_inverse=True)[1]
        )
        inputs.append(people.fingerprint())
    known = None
    if truth is not None:
        if owned.auxiliary_faces is None:
            raise UsageError(
                "--truth needs --faces too: a figure stands beside what an attacker's own faces would give"
            )
        known = _true_photos(truth, update.images, side, update.classes)
        inputs.append(sha256(truth))
    return Foreign(path, update_observation(update, constants, owned), known, tuple(inputs))


def _true_photos(file: Path, count: int, side: int, classes: tuple[int, ...]) -> Truth:
    tensors, _ = read_tensors(file)
    images, labels = tensors.get("images"), tensors.get("labels")
    wanted = (
        f"{file} must hold images ({count}, 3, {side}, {side}), uint8 or float in [0, 1], and labels int64 ({count},)"
    )
    if images is None or labels is None or images.shape != (count, 3, side, side) or labels.shape != (count,):
        raise UsageError(f"{wanted}: as many as the update's batch_size")
    images = images.float() / 255 if images.dtype == torch.uint8 else images.float()
    if labels.dtype != torch.int64 or not bool(((images >= 0) & (images <= 1)).all()):
        raise UsageError(wanted)
    if classes and not set(labels.tolist()) <= set(classes):
        raise UsageError(f"{file}: every label must be one of the update's classes")
    return Truth((0,), images[None], labels[None])


def _update_entry(foreign: Foreign, attack: Attack, threat: str, force: bool, watch: Watch) -> dict[str, Any]:
    seen = foreign.observation
    constants = seen.public_constants
    attack = attack.sized(constants.batch_size if attack.costly else 0)
    entry = entry_of(foreign.path, attack, threat, 0, seen.granted, _refusal(attack, threat, seen),
                     constants.batch_size, constants.steps or 1)  # fmt: skip
    if entry["refused"]:
        return entry
    folder = _folder(foreign, attack)
    if force and folder.exists():
        shutil.rmtree(folder)
    if (folder / "summary.json").exists():
        return {**checked(Summary, folder / "summary.json"), "folder": str(folder)}
    started = time.monotonic()
    keep_graphs()
    found = attack(
        seen, generator(0, "attack", attack.name, folder.name), partial(watch, f"{attack.name} from {threat}")
    )
    scores = None if foreign.truth is None else _scores(foreign, foreign.truth, attack, found)
    entry |= {
        "targets": len(found.sources), "seconds": round(time.monotonic() - started, 2), "failed": found.failed,
        "iterations": found.iterations, "folder": str(folder),
        "labels": None if found.labels is None else found.labels.tolist(),
    }  # fmt: skip
    entry |= {"why": UNMEASURED} if scores is None else {
        "metrics": scores.metrics, "baselines": dict(scores.baselines), "samples": scores.samples,
    }  # fmt: skip
    _save(folder, attack, found, scores, entry)
    return entry


def _refusal(attack: Attack, threat: str, seen: Observation) -> str | None:
    if threat != seen.threat:
        return f"an update file shows what a server sees of one client; the seat '{threat}' needs a run directory"
    if attack.reads != seen.kind:
        return "reads whole rounds of all clients, and this file holds one client's step: it needs a run directory"
    why = attack.refusal(seen)
    own = (
        " (--faces FOLDER, or synthetic:60x8)"
        if why and "auxiliary-faces" in why and seen.auxiliary_faces is None
        else ""
    )
    return why and why + own


def _folder(foreign: Foreign, attack: Attack) -> Path:
    about = [attack.model_dump(mode="json"), foreign.inputs]
    digest = hashlib.sha256(json.dumps(about).encode()).hexdigest()[:8]
    return foreign.path.with_suffix(".attacks") / f"{attack.name}@{foreign.observation.threat}-{digest}"


def _scores(foreign: Foreign, truth: Truth, attack: Attack, found: Reconstruction) -> Scores:
    seen = foreign.observation
    assert seen.client_updates is not None
    assert seen.auxiliary_faces is not None
    update, spec, faces = seen.client_updates[0], seen.public_constants.spec, seen.auxiliary_faces
    row = {c: i for i, c in enumerate(update.classes)}  # guessing is among these classes, whatever their numbers
    numbered = lambda labels: labels if labels is None or not row else labels.clone().apply_(row.__getitem__)  # noqa: E731
    every = batches(replace(found, labels=numbered(found.labels)), replace(truth, labels=numbered(truth.labels)), None)

    def looked() -> list[Features]:
        stranger = unit_features(spec, update.before, faces[:STRANGERS]).mean(dim=0)
        return [
            Features(unit_features(spec, update.before, g.photos), stranger, update.before.get(HEAD)) for g in every
        ]

    rng = numpy_generator(0, "score", _folder(foreign, attack).name)
    scores = of_steps(every, looked, lambda: [range(len(update.classes))] * len(every), faces, rng)
    if row:
        scores.samples[:] = [{**s, "class": update.classes[s["class"]]} for s in scores.samples]
    if _fell_short(attack, seen, every, found.loss):
        scores.metrics["psnr_gain"]["note"] = (
            "search fell short: it ended above its own loss at the true photos; more may leak"
        )
    return scores


def _fell_short(attack: Attack, seen: Observation, every: Sequence[Batch], loss: Tensor | None) -> bool:
    at_truth = None if loss is None else attack.loss_at(seen, 0, every[0].photos)
    return loss is not None and at_truth is not None and bool(loss[0] > at_truth)


def _save(
    folder: Path, attack: Attack, found: Reconstruction, scores: Scores | None, entry: Mapping[str, Any]
) -> None:  # fmt: skip
    """Owner-only, all of it; summary.json is written last and marks the folder complete."""
    make_folder(folder.parent, private=True)
    make_folder(folder, private=True)
    write_json(folder / "attack.json", attack.model_dump(mode="json"), PRIVATE)
    tensors = {field: value for field in FIELDS if (value := getattr(found, field)) is not None}
    write_tensors(folder / "reconstructions.safetensors", tensors, {"sources": found.sources}, PRIVATE)
    if scores is not None and scores.pictures:
        save_grid(folder / "grid.png", *scores.pictures, scores.samples)
    elif found.images is not None:
        save_row(folder / "grid.png", found.images)
    write_json(folder / "summary.json", entry, PRIVATE)
