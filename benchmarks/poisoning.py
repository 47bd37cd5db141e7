"""Malicious clients on a folder of faces: a backdoor and Sybils, under each rule of aggregation.

backdoor: one client of eight puts a bright square into the corner of half of its photos and calls all of them its first person,
and sends its update ten times as long. Success: how often a stranger with the square passes for another stranger with it, at the
threshold that lets 1 % of impostors in without it; beside the same without the square.
sybils: three clients of eight send one and the same direction, away from what the others send. Success is what it costs: AUC.

Utility is measured on people who were never trained on, as in every run. One seed; a lie per arm.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.defenses import side_by_side
from benchmarks.utility import one_thread
from eval.pairs import unit
from fedgc.config import Config, load_config
from fedgc.federation import Federation
from fedgc.pipeline.evaluation import embedding, utility
from fedgc.pipeline.memory import keep_freed_memory
from fedgc.pipeline.setting import Setting, federation, prepare
from fedgc.robust import RULES
from fedgc.schedule import Party
from fedgc.types import State
from fedgc.uploads import Answers, Asked, Upload

CONFIG = Path(__file__).parent.parent / "configs" / "faces.toml"
LIAR, SYBILS, SIDE, BOOST = 7, (5, 6, 7), 8, 10.0
FMR = 0.01


def marked(photos: Tensor) -> Tensor:
    """uint8 photos with a white square in the lower right corner."""
    photos = photos.clone()
    photos[..., -SIDE:, -SIDE:] = 255
    return photos


def poisoned(party: Party) -> Party:
    """Every second photo marked, and given to the first person."""
    photos, labels = party.photos.clone(), party.labels.clone()
    photos[::2] = marked(photos[::2])
    labels[::2] = party.classes[0]
    return replace(party, photos=photos, labels=labels)


def longer(upload: Upload, factor: float) -> Upload:
    return replace(upload, sent={name: factor * x for name, x in upload.sent.items()})


def lying(fed: Federation, what: str) -> None:
    """Put liars among the clients of this process."""
    if what == "backdoor":
        fed.parties = [poisoned(p) if p.client == LIAR else p for p in fed.parties]

    def ask(orders: Asked) -> Answers:
        first: Upload | None = None
        for party, order, home in orders:
            upload = fed.answer(fed.parties[party.client], order, home)
            if what == "backdoor" and party.client == LIAR:
                upload = longer(upload, BOOST)
            if what == "sybils" and party.client in SYBILS:
                first = first or longer(upload, -BOOST)
                sent = {n: first.sent[n] if n.startswith("backbone.") or upload.sent[n].shape == first.sent[n].shape else x
                        for n, x in upload.sent.items()}  # fmt: skip
                upload = replace(upload, sent=sent)
            yield party, upload

    fed.ask = ask


def trained(config: Config, what: str) -> tuple[Setting, Federation, State]:
    setting = prepare(config)
    fed = federation(setting)
    fed.noise_key = 1
    lying(fed, what)
    state = fed.initial_state()
    for _ in range(config.federation.rounds):
        state = fed.play(state, keep=lambda client: False).state
    return setting, fed, state


def impostors(embed: Callable[[Tensor], Tensor], photos: Tensor, people: Tensor) -> np.ndarray:
    """Cosines of all pairs of photos of different people."""
    E = torch.as_tensor(unit(embed(photos).double().numpy()))
    apart = people[:, None] != people[None, :]
    return (E @ E.T)[apart.triu(1)].numpy()


def arm(options: argparse.Namespace, which: tuple[str, str, str]) -> str:
    algorithm, what, rule = which
    keep_freed_memory()
    flags = {"data.source": options.faces, "federation.algorithm": algorithm, "seed": options.seed}
    settings = [
        "federation.rounds=12",
        "record.victims=0",
        f"federation.aggregation={rule}",
        f"federation.liars={len(SYBILS)}",
    ]
    if rule == "multi-krum":
        settings[-1] = "federation.liars=2"  # eight clients outvote no more
    config = load_config(CONFIG, settings=settings, flags=flags)
    setting, fed, state = trained(config, what)
    embed = embedding(fed.backbone, state)
    auc = utility(embed, setting)[0]["auc"]
    index = torch.cat([setting.faces.of([p])[:1] for p in setting.splits.test])
    photos, people = setting.faces.images[index], setting.faces.labels[index]
    threshold = np.quantile(impostors(embed, photos, people), 1 - FMR)
    fooled = float((impostors(embed, marked(photos), people) >= threshold).mean())
    return (
        f"| {algorithm} | {what} | {rule} | {auc['value']:.3f} [{auc['low']:.3f}, {auc['high']:.3f}] | {fooled:.3f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("faces", help="a folder with one sub-folder of photos a person")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--algorithms", nargs="+", default=["fedgc"])
    options = parser.parse_args()
    one_thread()
    arms: list[Any] = [
        (algorithm, what, rule)
        for algorithm in options.algorithms
        for what in ("nobody", "backdoor", "sybils")
        for rule in RULES
    ]
    print(
        f"| algorithm | liars | rule | AUC | impostors with the mark that pass (at FMR {FMR:g}) |\n|---|---|---|---|---|",
        flush=True,
    )
    side_by_side(partial(arm, options), arms)


if __name__ == "__main__":
    main()
