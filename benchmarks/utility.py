"""Utility of the schemes on a folder of faces, over seeds: AUC on people never trained on, how much of the centralised gain each
scheme keeps, and differences of schemes on the same people.

Every run is an ordinary run directory in --out, trained from the configurations in configs/ (a finished one is found, an
unfinished one resumed), several at a time with one thread each. A seed draws the people of every set, their clients and the
weights. "Kept" is (AUC - untrained) / (centralised - untrained). Intervals resample the test people of each seed, the same draws
for every scheme, and average over seeds: they speak of these seeds, whose single values are printed beside.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.pairs import PairScores
from eval.statistics import DRAWS, Floats, percentile_interval, weight_blocks
from fedgc.config import Config, load_config, read_toml, validated
from fedgc.data.splits import Splits
from fedgc.models import build_backbone
from fedgc.pipeline.evaluation import embedding, untrained_state
from fedgc.pipeline.setting import load_config_faces
from fedgc.pipeline.training import train
from fedgc.rng import numpy_generator
from fedgc.runs import RunDirectory

CONFIGS = Path(__file__).parent.parent / "configs"
SCHEMES = {
    "centralized": ("centralized", "centralized"),
    **{f"{algorithm}, 8 clients": (algorithm, "clients-8") for algorithm in ("fedavg", "fedpe", "fedgc")},
    **{f"{algorithm}, 37 clients": (algorithm, "clients-37") for algorithm in ("fedavg", "fedpe", "fedgc")},
}
DIFFERENCES = tuple((f"fedgc, {k} clients", f"{other}, {k} clients") for k in (8, 37) for other in ("fedpe", "fedavg"))


def config_of(scheme: str, seed: int, faces: str, settings: list[str]) -> Config:
    algorithm, name = SCHEMES[scheme]
    flags = {"data.source": faces, "federation.algorithm": algorithm, "seed": seed}
    return load_config(CONFIGS / f"{name}.toml", settings=settings, flags=flags)


def one_thread() -> None:
    torch.set_num_threads(1)


def run(config: Config, out: Path) -> str:
    result = train(config, out, resume=True)
    return f"{out.name}: AUC {result['utility']['auc']['value']:.3f}, {result['seconds']:.0f} s"


def auc_draws(path: Path, untrained: bool = False) -> tuple[float, Floats]:
    """AUC of a run on its test people, and under DRAWS resamplings of them that depend on the seed alone."""
    directory = RunDirectory(path)
    config = validated(read_toml(path / "config.toml"))
    faces = load_config_faces(config)
    splits = Splits.from_json(directory.load_identities()["splits"])
    index = faces.of(splits.test)
    state = untrained_state(config) if untrained else directory.load_state()
    assert state is not None
    embed = embedding(build_backbone(config.spec(), config.seed), state)
    scores = PairScores.from_embeddings(embed(faces.images[index]), faces.labels[index])
    rng = numpy_generator(config.seed, "utility of schemes")
    draws = [scores.curve(w).auc() for w in weight_blocks(len(splits.test), DRAWS, rng, width=60_000)]
    return float(scores.curve().auc()[0]), np.concatenate(draws)


def measured(values: list[tuple[float, Floats]]) -> dict[str, Any]:
    """Mean over seeds with its interval, and each seed's value."""
    value = float(np.mean([v for v, _ in values]))
    low, high = percentile_interval(value, np.mean([d for _, d in values], axis=0))
    return {"value": value, "low": low, "high": high, "seeds": [round(v, 4) for v, _ in values]}


def kept(auc: tuple[float, Floats], untrained: tuple[float, Floats], centralized: tuple[float, Floats]) -> Any:
    return tuple((a - u) / (c - u) for a, u, c in zip(auc, untrained, centralized, strict=True))  # the value, its draws


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", help="a folder with one sub-folder of photos a person")
    parser.add_argument("--out", type=Path, default=Path("runs/utility"))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--only", nargs="+", default=list(SCHEMES), choices=list(SCHEMES), metavar="SCHEME")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    cells = {(scheme, seed): options.out / f"{scheme.replace(', ', '-').replace(' ', '-')}-seed{seed}"
             for seed in range(options.seeds) for scheme in options.only}  # fmt: skip
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(os.cpu_count() or 1, context, initializer=one_thread) as pool:
        jobs = [pool.submit(run, config_of(*cell, options.faces, options.settings), out) for cell, out in cells.items()]
        for job in jobs:
            print(job.result(), flush=True)
        firsts = [cells[options.only[0], seed] for seed in range(options.seeds)]
        found = {cell: pool.submit(auc_draws, out) for cell, out in cells.items()}
        blank = [pool.submit(auc_draws, out, True) for out in firsts]
        auc = {scheme: [found[scheme, seed].result() for seed in range(options.seeds)] for scheme in options.only}
        untrained = [job.result() for job in blank]
    table: dict[str, Any] = {"untrained": {"auc": measured(untrained)}}
    for scheme in options.only:
        table[scheme] = {"auc": measured(auc[scheme])}
        if "centralized" in auc and scheme != "centralized":
            table[scheme]["kept"] = measured(
                [kept(*three) for three in zip(auc[scheme], untrained, auc["centralized"], strict=True)]
            )
    for one, other in DIFFERENCES:
        if one in auc and other in auc:
            paired = [(a - b, x - y) for (a, x), (b, y) in zip(auc[one], auc[other], strict=True)]
            table[f"{one} less {other}"] = {"auc": measured(paired)}
    for name, row in table.items():
        for measure, m in row.items():
            print(f"{name:<44} {measure:<5} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]  seeds {m['seeds']}")
    (options.out / "utility.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
