"""What finished runs hold, in the shapes that a report needs: entries, cells (a configuration over its seeds), table rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from eval.statistics import mean_of_seeds, over_seeds

Entry = dict[str, Any]
Value = Mapping[str, Any]

ALGORITHM_NAMES = {
    "centralized": "Centralized", "local": "Local", "fedpe": "FedPE", "fedavg": "FedAvg", "fedgc": "FedGC",
    "fedcos": "FedCos", "fedaws": "FedAwS",
}  # fmt: skip
SEATS = ("server", "server-secagg", "client", "probing-client", "outsider")

# metric: (name in words, unit), in the order of tables
METRICS: dict[str, tuple[str, str]] = {
    "rank1": ("named at rank 1", "%"), "rank5": ("named within rank 5", "%"), "auc": ("AUC", ""),
    "sar1@fmr=0.01": ("SAR-I at FMR 1 %", "%"), "sar2@fmr=0.01": ("SAR-II at FMR 1 %", "%"),
    "sar1@fmr=0.001": ("SAR-I at FMR 0.1 %", "%"), "sar2@fmr=0.001": ("SAR-II at FMR 0.1 %", "%"),
    "identity_similarity": ("identity similarity", ""), "identity_z": ("identity similarity, in σ of strangers", ""),
    "psnr_gain": ("PSNR above the mean face", "±dB"),
    "psnr": ("PSNR", "dB"), "ssim": ("SSIM", ""), "label_accuracy": ("labels found", "%"),
    "embedding_cosine": ("embedding cosine", ""), "tpr@fpr=0.01": ("TPR at FPR 1 %", "%"),
    "epsilon_lower_bound": ("ε, lower bound", ""), "eer": ("EER", "%"), "tar@far=0.1": ("TAR at FAR 0.1", "%"),
    "tar@far=0.01": ("TAR at FAR 0.01", "%"),
}  # fmt: skip
# the one figure an attack is summed up with: the first that it reports
HEADLINE = (
    "epsilon_lower_bound", "sar1@fmr=0.01", "sar2@fmr=0.01", "rank1", "psnr_gain", "tpr@fpr=0.01", "label_accuracy",
    "embedding_cosine", "auc",
)  # fmt: skip
UTILITY = ("auc", "eer", "tar@far=0.1", "tar@far=0.01", "rank1")


@dataclass(frozen=True)
class RunResult:
    """One finished run, read from its directory.

    about: run.json; config: config.toml, parsed; attacks: entries of ``attack --json`` or of the summary.json files;
    pictures: originals and reconstructions of an entry, float32 (n, 3, H, W) in [0, 1] in the order of its samples,
    or None where it has none; draws: "net/figure" of utility in each draw of people, (draws,), empty where none were kept;
    samples: rows of an entry's targets that are not in the entry itself, as they may be read by the owner only.
    """

    path: str
    about: dict[str, Any]
    config: dict[str, Any]
    attacks: Sequence[Entry]
    pictures: Callable[[Entry], tuple[Tensor, Tensor] | None]
    draws: Callable[[], Mapping[str, NDArray[np.float64]]] = dict
    samples: Callable[[Entry], Sequence[Mapping[str, Any]]] = lambda entry: entry.get("samples") or ()

    @property
    def algorithm(self) -> str:
        return str(self.about["algorithm"])

    @property
    def epsilon(self) -> float | None:
        return (self.about.get("privacy") or {}).get("epsilon")

    @property
    def withheld(self) -> str | None:
        """Why an epsilon that was promised does not stand; None where it does, or none was promised."""
        promised = self.about.get("privacy")
        return None if not promised or self.epsilon is not None else str(promised.get("why") or "no reason is given")

    @property
    def defense(self) -> str:
        return str((self.about.get("defense") or self.config.get("defense") or {}).get("name", "none"))

    @property
    def seed(self) -> int:
        return int(self.about.get("seed", 0))

    def utility(self, metric: str, baseline: str | None = None) -> Value | None:
        source = self.about.get("baselines", {}).get(baseline, {}) if baseline else self.about.get("utility", {})
        value = source.get(metric)
        return value if isinstance(value, Mapping) else None

    @cached_property
    def entries(self) -> list[Entry]:
        """Attack entries, every batch size and number of local steps one of its own, each once, by seat, attack and size."""
        found: dict[str, Entry] = {}
        for entry in (e for whole in self.attacks for e in _with_variants(whole)):
            keys = ("attack", "threat", "round", "rounds", "batch_size", "local_steps", "settings")
            key = [entry.get(k) for k in keys]
            found.setdefault(json.dumps(key, sort_keys=True), entry)
        return sorted(found.values(), key=_order)

    def leading(self, attack: str, threat: str) -> Entry | None:
        """The entry that stands for an attack from a seat: last round, smallest batch, fewest local steps, and there what leaks
        most."""
        matching = [e for e in self.entries if (e["attack"], e["threat"]) == (attack, threat)]
        return max(matching, key=_lead, default=None)


@dataclass(frozen=True)
class Failure:
    """A run that was asked for and has no result. epsilon: as asked for, None where it was not."""

    path: str
    algorithm: str
    defense: str
    epsilon: float | None
    seed: int
    why: str


def _with_variants(entry: Entry) -> Iterator[Entry]:
    plain = {key: value for key, value in entry.items() if key != "variants"}
    yield plain
    for name, changes in (entry.get("variants") or {}).items():
        named = {k: int(v) if v.isdigit() else v for k, _, v in (part.partition("=") for part in name.split(","))}
        # the pictures there are the leading entry's, and so are its local steps
        without = {k: v for k, v in plain.items() if k not in ("folder", "local_steps")}
        yield {**without, **changes, **named}


def _order(entry: Entry) -> tuple[Any, ...]:
    seat = SEATS.index(entry["threat"]) if entry["threat"] in SEATS else len(SEATS)
    return seat, entry["threat"], entry["attack"], entry.get("round") or 0, *_size(entry)


def _size(entry: Entry) -> tuple[int, int]:
    return entry.get("batch_size") or 0, entry.get("local_steps") or 1


def _lead(entry: Entry) -> tuple[Any, ...]:
    name = headline_metric(entry)
    value = entry["metrics"][name].get("value") if name else None
    photos, steps = _size(entry)
    return entry.get("round") or 0, -photos, -steps, value is not None, value or 0.0


def headline_metric(entry: Entry) -> str | None:
    """The metric an attack is summed up with; None where it reports none."""
    names = [n for n in (*HEADLINE, *entry["metrics"]) if n in entry["metrics"]]
    known = [n for n in names if entry["metrics"][n].get("value") is not None]
    return (known or names or [None])[0]


def beats_chance(value: Value | None) -> bool:
    """Whether the whole interval lies above chance."""
    if not value or value.get("value") is None or value.get("low") is None or value.get("chance") is None:
        return False
    return bool(value["low"] > value["chance"])


@dataclass(frozen=True)
class Cell:
    """Runs of one configuration that differ in their seeds only."""

    label: str
    runs: tuple[RunResult, ...]

    @property
    def first(self) -> RunResult:
        return self.runs[0]

    @property
    def algorithm(self) -> str:
        return self.first.algorithm

    @property
    def epsilon(self) -> float | None:
        """Of the first seed; none where that of any seed is withheld."""
        return None if self.withheld else self.first.epsilon

    @property
    def withheld(self) -> str | None:
        return next((run.withheld for run in self.runs if run.withheld), None)

    @property
    def defense(self) -> str:
        return self.first.defense

    def utility(self, metric: str, baseline: str | None = None) -> Spread:
        """Over seeds; with several, the interval is that of seeds and people together where every run kept its draws."""
        found = Spread.of([run.utility(metric, baseline) for run in self.runs])
        draws = (
            [run.draws().get(f"{baseline or 'trained'}/{metric}") for run in self.runs] if len(found.seeds) > 1 else []
        )
        if found.n is None or len(draws) != len(found.seeds) or any(d is None for d in draws):
            return found
        joint = over_seeds(found.seeds, [d for d in draws if d is not None], found.n, np.random.default_rng(0))
        return replace(found, low=joint.low, high=joint.high)

    def attack(self, attack: str, threat: str, metric: str) -> Spread:
        entries = [run.leading(attack, threat) for run in self.runs]
        return Spread.of([e["metrics"].get(metric) if e and not e.get("refused") else None for e in entries])


@dataclass(frozen=True)
class Spread:
    """A measured value over seeds: the mean of their values, with an interval from theirs (`eval.statistics.mean_of_seeds`)
    unless the caller knows better; n and chance are those of the first with a value."""

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    chance: float | None = None
    why: str | None = None
    seeds: tuple[float, ...] = ()

    @classmethod
    def of(cls, values: Sequence[Value | None]) -> Spread:
        there = [v for v in values if v and v.get("value") is not None]
        if not there:
            why = next((v.get("why") for v in values if v), None)
            return cls(None, why=why)
        seeds = tuple(float(v["value"]) for v in there)
        ends = [
            (float(v["low"]), float(v["high"])) for v in there if v.get("low") is not None and v.get("high") is not None
        ]
        known = len(ends) == len(there)
        low, high = mean_of_seeds(seeds, *zip(*ends, strict=True)) if known else (None, None)
        first = there[0]
        return cls(sum(seeds) / len(seeds), low, high, first.get("n"), first.get("chance"), None, seeds)

    def json(self) -> dict[str, Any]:
        """In the form of a measured value, with each seed's value where there are several."""
        more: dict[str, Any] = {"seeds": list(self.seeds)} if len(self.seeds) > 1 else {}
        entry: dict[str, Any] = {
            "value": self.value,
            "low": self.low,
            "high": self.high,
            "n": self.n,
            "chance": self.chance,
        }
        return {**entry, **({"why": self.why} if self.why else {}), **more}


