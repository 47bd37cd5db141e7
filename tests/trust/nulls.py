"""The report against its own null: attacks that know nothing, through the whole path (train, attack, judge, report).

What is at chance, on few targets: a null that succeeds with probability p shows k of n, and the exact 95 % interval of k of n
(Clopper-Pearson) holds p in 95 of 100 such reports, whatever n. So the statement that is checked is that the *measured* rate's
interval contains the nominal level (the FMR, 1/G, .5), not that the rate lies near it: 0 of 100 is [0, 3.6 %] and holds an
FMR of 1 %, and so does 3 of 100, while 5 of 100 does not. Three kinds of figure:

- Rates and AUCs (`EXACT`) have a level that a null neither exceeds nor falls short of: the interval as written holds it. SARs and
  ranks of n people, one trial each, also have to do so by Clopper-Pearson alone, without what the threshold's own people add.
- Other figures that name a chance level are means of pictures or features, and a null may well do worse than the best guess
  (noise is no face): the interval does not lie above it.
- psnr_gain is against the mean face, of which noise (dB) and other people's photos are known to fall short, and how far.

With 100 people the check sees a null that succeeds at 10 % in 99 of 100 reports. Everything is drawn by seeds, and one figure in
twenty misses its level by luck: the seeds are chosen so that none here does, nor nearly. Where another seed shows a miss, look at
several before it is called a bias. membership-inference is no more than a null here: models this small do not tell it who was
trained on, so that its control shows nothing either.
"""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
from pydantic import Field
from torch import Tensor

from attacks.registry import ATTACKS
from attacks.updates import source, targets
from eval.statistics import clopper_pearson
from fedgc.config import load_config
from fedgc.pipeline import entries
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.reporting import report
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from fedgc.types import Attack, Observation, Progress, Reconstruction
from tests.trust.cases import Case

Shows = Literal["noise", "mean-face", "another-person", "the-photo"]
EXACT = re.compile(r"sar\d@|rank\d|auc$|tp[ir]+@|label_accuracy$")
TRIALS = re.compile(r"sar\d@|rank\d")
GAIN: Mapping[Shows, tuple[float, float]] = {  # dB above the mean face within which the whole interval lies
    "noise": (-10, -3), "mean-face": (0, 0), "another-person": (-10, -1), "the-photo": (0, 0),
}  # fmt: skip
OF_PICTURES = ("sar1@fmr=0.01", "sar2@fmr=0.01", "identity_z", "psnr_gain", "rank1", "rank5", "auc")
OF_MODELS = {
    "identity-linkage": ("rank1", "rank5", "auc"),
    "membership-inference": ("auc", "tpr@fpr=0.1"),
    "embedding-recovery": ("embedding_cosine",),
    "label-inference": ("label_accuracy",),
}
COMMON = (
    "data.source=synthetic:200x6", "data.image_size=32", "model.embedding_size=32", "record.batch_sizes=[1]",
    "record.rounds=last", "device=cpu",
)  # fmt: skip
# 100 people, a client and a recorded photo each: as many independent targets
ALONE = (
    *COMMON, "federation.clients=people", "federation.rounds=1", "federation.local_epochs=1", "record.victims=100",
    "data.held_out=1",
)  # fmt: skip
LONG = (
    *COMMON, "federation.clients=4", "federation.rounds=8", "federation.local_epochs=5", "head.softmax=everybody",
    "record.victims=48", "data.held_out=2",
)  # fmt: skip
RUNS: Mapping[str, Sequence[str]] = {
    "victims": ALONE,
    "seen": (*LONG, "seed=3", "data.augment=false"),
    # other people in the same places; its network also judges, and augmented photos make it better at strangers
    "elsewhere": (*LONG, "seed=6"),
}
_KEPT: list[tempfile.TemporaryDirectory[str]] = []


class Pictures(Attack):
    """Pictures that no update made, of the photos behind recorded steps or of the people behind class embeddings. answers: by
    client or class, for the one that is no null."""

    name: Literal["null-pictures"] = "null-pictures"
    shows: Shows = "noise"
    of: Literal["photos", "people"] = "photos"
    needs: ClassVar[tuple[frozenset[str], ...]] = (frozenset({"auxiliary-faces"}),)
    answers: ClassVar[Mapping[str, Mapping[int, Tensor]]] = {}

    @property
    def reads(self) -> Literal["round", "step"]:
        return "step" if self.of == "photos" else "round"

    def run(self, observation: Observation, generator: torch.Generator, progress: Progress) -> Reconstruction:
        faces, rows = observation.auxiliary_faces, observation.class_embeddings
        assert faces is not None and rows is not None  # noqa: PT018
        whose = tuple(map(source, targets(observation))) if self.of == "photos" else rows.classes
        match self.shows:
            case "noise":
                images = torch.rand((len(whose), *faces.shape[1:]), generator=generator)
            case "mean-face":
                images = faces.mean(dim=0, keepdim=True).repeat(len(whose), 1, 1, 1)
            case "another-person":  # each photo once
                images = faces[torch.randperm(len(faces), generator=generator)[: len(whose)]]
            case "the-photo":
                images = torch.stack([self.answers[self.of][k] for k in whose])
        return Reconstruction(whose, images=images)


@contextmanager
def registered(kind: type[Attack]) -> Iterator[None]:
    """An attack of a test among those of the product, for a while."""
    name, union = kind.model_fields["name"].default, entries.AnyAttack
    known = get_args(union)[0] | kind
    ATTACKS[name] = kind
    entries.AnyAttack = Annotated[known, Field(discriminator="name")]
    try:
        yield
    finally:
        del ATTACKS[name]
        entries.AnyAttack = union


