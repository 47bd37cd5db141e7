"""Every defense at three strengths, under FedAvg and FedGC, on a folder of faces: its cost, and the best attack of each seat.

Every arm is an ordinary run directory in --out (a finished one is found, an unfinished one resumed), several at a time, from
configs/faces.toml with twelve rounds and the settings of the arm. Attackers know the defense. Printed for each arm: utility, and
for each seat the best of what was tried on photos of a recorded step, on people and on membership. The best is chosen by its
outcome, which favours the attacker. Arms with `probing` have a client that departs from the protocol, and are read from its seat.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.utility import one_thread
from fedgc.config import Config, load_config
from fedgc.errors import FedgcError
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.training import train

CONFIG = Path(__file__).parent.parent / "configs" / "faces.toml"
SHORT = ["federation.rounds=12", "record.rounds=last", "record.batch_sizes=[1]", "record.victims=8"]
PROBED = ["probing.rounds=8", "record.victims=0", "record.clients=1"]
SEARCH = ("gradient-inversion.iterations=300", "gradient-inversion.polish=false", "gradient-inversion.compiled=false")
CHANGES = ("identity-linkage.source=embedding-changes",)
FEATURES = ("identity-linkage.source=face-embeddings",)
Tried = tuple[str, str, tuple[str, ...], int]  # attack, seat, settings, targets
USUAL: tuple[Tried, ...] = (
    ("label-inference", "server", (), 8),
    ("gradient-inversion", "server", SEARCH, 4),
    ("candidate-match", "server", (), 4),
    ("identity-linkage", "server", (), 0),
    ("identity-linkage", "server", CHANGES, 0),
    ("identity-linkage", "server", FEATURES, 0),
    ("membership-inference", "server", (), 0),
    ("candidate-match", "client", (), 4),
    ("identity-linkage", "client", (), 0),
    ("identity-linkage", "client", CHANGES, 0),
    ("correction-probe", "client", (), 0),
    ("identity-linkage", "outsider", (), 0),
    ("membership-inference", "outsider", (), 0),
)
ALIGNED: tuple[Tried, ...] = tuple(
    ("identity-linkage", "server", ("identity-linkage.through=alignment", f"identity-linkage.known={known}"), 0)
    for known in (0, 16, 64)
)
PROBE: tuple[Tried, ...] = (("correction-probe", "probing-client", (), 0),)
WHAT = {  # what seats are compared by: name -> the metric, and the attacks whose metric means that
    "dB over mean face": ("psnr_gain", ("gradient-inversion",)),
    "photo found of 100": ("rank1", ("candidate-match",)),
    "named at rank 1": ("rank1", ("identity-linkage",)),
    "membership AUC": ("auc", ("membership-inference",)),
    "labels": ("label_accuracy", ("label-inference", "gradient-inversion")),
    "probes within 0.9": ("reached", ("correction-probe",)),
    "probes named": ("rank1", ("correction-probe",)),
}
MEASURES = ("psnr_gain", "rank1", "auc", "label_accuracy", "reached", "strangers_reached", "embedding_cosine")
BY_CORRECTION = (
    "none",
    "embedding-noise",
    "correction-noise",
    "row-step-bound",
    "blinded-correction",
)  # what a probe meets
BESIDE = (
    "dp-sgd, epsilon 50",
    "client-dp, epsilon 50",
    "clip-only, max_grad_norm 0.02",
    "pruning, keep 0.01",
    "quantization, bits 1",
)


def strengths(name: str, key: str, values: tuple[float, ...], *more: str) -> dict[str, list[str]]:
    return {f"{name}, {key} {v:g}": [f"defense.name={name}", f"defense.{key}={v:g}", *more] for v in values}


PEOPLE = {  # by person, and by photo: the same names of arms would hide the unit
    key.replace("dp-sgd", "dp-sgd by person"): settings
    for key, settings in strengths("dp-sgd", "epsilon", (300, 50, 8), "defense.unit=identity").items()
}
EVERYWHERE: dict[str, list[str]] = {
    "none": [],
    **strengths("dp-sgd", "epsilon", (300, 50, 8)),
    **PEOPLE,
    **strengths("client-dp", "epsilon", (300, 50, 8)),
    **strengths("clip-only", "max_grad_norm", (0.5, 0.1, 0.02)),
    **strengths("pruning", "keep", (0.3, 0.1, 0.01)),
    **strengths("quantization", "bits", (8, 4, 1)),
    "secure-aggregation": ["defense.name=secure-aggregation"],
}
CORRECTED: dict[str, list[str]] = {
    **strengths("embedding-noise", "scale", (0.5, 1, 2)),
    **strengths("correction-noise", "noise", (1, 3, 10), "defense.clip=0.01"),
    **strengths("row-step-bound", "bound", (0.2, 0.1, 0.03)),
    "blinded-correction": ["defense.name=blinded-correction"],
}


def arms(algorithms: list[str]) -> Iterator[tuple[str, str, bool, list[str]]]:
    """(algorithm, defense, whether a client probes, settings)"""
    for algorithm in algorithms:
        for name, settings in {**EVERYWHERE, **(CORRECTED if algorithm == "fedgc" else {})}.items():
            yield algorithm, name, False, settings
        for name, settings in {**EVERYWHERE, **CORRECTED}.items():
            if algorithm == "fedgc" and (name.startswith(BY_CORRECTION) or name in BESIDE):
                yield "fedgc", name, True, [*settings, *PROBED]


def tried(name: str, probing: bool) -> tuple[Tried, ...]:
    if probing:
        return PROBE
    if name == "secure-aggregation":  # the server's chair is the one that sees sums
        return tuple((a, "server-secagg" if seat == "server" else seat, s, n) for a, seat, s, n in USUAL)
    return USUAL + (ALIGNED if name == "blinded-correction" else ())


def attacked(out: Path, jobs: tuple[Tried, ...]) -> list[dict[str, Any]]:
    """One entry for each attack: its metrics and baselines, or why it was refused."""
    found = []
    for name, seat, settings, targets in jobs:
        try:
            entries = attack(out, [name], [seat], settings=list(settings), targets=targets or None, force=True)
        except FedgcError as error:
            found.append({"attack": name, "seat": seat, "settings": settings, "refused": str(error)})
            continue
        for e in entries:
            kept = {m: e["metrics"][m] for m in MEASURES if m in e["metrics"]}
            found.append({"attack": name, "seat": seat, "settings": settings, "refused": e["refused"], "metrics": kept,
                          "seconds": e["seconds"]})  # fmt: skip
    return found


def row_of(config: Config, out: Path, about: dict[str, Any], jobs: tuple[Tried, ...]) -> dict[str, Any]:
    """Train and attack one arm, or find beside its run what was found of it before."""
    record = out.parent / f"{out.name}.json"
    if not record.exists():
        record.write_text(json.dumps(_measured(config, out, about, jobs), indent=1) + "\n")
    return dict(json.loads(record.read_text()))


def _measured(config: Config, out: Path, about: dict[str, Any], jobs: tuple[Tried, ...]) -> dict[str, Any]:
    started = time.monotonic()
    done = train(config, out, resume=True)
    return {**about, "utility": done["utility"]["auc"], "untrained": done["baselines"]["untrained"]["auc"],
            "public-only": done["baselines"]["public-only"]["auc"], "privacy": done["privacy"],
            "attacks": attacked(out, jobs), "seconds": time.monotonic() - started}  # fmt: skip


def best(row: dict[str, Any]) -> Iterator[str]:
    """For each seat, the highest value of every measure, with its interval and whose it is."""
    for seat in dict.fromkeys(a["seat"] for a in row["attacks"]):
        for what, (metric, names) in WHAT.items():
            mine = [a for a in row["attacks"] if a["seat"] == seat and a["attack"] in names]
            found = [
                (a["metrics"][metric], a) for a in mine if a.get("metrics", {}).get(metric, {}).get("value") is not None
            ]
            if found:
                m, a = max(found, key=lambda pair: pair[0]["value"])
                how = " ".join(s.partition(".")[2] for s in a["settings"] if not s.startswith("gradient-inversion"))
                yield f"  {seat:<15} {what:<18} {m['value']:7.3f} [{m['low']:.3f}, {m['high']:.3f}]  {a['attack']} {how}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", help="a folder with one sub-folder of photos a person")
    parser.add_argument("--out", type=Path, default=Path("runs/defenses"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithms", nargs="+", default=["fedgc", "fedavg"], choices=["fedgc", "fedavg"])
    parser.add_argument("--only", nargs="+", metavar="DEFENSE", help="arms whose name begins with one of these")
    parser.add_argument("--probing", choices=["also", "only", "not"], default="also")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    chosen = [
        (a, name, probing, settings) for a, name, probing, settings in arms(options.algorithms)
        if (not options.only or name.startswith(tuple(options.only))) and options.probing != ("not" if probing else "only")
    ]  # fmt: skip
    side_by_side(partial(arm, options), chosen)


def side_by_side(job: Callable[[Any], str], arms: Sequence[Any]) -> None:
    """Print what each arm has to say, in their order; a process of one thread a core."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, context, initializer=one_thread) as pool:
        for line in pool.map(job, arms):
            print(line, flush=True)


def arm(options: argparse.Namespace, which: tuple[str, str, bool, list[str]]) -> str:
    """What is printed of one arm."""
    algorithm, name, probing, settings = which
    flags = {"data.source": options.faces, "federation.algorithm": algorithm, "seed": options.seed}
    config = load_config(CONFIG, settings=[*SHORT, *settings, *options.settings], flags=flags)
    about = {"algorithm": algorithm, "defense": name, "probing": probing, "seed": options.seed}
    label = f"{algorithm} {name}{' probing' if probing else ''}".replace(",", "").replace(" ", "-")
    row = row_of(config, options.out / label, about, tried(name, probing))
    auc = row["utility"]
    spent = f", epsilon {row['privacy']['epsilon']:.2f} for one {row['privacy']['unit']}" if row["privacy"] else ""
    said = f"{label}: AUC {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}]{spent} ({row['seconds']:.0f} s)"
    return "\n".join([said, *best(row)])


if __name__ == "__main__":
    main()
