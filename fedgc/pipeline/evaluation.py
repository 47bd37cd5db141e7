"""evaluate: utility of a model on people it was not trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.pair_protocol import ListedPairs, calibrated_accuracy, fold_accuracy, pair_auc
from eval.pairs import PairScores, unit
from eval.recognition import verified
from eval.statistics import Floats, Measured
from fedgc.config import Config, put, read_toml, validated
from fedgc.data.align import aligned, shorter_side_needed
from fedgc.data.faces import FaceSet, synthetic_spec
from fedgc.data.folder import Folder, UnusableImageError, decode, read_bytes, scan, skip
from fedgc.data.pair_lists import Pair, PairList, Photo, locate, read_pairs
from fedgc.data.splits import Splits
from fedgc.errors import DataError, RunError, UsageError
from fedgc.files import holding
from fedgc.models import build_backbone, embed, state_tensors
from fedgc.pipeline.initial import kept_initial
from fedgc.pipeline.setting import Setting, load_config_faces
from fedgc.pipeline.watch import Watch, silent
from fedgc.rng import numpy_generator
from fedgc.runs import RunDirectory
from fedgc.types import BACKBONE, State

FEWEST_STRANGERS = 4  # two to test on, two for thresholds

Embedding = Callable[[Tensor], Tensor]

BATCH = 256  # photos decoded before they are embedded
NAMED_MISSING = 20


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


def utility(embed_photos: Embedding, setting: Setting) -> tuple[dict[str, Any], dict[str, Floats]]:
    """Verification and identification on the test people, thresholds from the calibration people; and what each figure is
    in each draw of people (`eval.recognition.verified`)."""
    return _measured(embed_photos, setting.faces, setting.splits.test, setting.splits.calibration, setting.config.seed)


def people_utility(
    embed_photos: Embedding, faces: FaceSet, test: tuple[int, ...], calibration: tuple[int, ...], seed: int
) -> dict[str, Any]:
    return _measured(embed_photos, faces, test, calibration, seed)[0]


def _measured(
    embed_photos: Embedding, faces: FaceSet, test: tuple[int, ...], calibration: tuple[int, ...], seed: int
) -> tuple[dict[str, Any], dict[str, Floats]]:
    index, held = faces.of(test), faces.of(calibration)
    measured, drawn = verified(
        embed_photos(faces.images[index]), faces.labels[index],
        embed_photos(faces.images[held]), faces.labels[held], rng=numpy_generator(seed, "utility"),
    )  # fmt: skip
    return {name: m.to_json() if isinstance(m, Measured) else m for name, m in measured.items()}, drawn


def evaluate(
    path: Path, data: str | None = None, watch: Watch = silent, *, pairs: Path | None = None
) -> dict[str, Any]:
    """Measure a finished run again: on its own test people, or on the people of another source, none of them trained on.

    Of another source, half of the people serve for thresholds and half for the test; who has the name of somebody trained on
    is left out and counted (``excluded_trained``). ``pairs`` is a list of pairs of
    the source's photos (`fedgc.data.pair_lists`), measured beside; of the run's own source nothing else is then read,
    and the utility is the one that training recorded. Nothing in the run changes.
    """
    listed = None if pairs is None else read_pairs(pairs)
    run = RunDirectory(path)
    result = document(run)
    config = validated(read_toml(path / "config.toml"), str(path / "config.toml"))
    state = run.load_state()
    if state is None or state.round != result["rounds"]:  # an earlier state is no measure of what was trained
        raise RunError(f"{path} has no intact state of its last round: restore it or train again")
    elsewhere = config if data is None else _with_source(config, data)
    backbone = build_backbone(config.spec(), config.seed)
    if listed is not None:
        own = embedding(copy.deepcopy(backbone), state)
        result["pairs"] = list_utility(run, config, elsewhere.data.source, listed, own, watch)
        if data is None:
            return {**result, "source": config.data.source}
    config = elsewhere
    faces = load_config_faces(config, watch)
    names = set() if data is None else set(run.load_identities()["class_name"].values())
    test, calibration = _unseen(run, faces, config) if data is None else _halves(faces, config.seed, names)
    result["excluded_trained"] = len(names & set(faces.names))
    initial = kept_initial(run)

    def measured(state: State) -> dict[str, Any]:
        return people_utility(embedding(backbone, state), faces, test, calibration, config.seed)

    baselines = {**result["baselines"], "untrained": measured(untrained_state(config))}
    if initial is not None:
        baselines["public-only"] = measured(initial.state())
    trained = measured(state)
    return {**result, "source": config.data.source, "utility": trained, "baselines": baselines}


def _with_source(config: Config, source: str) -> Config:
    tree = config.model_dump(mode="json", exclude_none=True)
    put(tree, "data.source", source)
    return validated(tree)


def _unseen(run: RunDirectory, faces: FaceSet, config: Config) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if faces.fingerprint() != run.about()["dataset"]:
        raise RunError(f"{config.data.source} no longer holds the faces that {run.path} was trained on")
    splits = Splits.from_json(run.load_identities()["splits"])
    return splits.test, splits.calibration


def _halves(faces: FaceSet, seed: int, trained: set[str]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(test, calibration) of the people whose names are not those of people trained on."""
    strangers = [person for person, name in enumerate(faces.names) if name not in trained]
    if len(strangers) < FEWEST_STRANGERS:
        raise DataError(
            f"{faces.source!r} has {len(strangers)} people who have no name of somebody this run was trained on, and "
            f"{FEWEST_STRANGERS} are needed, half for thresholds and half for the test: give other faces"
        )
    order = torch.randperm(len(strangers), generator=torch.Generator().manual_seed(seed)).tolist()
    half = len(order) // 2
    test, calibration = (tuple(sorted(strangers[i] for i in part)) for part in (order[half:], order[:half]))
    return test, calibration


