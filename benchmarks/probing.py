"""What a client under FedGC reads of strangers' class embeddings, over seeds and settings, on a folder of faces.

Every run is an ordinary run directory in --out, from configs/faces.toml with the settings of its scenario, made with one thread
(a finished one is found, an unfinished one resumed). The first client departs from the protocol where a scenario says so
(`fedgc.probing`). Printed for each round that is attacked: mean cosine of a guess with the nearest class embedding of a stranger,
share of guesses and of strangers beyond 0.9, share named at rank 1, and utility.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from eval.probes import REACHED
from fedgc.config import Config, load_config
from fedgc.correction import gradient
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.linking import foreign_rows
from fedgc.pipeline.training import train
from fedgc.probing import Probing, next_probes
from fedgc.runs import RunDirectory
from fedgc.types import HEAD

CONFIG = Path(__file__).parent.parent / "configs" / "faces.toml"
RECORD = ["record.victims=0", "record.clients=1"]
FROZEN_STEP = 0.05
LATE, EARLY = "record.rounds=[17,18,19,20,22,24]", "record.rounds=[1,2,3,4,6,8,12,24]"
EIGHT = ["probing.rounds=8", LATE]
MEASURES = ("embedding_cosine", "reached", "strangers_reached", "rank1")
SCENARIOS: dict[str, list[str]] = {
    "curious": ["record.rounds=[2,6,12,18,24]"],
    "probing": EIGHT,
    "probing from the first round": ["probing.rounds=24", EARLY],
    "probing, four sets of random probes": [
        "probing.rounds=24", "probing.restart=6", "probing.start=random", "record.rounds=[6,12,18,24]",
    ],
    **{f"probing, scale {s}": [*EIGHT, f"correction.scale={s}"] for s in (2, 4, 16, 30)},
    **{f"curious, scale {s}": [f"correction.scale={s}", "record.rounds=[12,24]"] for s in (4, 16, 30)},
    **{f"probing, weight {w}": [*EIGHT, f"correction.weight={w}"] for w in (0.1, 1, 50)},
    **{f"probing, {n} clients": [*EIGHT, f"federation.clients={n}"] for n in (3, 16, 37)},
    "probing, 46 people": [*EIGHT, "data.min_images=20"],
    "probing, random start": [*EIGHT, "probing.start=random"],
    "probing, fedcos": [*EIGHT, "federation.algorithm=fedcos"],
    "probing, fedaws": [*EIGHT, "federation.algorithm=fedaws"],
    "probing, raw products, long probes": [*EIGHT, "correction.normalised=false", "probing.length=4"],
    **{f"probing, row-step-bound {b}": [*EIGHT, "defense.name=row-step-bound", f"defense.bound={b}"] for b in (0.2, 0.1, 0.03)},
    **{
        f"probing, correction-noise {n}": [
            *EIGHT, "defense.name=correction-noise", "defense.clip=0.01", f"defense.noise={n}",
        ]
        for n in (1, 3, 10)
    },
}  # fmt: skip


def config_of(scenario: str, seed: int, faces: str, settings: list[str]) -> Config:
    return load_config(
        CONFIG, settings=[*RECORD, *SCENARIOS[scenario], *settings], flags={"data.source": faces, "seed": seed}
    )


def rows_of(scenario: str, config: Config, out: Path) -> list[dict[str, Any]]:
    """One row for each recorded round, and one for all of them together where probes begin anew."""
    seat = "probing-client" if config.probing.rounds else "client"
    utility = train(config, out, resume=True)["utility"]["auc"]
    rounds = [str(t) for t in config.record.rounds] + (["all"] if config.probing.restart else [])
    rows = []
    for which in rounds:
        (entry,) = attack(out, ["correction-probe"], [seat], round=which)
        kept = {
            name: {k: entry["metrics"][name][k] for k in ("value", "low", "high", "n", "chance")} for name in MEASURES
        }
        rival = {b: {m: entry["baselines"][b][m]["value"] for m in MEASURES} for b in entry["baselines"]}
        rows.append({"scenario": scenario, "seed": config.seed, "round": which, "seat": seat, "auc": utility,
                     "metrics": kept, "baselines": rival})  # fmt: skip
    return rows


def frozen(out: Path, scale: float, rounds: int = 12) -> list[str]:
    """The same probes against the class embeddings that a run ended with, which do not move any more."""
    transcript = RunDirectory(out).load_transcript(RunDirectory(out).transcripts()[-1])
    rows, _ = foreign_rows(transcript)
    own = transcript.returned[0][HEAD]
    owner = torch.tensor([0] * len(own) + [transcript.owners[c] for c in foreign_rows(transcript)[1]])
    plan, received, probes, lines = Probing(0, 1), own, None, []
    unit = F.normalize(rows, dim=1)
    for t in range(1, rounds + 1):
        probes = next_probes(plan, t, 0, received, probes)
        stacked = torch.cat([probes.sent, rows])
        received = (stacked - FROZEN_STEP * gradient(stacked, owner, scale))[: len(own)]
        nearest, which = (F.normalize(probes.sent, dim=1) @ unit.T).max(dim=1)
        reached = nearest >= REACHED
        strangers = len(set(which[reached].tolist())) / len(rows)
        lines.append(f"frozen strangers, scale {scale:g}, round {t:>2}: embedding_cosine {float(nearest.mean()):.3f} "
                     f"reached {float(reached.float().mean()):.3f} strangers_reached {strangers:.3f}")  # fmt: skip
    return lines


def line(row: dict[str, Any]) -> str:
    said = " ".join(f"{name} {m['value']:.3f} [{m['low']:.3f}, {m['high']:.3f}]" for name, m in row["metrics"].items())
    return f"{row['scenario']:<40} seed {row['seed']} round {row['round']:>3}: {said} AUC {row['auc']['value']:.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", help="a folder with one sub-folder of photos a person")
    parser.add_argument("--out", type=Path, default=Path("runs/probing"))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", default=list(SCENARIOS), choices=list(SCENARIOS), metavar="SCENARIO")
    parser.add_argument("--set", dest="settings", action="append", default=[], metavar="KEY=VALUE")
    options = parser.parse_args()
    torch.set_num_threads(1)
    table = []
    for seed in range(options.first_seed, options.first_seed + options.seeds):
        for scenario in options.only:
            name = scenario.replace(", ", "-").replace(" ", "-")
            for row in rows_of(
                scenario, config_of(scenario, seed, options.faces, options.settings), options.out / f"{name}-seed{seed}"
            ):
                table.append(row)
                print(line(row), flush=True)
    if "curious" in options.only:
        for scale in (2, 4, 8, 16, 30):
            print("\n".join(frozen(options.out / f"curious-seed{options.first_seed}", scale)), flush=True)
    (options.out / "probing.json").write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