@cache
def trained(name: str) -> Path:
    """One of `RUNS`, trained once in this process; gone when it ends."""
    _KEPT.append(tempfile.TemporaryDirectory())
    path = Path(_KEPT[-1].name) / name
    train(load_config(settings=RUNS[name]), path)
    return path


def borrowed(name: str, folder: Path, transcripts: str | None = None) -> Path:
    """A run of that name to attack, its files linked; transcripts: those of this run in place of its own."""
    path = folder / "run"
    shutil.copytree(trained(name), path, copy_function=os.symlink, ignore=shutil.ignore_patterns("attacks"))
    if transcripts is not None:
        shutil.rmtree(path / "transcript")
        shutil.copytree(trained(transcripts) / "transcript", path / "transcript", copy_function=os.symlink)
    return path


def pictures(shows: Shows, folder: Path) -> str | None:
    run = borrowed("victims", folder)
    (step,) = (n for n in RunDirectory(run).transcripts() if "-step-" in n)
    truth = RunDirectory(run).load_truth(step)
    photos = truth.images[:, 0]
    of_classes = dict(zip(truth.labels[:, 0].tolist(), photos, strict=True))
    Pictures.answers = {"photos": dict(zip(truth.clients, photos, strict=True)), "people": of_classes}
    with registered(Pictures):
        for of in ("photos", "people"):
            chosen = [f"null-pictures.shows={shows}", f"null-pictures.of={of}"]
            attack(run, ["null-pictures"], ["server"], settings=chosen, judge=str(trained("elsewhere")))
        rows = reported(run, folder)
    asked = [("null-pictures", metric) for metric in OF_PICTURES]
    gains = [r for r in rows if r["metric"] == "psnr_gain" and r["value"]]
    least, most = GAIN[shows]
    far = [
        f"psnr_gain [{r['low']}, {r['high']}] is not within {least} to {most} dB"
        for r in gains
        if not least <= float(r["low"]) <= float(r["high"]) <= most
    ]
    return "; ".join([*above(rows, asked), *far, *claims(folder)]) or None


def model(saw: str, folder: Path) -> str | None:
    """Attacks of the product, scored for the people of one run and made on messages of the run that ``saw``."""
    run = borrowed("seen", folder, saw)
    attack(run, list(OF_MODELS), ["server"], settings=["membership-inference.epochs=10"])
    asked = [(name, metric) for name, metrics in OF_MODELS.items() for metric in metrics]
    return "; ".join([*above(reported(run, folder), asked), *claims(folder)]) or None


def reported(run: Path, folder: Path) -> list[dict[str, str]]:
    """What results.csv says of the run's attacks, without baselines."""
    report([run], folder / "page")
    with open(folder / "page/results.csv", newline="", encoding="utf-8") as lines:
        return [r for r in csv.DictReader(lines) if r["attack"] != "utility" and not r["baseline"]]


def above(rows: Sequence[Mapping[str, str]], asked: Sequence[tuple[str, str]]) -> list[str]:
    """A complaint for each figure that is not at chance, and for each that was asked for and is not there."""
    there = {(r["attack"], r["metric"]) for r in rows if r["value"]}
    missing = [f"{attack} has no {metric}" for attack, metric in asked if (attack, metric) not in there]
    return missing + [said for r in rows if r["value"] and r["chance"] and (said := _off(r)) is not None]


def _off(row: Mapping[str, str]) -> str | None:
    value, low, high, chance = (float(row[key]) for key in ("value", "low", "high", "chance"))
    metric, n = row["metric"], int(row["n"])
    text = f"{row['attack']}: {metric} = {value:.4g} [{low:.4g}, {high:.4g}] of {n}, chance {chance:.4g}"
    if low > chance or (high < chance and EXACT.match(metric)):
        return text
    if TRIALS.match(metric):
        exact = clopper_pearson(round(value * n), n)
        assert exact.low is not None and exact.high is not None  # noqa: PT018
        return None if exact.low <= chance <= exact.high else f"{text}, by the exact interval"
    return None


def claims(folder: Path) -> list[str]:
    """Where the report's own words call something a leak: its sentences, headlines, and marks on the page."""
    results: dict[str, Any] = json.loads((folder / "page/results.json").read_text(encoding="utf-8"))
    page = (folder / "page/report.html").read_text(encoding="utf-8")
    said = [s for s in results["verdict"] if re.search("re-identifies|rebuilds", s) and "not told from" not in s]
    leaks = [h for cell in results["headline"] for h in cell["leakage"] if None not in (h["low"], h["chance"])]
    said += [f"headline {h['attack']}.{h['metric']}" for h in leaks if h["low"] > h["chance"]]
    said += ["a mark above chance on the page"] if '<td class="clear">' in page else []
    return said + re.findall(r"[1-9]\d* of \d+ attacks above chance", page)


NULLS: tuple[Case, ...] = (
    Case("a noise image", partial(pictures, "noise")),
    Case("the mean face", partial(pictures, "mean-face")),
    Case("another person's photo", partial(pictures, "another-person")),
    Case("a model that never saw the victim", partial(model, "elsewhere")),
)
CONTROLS: tuple[Case, ...] = (  # no nulls, so that the same check has to complain
    Case("the very photo", partial(pictures, "the-photo")),
    Case("the model that saw the victim", partial(model, "seen")),
)