def list_utility(
    run: RunDirectory, config: Config, source: str, listed: PairList, embed_photos: Embedding, watch: Watch
) -> dict[str, Any]:
    """Accuracy and AUC on the listed pairs of a folder, without pairs of anybody who was trained on.

    With folds, each fold's threshold comes from the others. With one fold it comes from the run's calibration people,
    whose pairs are then left out too. Only photos that this needs are decoded, each once.
    """
    if synthetic_spec(source) is not None:
        raise UsageError(f"--pairs names photos of a folder, and {source!r} has no such names: add --data FOLDER")
    folder = scan(source)
    with holding(run.path / "private" / "identities.json"):
        trained = set(run.load_identities()["class_name"].values())
    apart = [pair for pair in listed.pairs if not pair.people & trained]
    rest = apart
    calibrated = listed.folds == 1
    if calibrated:
        calibration, setters = _calibration(run, config, embed_photos, watch)
        rest = [pair for pair in apart if not pair.people & setters]
    found, missing = locate(dict.fromkeys(photo for pair in rest for photo in pair.photos), folder)
    embeddings, unusable = _embedded(folder, list(found.values()), config, embed_photos, watch, "reading listed photos")
    missing |= {photo: unusable[file] for photo, file in found.items() if file in unusable}
    kept = [pair for pair in rest if not missing.keys() & set(pair.photos)]
    scored = _scored(kept, {photo: embeddings[file] for photo, file in found.items() if file in embeddings})
    rng = numpy_generator(config.seed, "listed pairs")
    if calibrated:
        accuracy = calibrated_accuracy(scored, calibration, rng=rng)
        origin = f"the run's {calibration.identities} calibration people, whose own pairs are left out"
    else:
        accuracy, origin = fold_accuracy(scored, listed.folds), f"the other {listed.folds - 1} folds, for each fold"
    return {
        "accuracy": accuracy.to_json(), "auc": pair_auc(scored, rng=rng).to_json(), "source": source,
        "folds": listed.folds, "listed": len(listed.pairs), "pairs": len(kept), "matched": int(scored.matched.sum()),
        "people": scored.identities, "excluded_trained": len(listed.pairs) - len(apart),
        "excluded_calibration": len(apart) - len(rest), "excluded_missing": len(rest) - len(kept),
        "missing": len(missing),
        "missing_files": [
            {"path": photo.stem, "reason": reason} for photo, reason in sorted(missing.items())[:NAMED_MISSING]
        ],
        "threshold_from": origin,
    }  # fmt: skip


