"""attack: what each seat makes of a finished run. Reads the run, writes into RUN/attacks, changes nothing else."""

from __future__ import annotations

import csv
import io
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from attacks.canary_inference import CanaryInference
from attacks.membership import MembershipInference
from attacks.registry import ATTACKS
from eval.figures import save_grid
from eval.scoring import Scores
from fedgc.algorithms import ALGORITHMS
from fedgc.config import load_config
from fedgc.errors import RefusedError, RunError, UsageError
from fedgc.files import PRIVATE, make_folder, write_json, write_tensors, write_text
from fedgc.limits import require_address_space
from fedgc.pipeline.bare_files import attack_file
from fedgc.pipeline.canaries import given, score_found
from fedgc.pipeline.candidates import Hidden, adds_up, hide, score_candidates
from fedgc.pipeline.entries import entry_of, make_attack, one_of
from fedgc.pipeline.judging import judged, optimisation_limited
from fedgc.pipeline.linking import acquaintances, told_apart
from fedgc.pipeline.records import summary_of
from fedgc.pipeline.suspects import LineUp, line_up, score_suspects
from fedgc.pipeline.verdicts import Bench
from fedgc.pipeline.watch import Watch, silent
from fedgc.pipeline.working import FIELDS, Job, observed, reconstruct
from fedgc.rng import numpy_generator
from fedgc.runs import RunDirectory
from fedgc.threats import THREATS
from fedgc.transcripts import round_of, size_of
from fedgc.types import Attack, Observation, Reconstruction

DEFAULT_TARGETS = 8  # photos, where an attack is costly


def attack(
    path: Path, attacks: Sequence[str] = (), threats: Sequence[str] = (), *, targets: int | None = None,
    round: str = "last", settings: Sequence[str] = (), force: bool = False, judge: str | None = None,
    faces: str | None = None, truth: Path | None = None, watch: Watch = silent,
) -> list[dict[str, Any]]:  # fmt: skip
    """Run attacks from seats; returns the document of ``attack --json``, one entry an attack and seat.

    Results that exist are read back unless ``force``. judge: who says whether pictures show the person, if anybody.
    path may be a bare file (`fedgc.pipeline.bare_files`); faces and truth are then what the attacker owns, and what is true.
    Raises RefusedError when the only combination asked for is refused.
    """
    require_address_space()
    if path.is_file() or (path.suffix == ".safetensors" and not path.is_dir()):
        given = {"--judge": judge is not None, "--targets": targets is not None, "--round": round != "last"}
        if unfit := [flag for flag, there in given.items() if there]:
            raise UsageError(f"{unfit[0]} is for a run directory, and {path} is a bare file: leave it out")
        return _unless_only_refusal(
            attack_file(path, attacks, threats, settings, faces=faces, truth=truth, force=force, watch=watch)
        )
    if faces is not None or truth is not None:
        raise UsageError(
            "--faces and --truth are for a bare update; a run directory holds what an attacker owns, and the truth"
        )
    chosen = [make_attack(name, settings) for name in attacks or usual_attacks(RunDirectory(path))]
    run = RunDirectory(path)
    if run.finished().get("photos") == "at the nodes":
        raise RunError(
            f"{path} was trained by nodes that kept their photos, and nothing here says what an attack got right: attack an "
            "experiment with the same settings (engine = inprocess, or nodes with source=SPEC)"
        )
    seats = [one_of(name, THREATS, "threat") for name in threats or usual_seats(run)]
    at = tuple(recorded_rounds(run, round))
    bench = None if judge is None else Bench(run, judge, watch)
    jobs = [(a, seat, rounds) for a in chosen for seat in seats for rounds in ([at] if adds_up(a) else zip(at))]
    return _unless_only_refusal([_with_variants(run, *job, targets, force, bench, watch) for job in jobs])


def usual_attacks(run: RunDirectory) -> list[str]:
    """All attacks but that on canaries where there are none."""
    planted = run.load_canaries() is not None
    return [name for name, kind in ATTACKS.items() if planted or kind is not CanaryInference]


def usual_seats(run: RunDirectory) -> list[str]:
    """All seats but that of a probing client where none probed, and that of a server behind secure aggregation: with that defense
    it is the server's, and without it somebody's who is not there."""
    probed = load_config(run.path / "config.toml").probing.rounds > 0
    absent = {"server-secagg"} if probed else {"server-secagg", "probing-client"}
    return [name for name in THREATS if name not in absent]


