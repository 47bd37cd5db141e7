"""Differential privacy with and without public pre-training, beside the untrained and the public-only net, on a folder of faces.

People with fewer than ten photos are dealt out by a seed: half are public and pre-train a network at one party, half serve to
calibrate, to test and as the attacker's own faces. People with ten or more are trained on. Every arm is a run directory in --out
(a finished one is found), from configs/faces.toml with the settings of `benchmarks.defenses`; the server names people in it.
"""

from __future__ import annotations

import argparse
import random
import shutil
from functools import partial
from pathlib import Path

from benchmarks.defenses import CONFIG, SHORT, USUAL, best, row_of, side_by_side
from fedgc.config import load_config
from fedgc.pipeline.training import train

FEWEST = 10  # photos of a person who is trained on
ALONE = Path(__file__).parent.parent / "configs" / "centralized.toml"
PRIVACY: dict[str, list[str]] = {
    "no DP": [],
    **{f"epsilon {e}": ["defense.name=dp-sgd", f"defense.epsilon={e}"] for e in (50, 8)},
}
SERVER = tuple(t for t in USUAL if t[:2] == ("identity-linkage", "server"))


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
    public, private = dealt(options.faces, options.out / "faces", options.seed)
    settings = ["data.min_images=4", "federation.rounds=60"]
    config = load_config(ALONE, settings=settings, flags={"data.source": str(public), "seed": options.seed})
    auc = train(config, options.out / "public", resume=True)["utility"]["auc"]["value"]
    print(f"public network, on other public people: AUC {auc:.3f}", flush=True)
    starts = {"from scratch": [], "pre-trained": [f"model.init={options.out / 'public'}"]}
    starts["last layer"] = [*starts["pre-trained"], "model.trained=last"]
    chosen = [
        (algorithm, start, name, [*SHORT, *begin, *privacy])
        for algorithm in options.algorithms for start, begin in starts.items() for name, privacy in PRIVACY.items()
    ]  # fmt: skip
    side_by_side(partial(arm, options, str(private)), chosen)


def arm(options: argparse.Namespace, faces: str, which: tuple[str, str, str, list[str]]) -> str:
    algorithm, start, name, settings = which
    flags = {"data.source": faces, "federation.algorithm": algorithm, "seed": options.seed}
    label = f"{algorithm} {start} {name}".replace(" ", "-")
    about = {"algorithm": algorithm, "start": start, "privacy": name, "seed": options.seed}
    row = row_of(load_config(CONFIG, settings=settings, flags=flags), options.out / label, about, SERVER)
    said = [f"{k} {row[k]['value']:.3f}" for k in ("untrained", "public-only") if row[k]["value"] is not None]
    auc = row["utility"]
    interval = f"[{auc['low']:.3f}, {auc['high']:.3f}]"
    return "\n".join([f"{label}: AUC {auc['value']:.3f} {interval} ({', '.join(said)})", *best(row)])


if __name__ == "__main__":
    main()