def _scored(pairs: Sequence[Pair], embeddings: Mapping[Photo, Tensor]) -> ListedPairs:
    people = sorted({person for pair in pairs for person in pair.people})
    number = {person: n for n, person in enumerate(people)}
    scores = np.empty(0)
    if pairs:
        left, right = (unit(torch.stack([embeddings[pair.photos[side]] for pair in pairs])) for side in (0, 1))
        scores = np.round((left * right).sum(axis=1), 10)
    both = [[number[photo.person] for photo in pair.photos] for pair in pairs]
    fold = np.array([pair.fold for pair in pairs], dtype=np.int64)
    return ListedPairs(scores, np.array(both, dtype=np.int64).reshape(-1, 2), fold)


def _calibration(
    run: RunDirectory, config: Config, embed_photos: Embedding, watch: Watch
) -> tuple[PairScores, set[str]]:
    """Scores of the run's calibration people, from its own source, and their names."""
    about = run.about()
    if synthetic_spec(config.data.source) is not None or about["skipped"] > len(about["skipped_files"]):
        faces = load_config_faces(config, watch)
        _, people = _unseen(run, faces, config)
        index = faces.of(people)
        embedded = embed_photos(faces.images[index])
        return PairScores.from_embeddings(embedded, faces.labels[index]), {faces.names[p] for p in people}
    folder = scan(config.data.source)
    faces = _unread(folder, {entry["path"] for entry in about["skipped_files"]})
    splits = Splits.from_json(run.load_identities()["splits"])
    try:
        same = splits.hashes(faces) == about["splits"]
    except IndexError:
        same = False
    files = [faces.files[i] for i in faces.of(splits.calibration).tolist()] if same else []
    embeddings, unusable = _embedded(folder, files, config, embed_photos, watch, "reading calibration photos")
    if not same or unusable:
        raise RunError(f"{config.data.source} no longer holds the faces that {run.path} was trained on")
    labels = faces.labels[faces.of(splits.calibration)]
    scores = PairScores.from_embeddings(torch.stack([embeddings[file] for file in files]), labels)
    return scores, {faces.names[p] for p in splits.calibration}


def _unread(folder: Folder, left_out: Collection[str]) -> FaceSet:
    """People and files as `load_faces` would find them, without a pixel: it needs no image to tell who is who."""
    root = folder.root
    names: list[str] = []
    files: list[str] = []
    labels: list[int] = []
    for person in folder.people:
        paths = [f"{person.name}/{file}" for file in person.files]
        usable = [path for path in paths if skip(root, root / path, "").path not in left_out]
        if usable:
            labels += [len(names)] * len(usable)
            names.append(person.name)
            files += usable
    blank = torch.empty((len(files), 3, 0, 0), dtype=torch.uint8)
    return FaceSet(blank, torch.tensor(labels, dtype=torch.int64), tuple(names), tuple(files), str(root))


def _embedded(
    folder: Folder, files: Sequence[str], config: Config, embed_photos: Embedding, watch: Watch, stage: str
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Embedding (d,) of each file, in batches so that memory does not grow with the list, and why others have none."""
    data = config.data
    needed = shorter_side_needed(data.align, data.image_size, data.center_fraction)
    embeddings: dict[str, Tensor] = {}
    unusable: dict[str, str] = {}
    for start in range(0, len(files), BATCH):
        photos: dict[str, Tensor] = {}
        for done, file in enumerate(files[start : start + BATCH], start + 1):
            try:
                image = decode(read_bytes(folder.root / file), shorter_side=needed)
                photos[file] = torch.from_numpy(aligned(image, data.align, data.image_size, data.center_fraction))
            except UnusableImageError as problem:
                unusable[file] = str(problem)
            watch(stage, done, len(files))
        if photos:
            embeddings |= zip(photos, embed_photos(torch.stack(list(photos.values()))), strict=True)
    return embeddings, unusable


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
    more = {"skipped_files": about["skipped_files"], "notes": about.get("notes", [])}
    return {"run": str(run.path), **{key: about[key] for key in keys}, **more}
