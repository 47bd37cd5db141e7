"""train: a configuration becomes a finished run directory."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from eval.recognition import PairScores
from fedgc.config import Config, read_toml, validated
from fedgc.errors import RunError
from fedgc.federation import Federation
from fedgc.limits import require_address_space
from fedgc.pipeline.engines import Engine, engine_of
from fedgc.pipeline.evaluation import document, embedding, untrained_state, utility
from fedgc.pipeline.initial import Initial, keep_initial, kept_initial, read_initial, require_other_people
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.pipeline.setting import Setting, auxiliary_photos, federation, gallery, notes, photos_of
from fedgc.pipeline.watch import Watch, silent
from fedgc.runs import RunDirectory, provenance, require_new
from fedgc.transcripts import transcript_name
from fedgc.types import Charge, State
from fedgc.victims import manifest_hash, victims

EPSILONS = ("epsilon", "epsilon_pld", "epsilon_identity", "profile")  # all that an accountant says
NAMED_SKIPS = 1000  # files that could not be used, named in run.json
NO_PUBLIC = {"auc": {"value": None, "low": None, "high": None, "n": 0, "why": "no public pre-training"}}
QUICK_PHOTOS = 3  # a calibration person's photos in the utility shown while training
QUICK_TIMES = 48  # at most so often in a run: many short rounds are not held up by it
CALIBRATION_PHOTOS = 8  # of each person who sets the thresholds of a judge


def train(
    config: Config | None,
    out: Path,
    *,
    resume: bool = False,
    watch: Watch = silent,
    after_round: Callable[[], None] | None = None,
    engine: Engine | None = None,
) -> dict[str, Any]:
    """Train and evaluate, or find that it was done; returns the document of ``train --json``.

    A finished run of the same configuration is returned as it is; an unfinished one needs ``resume``; anything else in
    ``out`` is left alone. ``after_round`` is called when a round is safely on disk. engine: where
    clients live, if not where the configuration says.
    """
    require_address_space()
    run = RunDirectory(out)
    if config is None:
        run.about()
        config = validated(read_toml(out / "config.toml"), str(out / "config.toml"))
    if run.finished_with(config.digest()):
        return document(run)
    if not run.exists:
        require_new(run, config.to_toml(), config.digest())  # a folder of something else is not even locked
    keep_freed_memory()
    with run.locked():
        if run.finished_with(config.digest()):  # by who held it until now
            return document(run)
        if not (resume and run.exists):
            require_new(run, config.to_toml(), config.digest())
        elif run.about().get("config_digest") != config.digest():
            raise RunError(f"{out} was trained with another configuration: --resume takes no changed settings")
        return _train(config, run, engine or engine_of(config), watch, after_round or (lambda: None))


def _train(
    config: Config, run: RunDirectory, engine: Engine, watch: Watch, after_round: Callable[[], None]
) -> dict[str, Any]:
    initial = kept_initial(run) if run.exists else read_initial(config)
    setting = engine.prepare(config, watch)
    parties = federation(setting, initial.tensors if initial else None)  # refuses what cannot be trained
    if engine.here:
        parties.require_memory()
    if not run.exists:
        require_other_people(initial, setting.faces.fingerprint())
        _start(setting, parties, run, initial)
    elif run.about().get("dataset") != setting.faces.fingerprint():
        raise RunError(f"{config.data.source} no longer holds the faces that {run.path} was trained on")
    else:
        _require_same_noise(parties, run)
    parties.noise_key = run.noise_key(getattr(config.defense, "noise_seed", None))
    with engine.reached(config, parties) as parties.ask:
        state = _rounds(setting, parties, run, watch, after_round)
    privacy = promise(parties, run.charge(state.ledger), run.metrics())
    watch("measuring utility", 0, 1)
    backbone = parties.backbone
    untrained, fresh_draws = utility(embedding(backbone, untrained_state(config)), setting)
    public, public_draws = utility(embedding(backbone, initial.state()), setting) if initial else (NO_PUBLIC, {})
    trained, draws = utility(embedding(backbone, state), setting)
    run.save_utility_draws({"trained": draws, "untrained": fresh_draws, "public-only": public_draws})
    watch("measuring utility", 1, 1)
    seconds, images = (sum(m[key] for m in run.metrics()) for key in ("seconds", "images"))
    run.update(
        status="finished", seconds=round(seconds, 2), images_per_second=round(images / max(seconds, 1e-9), 1),
        utility=trained, privacy=privacy, baselines={"untrained": untrained, "public-only": public},
    )  # fmt: skip
    return document(run)


def promise(
    parties: Federation, ledger: Sequence[Charge], metrics: Sequence[Mapping[str, Any]]
) -> dict[str, Any] | None:
    """The privacy of a run with all that it rests on; None where none was promised. Where what ran is not what was accounted for,
    every epsilon in it is withheld, and ``why`` says so."""
    spent = parties.defense.spent(ledger)
    if spent is None:
        return None
    drawn = {(m["round"], int(k)): (n, photos) for m in metrics for k, (n, photos) in m.get("drawn", {}).items()}
    plans = [parties.plan(p) for p in parties.parties]
    unknown = next((m["round"] for m in metrics if "drawn" not in m), None)
    why = parties.defense.contradicted(plans, ledger, drawn)
    if why is None and unknown is not None:
        why = f"sampling: nothing tells what was drawn in round {unknown}"
    return dict(spent) if why is None else {**spent, **dict.fromkeys(EPSILONS, None), "why": why}


def _require_same_noise(parties: Federation, run: RunDirectory) -> None:
    """A round that was cut off is played again, and both are one private release only with the same noise."""
    about, now = run.about(), {"defense": parties.defense.card(), "device": str(parties.device), **provenance()}
    changed = [key for key in ("defense", "device", "libraries") if about.get(key) != now[key]]
    if changed and parties.defense.spent(()) is not None:
        raise RunError(
            f"{run.path} was begun with other {' and '.join(changed)} (see its run.json), which would draw other noise for a "
            "round that may have been released: go on as it was begun, or train again"
        )


def _start(setting: Setting, parties: Federation, run: RunDirectory, initial: Initial | None) -> None:
    config, faces = setting.config, setting.faces
    recorded = [
        v for b in config.record.batch_sizes for v in victims(setting.parties, b, config.record.victims, config.seed)
    ]
    run.create(config.to_toml())
    photos, people, of_class = gallery(setting)
    run.save_knowledge(auxiliary_photos(setting), (photos, people))
    run.save_bystanders(
        photos_of(setting, setting.splits.calibration, CALIBRATION_PHOTOS),
        photos_of(setting, setting.splits.test, config.data.held_out),
    )
    if setting.canaries is not None:
        run.save_canaries(setting.canaries)
    names = {c: faces.names[p] for c, p in enumerate(setting.people)}
    run.save_identities({"class_name": names, "class_gallery": of_class, "splits": setting.splits.to_json()})
    run.noise_key(getattr(config.defense, "noise_seed", None))
    run.begin(
        {
            "config_digest": config.digest(), "seed": config.seed, "device": str(setting.device),
            "algorithm": config.federation.algorithm, "rounds": config.federation.rounds,
            "clients": len(setting.parties), "classes": setting.classes, "photos": "here" if setting.people else "at the nodes",
            "images": sum(len(p.photos) for p in parties.parties), "source": config.data.source,
            "dataset": faces.fingerprint(), "skipped": len(faces.skipped),
            "skipped_files": [{"path": s.path, "reason": s.reason} for s in faces.skipped[:NAMED_SKIPS]],
            "splits": setting.splits.hashes(faces),
            "people": {k: len(getattr(setting.splits, k)) for k in ("train", "calibration", "test", "auxiliary")},
            "victims": manifest_hash(recorded), "notes": notes(setting), "defense": parties.defense.card(),
            "canaries": config.audit.canaries,
            "init": keep_initial(run, initial, config.spec()) if initial else None,
        },
    )  # fmt: skip


def _rounds(
    setting: Setting, parties: Federation, run: RunDirectory, watch: Watch, after_round: Callable[[], None]
) -> State:
    """Play what is left of the rounds; each is on disk before the next one starts."""
    loaded = run.load_state()
    state = parties.initial_state() if loaded is None else on_device(loaded, setting.device)
    run.forget_after(state.round)
    record, rounds = setting.config.record, setting.config.federation.rounds
    quick = QuickUtility(setting, parties)
    for t in range(state.round + 1, rounds + 1):
        clock = time.monotonic()
        recorded = record.at(t, rounds)
        if recorded:
            _record_steps(setting, parties, state, run)
        try:
            result = parties.play(state, keep=record.keeps if recorded else lambda client: False)
        except Exception:
            run.charge(
                (*state.ledger, *parties.charges(t))
            )  # what arrived before the failure was released, and is paid for
            raise
        state = result.state
        ledger = run.charge(state.ledger)
        if recorded:
            run.save_transcript(transcript_name(t), result.transcript)
        privacy = parties.defense.spent([c for c in ledger if c.round <= t], quick=True)
        metrics = {
            "round": t, "loss": round(result.loss, 5), "auc": quick(state, rounds), "images": result.images,
            "epsilon": privacy["epsilon"] if privacy else None, "seconds": round(time.monotonic() - clock, 3),
            **({"dropped_gradients": result.dropped} if result.dropped else {}),
            **({"drawn": {str(k): list(counts) for (_, k), counts in result.drawn.items()}} if privacy else {}),
            **({"missing": dict(result.missing)} if result.missing else {}),
        }  # fmt: skip
        run.save_round(state, metrics, parties.spec)
        after_round()
        watch("training", t, rounds, describe(metrics))
    return state


def _record_steps(setting: Setting, parties: Federation, state: State, run: RunDirectory) -> None:
    record = setting.config.record
    for batch, steps in product(record.batch_sizes, record.local_steps):
        for number, (photos, labels) in enumerate(victims(setting.parties, batch, record.victims, setting.config.seed)):
            transcript, truth = parties.play_step(state, number, photos, labels, record.keeps, steps)
            name = transcript_name(state.round + 1, batch, number, steps)
            run.save_truth(name, truth)
            run.save_transcript(name, transcript)


class QuickUtility:
    """AUC on a few photos of the calibration people: what progress shows while training, and no result."""

    def __init__(self, setting: Setting, parties: Federation) -> None:
        faces = setting.faces
        index = torch.cat([faces.of([p])[:QUICK_PHOTOS] for p in setting.splits.calibration])
        self.photos, self.people = faces.images[index], faces.labels[index]
        self.backbone = copy.deepcopy(parties.backbone)

    def __call__(self, state: State, rounds: int) -> float | None:
        """After the last round, and evenly before it; None in between."""
        if (rounds - state.round) % math.ceil(rounds / QUICK_TIMES):
            return None
        pairs = PairScores.from_embeddings(embedding(self.backbone, state)(self.photos), self.people)
        return round(float(pairs.curve().auc()[0]), 5)


def on_device(state: State, device: torch.device) -> State:
    backbone, momentum, probes, kept = (
        {name: tensor.to(device) for name, tensor in tensors.items()}
        for tensors in (state.backbone, state.momentum, state.probes, state.kept)
    )
    rows = state.rows.to(device)
    return replace(state, backbone=backbone, rows=rows, momentum=momentum, probes=probes, kept=kept)


def describe(metrics: Mapping[str, Any]) -> str:
    """One round in a few words."""
    auc, epsilon = metrics["auc"], metrics["epsilon"]
    said = [
        f"loss {metrics['loss']:.3f}",
        "" if auc is None else f"AUC {auc:.3f}",
        "" if epsilon is None else f"ε ≤ {epsilon:.2f}",
        *(f"without client {k}: {why}" for k, why in metrics.get("missing", {}).items()),
    ]
    return ", ".join(filter(None, said))
