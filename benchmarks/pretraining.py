"""Differential privacy with and without public pre-training, beside the untrained and the public-only net, on a folder of faces.

People with fewer than ten photos are dealt out by a seed: half are public and pre-train a network at one party, half serve to
calibrate, to test and as the attacker's own faces. People with ten or more are trained on. Every arm is a run directory in --out
(a finished one is found), from configs/faces.toml with the settings of `benchmarks.defenses`, and is attacked as there.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from pathlib import Path

import torch

from benchmarks.defenses import CONFIG, SHORT, USUAL, best, row_of
from fedgc.config import load_config
from fedgc.pipeline.training import train

FEWEST = 10  # photos of a person who is trained on
ALONE = Path(__file__).parent.parent / "configs" / "centralized.toml"
PRIVACY: dict[str, list[str]] = {
    "no DP": [],
    **{f"epsilon {e}": ["defense.name=dp-sgd", f"defense.epsilon={e}"] for e in (300, 50, 8)},
    "epsilon 8 for a person": ["defense.name=dp-sgd", "defense.epsilon=8", "defense.unit=identity"],
}
SERVER = tuple(t for t in USUAL if t[1] == "server" and t[0] != "membership-inference")


def dealt(faces: Path, out: Path, seed: int) -> tuple[Path, Path]:
    """Folders of the public people, and of all others."""
    count = {p.name: len(list(p.iterdir())) for p in sorted(faces.iterdir()) if p.is_dir()}
    few = [name for name, photos in count.items() if photos < FEWEST]
    random.Random(seed).shuffle(few)
    public = set(few[: len(few) // 2])
    folders = out / "public", out / "private"
    for name in count:
        target = folders[name not in public] / name
        if not target.exists():
            shutil.copytree(faces / name, target)
    return folders


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", type=Path, help="a folder with one sub-folder of photos a person")
    parser.add_argument("--out", type=Path, default=Path("runs/pretraining"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithms", nargs="+", default=["fedgc", "fedavg"], choices=["fedgc", "fedavg"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    public, private = dealt(options.faces, options.out / "faces", options.seed)
    settings = ["data.min_images=4", "federation.rounds=60"]
    config = load_config(ALONE, settings=settings, flags={"data.source": str(public), "seed": options.seed})
    auc = train(config, options.out / "public", resume=True)["utility"]["auc"]["value"]
    print(f"public network, on other public people: AUC {auc:.3f}", flush=True)
    for algorithm in options.algorithms:
        for start, begin in (("from scratch", []), ("pre-trained", [f"model.init={options.out / 'public'}"])):
            for name, privacy in PRIVACY.items():
                flags = {"data.source": str(private), "federation.algorithm": algorithm, "seed": options.seed}
                config = load_config(CONFIG, settings=[*SHORT, *begin, *privacy], flags=flags)
                label = f"{algorithm} {start} {name}".replace(" ", "-")
                record = options.out / f"{label}.json"
                if not record.exists():
                    about = {"algorithm": algorithm, "start": start, "privacy": name, "seed": options.seed}
                    record.write_text(json.dumps(row_of(config, options.out / label, about, SERVER), indent=1) + "\n")
                row = json.loads(record.read_text())
                said = {what: row[what]["value"] for what in ("utility", "untrained", "public-only")}
                print(f"{label}: AUC", ", ".join(f"{k} {v:.3f}" for k, v in said.items() if v is not None),
                      f"[{row['utility']['low']:.3f}, {row['utility']['high']:.3f}]")  # fmt: skip
                print("\n".join(best(row)), flush=True)


if __name__ == "__main__":
    main()