def cells(runs: Sequence[RunResult]) -> list[Cell]:
    """Runs grouped over seeds: by algorithm, then from no promise to the smallest epsilon."""
    groups: dict[str, list[RunResult]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_without_seed(run), sort_keys=True, default=str), []).append(run)
    ordered = sorted((tuple(sorted(g, key=lambda r: r.seed)) for g in groups.values()), key=lambda g: _rank(g[0]))
    return [Cell(label, group) for label, group in zip(_labels([g[0] for g in ordered]), ordered, strict=True)]


def _without_seed(run: RunResult) -> dict[str, Any]:
    flat = flatten(run.config)
    return {k: v for k, v in flat.items() if k not in ("seed", "defense.noise_seed")} | {"algorithm": run.algorithm}


def _rank(run: RunResult) -> tuple[Any, ...]:
    names = list(ALGORITHM_NAMES)
    place = names.index(run.algorithm) if run.algorithm in names else len(names)
    return place, run.epsilon is not None, -(run.epsilon or 0.0), run.defense != "none", run.defense


def _labels(firsts: Sequence[RunResult]) -> list[str]:
    """A short name for each cell, with the settings that tell apart what would be named alike."""
    plain = [f"{algorithm_name(r.algorithm)}, {defense_text(r)}" for r in firsts]
    out = []
    for name, run in zip(plain, firsts, strict=True):
        alike = [flatten(r.config) for n, r in zip(plain, firsts, strict=True) if n == name]
        own = flatten(run.config)
        differing = [k for k in own if k != "seed" and any(other.get(k) != own[k] for other in alike)]
        out.append(", ".join([name, *(f"{k} = {own[k]}" for k in differing)]))
    return out


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {prefix + key: value}
    return flat


def algorithm_name(name: str) -> str:
    return ALGORITHM_NAMES.get(name, name)


def defense_text(run: RunResult) -> str:
    if run.withheld:
        return f"{run.defense} (ε withheld)"
    if run.epsilon is None:
        return "no defense" if run.defense == "none" else f"{run.defense} (no ε)"
    return (
        f"ε = {epsilon_text(run.epsilon)}"
        if run.defense == "dp-sgd"
        else f"{run.defense}, ε = {epsilon_text(run.epsilon)}"
    )


def promise_text(cell: Cell, epsilon: float | None = None) -> str:
    """A cell's epsilon, or the given one, as a table prints it; and why there is none, in a word."""
    if cell.withheld:
        return "withheld"
    return "none" if cell.epsilon is None else epsilon_text(cell.epsilon if epsilon is None else epsilon)


def epsilon_text(epsilon: float) -> str:
    """Three figures, without an exponent."""
    return f"{epsilon:.0f}" if epsilon >= 100 else f"{epsilon:.3g}"