def _unless_only_refusal(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A refusal is a result among others, and an error where it is all that was asked for."""
    if len(entries) == 1 and entries[0]["refused"]:
        raise RefusedError(f"{entries[0]['attack']} from the seat '{entries[0]['threat']}': {entries[0]['refused']}")
    return entries


def recorded_rounds(run: RunDirectory, which: str) -> list[int]:
    recorded = sorted(set(map(round_of, run.transcripts())))
    if not recorded:
        raise RunError(f"{run.path} has no transcript: train again with --set record.rounds=ends")
    if which == "all":
        return recorded
    if which == "last":
        return recorded[-1:]
    if not which.isdigit() or int(which) not in recorded:
        raise UsageError(f"--round {which}: recorded rounds are {', '.join(map(str, recorded))} (or last, all)")
    return [int(which)]


def _with_variants(
    run: RunDirectory, attack: Attack, threat: str, rounds: tuple[int, ...], targets: int | None, force: bool,
    bench: Bench | None, watch: Watch,
) -> dict[str, Any]:  # fmt: skip
    """The result of one attack from one seat; for recorded steps the smallest batch leads, and others are variants."""
    results = [_result(run, job, force, watch) for job in _jobs(run, attack, threat, rounds, targets)]
    results = results if bench is None else [bench.judged(result) for result in results]
    if not results:
        why = f"no single steps were recorded in round {rounds[-1]}: record.victims was 0"
        return entry_of(run.path, attack, threat, rounds[-1], (), why)
    first, *others = results
    if others and not first["refused"]:
        keys = ("targets", "seconds", "refused", "metrics", "baselines", "samples")
        first = {**first, "variants": {variant_name(r): {k: r[k] for k in keys} for r in others}}
    return first


def _jobs(run: RunDirectory, attack: Attack, threat: str, rounds: tuple[int, ...], targets: int | None) -> list[Job]:
    names = [n for n in run.transcripts() if round_of(n) in rounds]
    if attack.reads == "round":
        whole = tuple(n for n in names if size_of(n) is None)
        return [Job(attack, threat, whole, rounds, None, targets)]
    sizes: dict[tuple[int, int], list[str]] = {}
    for name in names:
        if (size := size_of(name)) is not None:
            sizes.setdefault(size, []).append(name)
    photos = targets or (DEFAULT_TARGETS if attack.costly else None)
    attack = attack.sized(photos or 0)
    return [Job(attack, threat, tuple(sizes[b, k]), rounds, b, photos, k) for b, k in sorted(sizes)]


def variant_name(entry: Mapping[str, Any]) -> str:
    steps = f",local_steps={entry['local_steps']}" if "local_steps" in entry else ""
    return f"batch_size={entry['batch_size']}{steps}"


def _result(run: RunDirectory, job: Job, force: bool, watch: Watch) -> dict[str, Any]:
    folder = run.path / "attacks" / job.folder()
    if force and folder.exists():
        shutil.rmtree(folder)
    if (folder / "summary.json").exists():
        return summary_of(folder, run.path)
    started = time.monotonic()
    owned = run.load_knowledge()
    hidden = hide(run, job.attack, job.transcripts, job.seat)
    suspects = line_up(run, job.seat) if isinstance(job.attack, MembershipInference) else None
    if suspects is not None:
        owned = replace(owned, suspects=suspects.people)
    owned = replace(owned, canaries=given(run, job.attack, job.seat))
    owned = replace(owned, acquaintances=acquaintances(run, job.attack, job.seat, job.transcripts[0]))
    seen: dict[str, Observation] = {}
    left: dict[int, int | None] = dict.fromkeys(map(round_of, job.transcripts), job.targets)
    granted: tuple[str, ...] = ()
    for name in job.transcripts:
        allowed = left[round_of(name)]
        if allowed is not None and allowed <= 0:
            continue
        knowledge = replace(owned, candidates=hidden[name].photos) if name in hidden else owned
        observation, photos = observed(run, job, name, allowed, knowledge)
        refusal = no_message(observation) or job.attack.refusal(observation)
        granted = observation.granted
        if refusal:
            entry = entry_of(
                run.path, job.attack, job.threat, job.rounds[-1], granted, refusal, job.batch_size, job.local_steps
            )
            write_json(make_folder(folder, private=True) / "summary.json", entry, PRIVATE)
            return entry
        seen[name] = observation
        left[round_of(name)] = None if allowed is None else allowed - photos
    stage = f"{job.attack.name} from {job.threat}" + (f", batch {job.batch_size}" if job.batch_size else "")
    found = told_apart(run, job.attack, reconstruct(run, job, seen, partial(watch, stage)))
    limited = sum(optimisation_limited(run, job, name, seen[name], found[name]) for name in found)
    scores = _scores(run, job, found, hidden, suspects)
    entry = entry_of(run.path, job.attack, job.threat, job.rounds[-1], granted, None, job.batch_size, job.local_steps)
    if len(job.rounds) > 1:
        entry["rounds"] = list(job.rounds)
    if limited and "psnr_gain" in scores.metrics:
        entry["optimisation_limited"] = limited
        scores.metrics["psnr_gain"]["note"] = (
            f"search fell short in {limited} updates: it ended above its own loss at the true photos, so that more may leak"
        )
    entry.update(
        targets=len(scores.samples), seconds=round(time.monotonic() - started, 2), metrics=scores.metrics,
        baselines=dict(scores.baselines), samples=scores.samples if job.attack.reads == "step" else [],
        failed=sum(r.failed for r in found.values()), iterations=sum(r.iterations for r in found.values()),
        folder=str(folder.relative_to(run.path)),
    )  # fmt: skip
    _save(folder, job, found, scores, entry)
    shutil.rmtree(folder / "parts", ignore_errors=True)
    return entry


def _scores(
    run: RunDirectory,
    job: Job,
    found: Mapping[str, Reconstruction],
    hidden: Mapping[str, Hidden],
    suspects: LineUp | None,
) -> Scores:
    rng = numpy_generator(run.about()["seed"], "score", job.folder())
    if suspects is not None:
        return score_suspects(found, suspects, rng)
    if isinstance(job.attack, CanaryInference):
        return score_found(run, found, job.seat, rng)
    if hidden:
        card = run.about()["defense"]
        sigma = card.get("noise_multiplier") if card["name"] == "dp-sgd" else None  # the ceiling is of noised photos
        return score_candidates(found, hidden, sigma, rng)
    auxiliary = run.load_knowledge().auxiliary_faces
    assert auxiliary is not None
    return judged(run, job.attack.reads, job.threat, found, auxiliary, rng)


def no_message(observation: Observation) -> str | None:
    """A party that trains alone sends nothing, and a client either keeps to the protocol or departs from it."""
    if observation.global_model is None:
        return (
            "this client departed from the protocol in this round: its seat is 'probing-client'"
            if observation.threat == "client"
            else "no client departed from the protocol in this round: train fedgc with --set probing.rounds=8"
        )
    match ALGORITHMS[observation.algorithm].alone if observation.algorithm in ALGORITHMS else None:
        case "all":
            return "one party holds every photo: there is no message to attack"
        case "first":
            return "this client trains alone and sends nothing: there is no message to attack"
    return None


def _save(
    folder: Path, job: Job, found: Mapping[str, Reconstruction], scores: Scores, entry: Mapping[str, Any]
) -> None:
    """Everything behind a figure, pictures owner-only; summary.json is written last and marks the folder complete."""
    make_folder(folder, private=True)
    write_json(folder / "attack.json", {**job.attack.model_dump(mode="json"), "transcripts": job.transcripts})
    tensors = {
        f"{name}/{field}": value
        for name, r in found.items()
        for field in FIELDS
        if (value := getattr(r, field)) is not None
    }
    whose = {"sources": {name: r.sources for name, r in found.items()}}
    write_tensors(folder / "reconstructions.safetensors", tensors, whose, PRIVATE)
    if scores.samples:
        text = io.StringIO()
        table = csv.DictWriter(text, list(scores.samples[0]))
        table.writeheader()
        table.writerows(scores.samples)
        write_text(folder / "samples.csv", text.getvalue(), PRIVATE)
    if scores.pictures:
        originals, images = scores.pictures
        write_tensors(folder / "pictures.safetensors", {"originals": originals, "found": images}, None, PRIVATE)
        save_grid(folder / "grid.png", originals, images, scores.samples)
    write_json(folder / "summary.json", entry, PRIVATE)
