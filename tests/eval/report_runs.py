"""Hand-made results for the tests of the report: two algorithms, with and without a promise."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from eval.results import RunResult

FACES = torch.rand(5, 3, 12, 12, generator=torch.Generator().manual_seed(1))
REASON = "needs class-embeddings; under fedgc the seat 'client' holds only aggregate & <own-class-embeddings>"


def value(
    x: float | None, low: float | None = None, high: float | None = None, n: int = 20, **more: Any
) -> dict[str, Any]:
    if x is None:
        return {"value": None, "low": None, "high": None, "n": n, **more}
    return {"value": x, "low": x if low is None else low, "high": x if high is None else high, "n": n, **more}


def utility(auc: float) -> dict[str, Any]:
    return {
        "auc": value(auc, auc - 0.05, auc + 0.05, chance=0.5), "eer": value(0.3, 0.2, 0.4, chance=0.5),
        "tar@far=0.1": value(0.4, 0.2, 0.6, chance=0.1, far=0.113),
        "tar@far=0.01": value(None, why="not supported: 105 identity pairs, at least 300 needed", chance=0.01),
        "rank1": value(0.27, 0.2, 0.35, chance=0.05), "identities": 20, "images": 200,
    }  # fmt: skip


def entry(attack: str, threat: str, metrics: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {
        "attack": attack, "threat": threat, "run": "x", "targets": 5, "seconds": 1.0, "refused": None, "round": 8,
        "granted": ["class-embeddings", "client-updates"], "metrics": metrics, "baselines": {}, "batch_size": None,
        "settings": {"name": attack}, "samples": [], **more,
    }  # fmt: skip


def refusal(attack: str, threat: str, why: str = REASON) -> dict[str, Any]:
    return entry(attack, threat, {}, refused=why, granted=["aggregate"], targets=0)


def linkage(threat: str, rank1: float, low: float, high: float) -> dict[str, Any]:
    metrics = {"rank1": value(rank1, low, high, n=40, chance=0.0125)}
    return entry("identity-linkage", threat, metrics, baselines={"random-embedding": {"rank1": value(0.02, 0.0, 0.1)}})


def inversion(gain: float) -> dict[str, Any]:
    metrics = {"psnr_gain": value(gain, gain - 1, gain + 1, n=5, chance=0.0), "psnr": value(14.0, 13.0, 15.0, n=5)}
    samples = [{"target": i, "class": i, "psnr": 14.0 + i, "ssim": 0.3, "psnr_gain": gain} for i in range(5)]
    rivals = {
        "mean-face": {"psnr": value(12.0, 11.0, 13.0)},
        "nearest-auxiliary-face": {"psnr": value(14.5, 14.0, 15.0)},
    }
    return entry("gradient-inversion", "server", metrics, samples=samples, baselines=rivals, batch_size=1, folder="f")


def privacy(epsilon: float) -> dict[str, Any]:
    return {
        "epsilon": epsilon, "delta": 1e-3, "unit": "image", "accountant": "prv (opacus 1.6.0)", "noise_multiplier": 1.1,
        "max_grad_norm": 1.0, "adjacency": "add-remove", "sampling": "poisson", "sample_rate": 0.38, "steps": 48,
        "target_epsilon": 8.0, "composition": "largest over clients", "covers": "backbone and class embeddings",
        "outside": "photo counts", "randomness": "research-grade",
    }  # fmt: skip


def run(
    algorithm: str = "fedavg", epsilon: float | None = None, attacks: list[dict[str, Any]] | None = None, *, seed: int = 0,
    auc: float = 0.85, source: str = "synthetic:100x10", pictures: bool = True,
) -> RunResult:  # fmt: skip
    defense = {"name": "none"} if epsilon is None else {"name": "dp-sgd", "epsilon": epsilon, "noise_seed": 1}
    about = {
        "schema": 1, "status": "finished", "argv": ["train", "--out", f"run {algorithm}"], "tool": "fedgc-priv 0.1.0",
        "started": "2026-01-01T00:00:00+00:00", "python": "3.11.7", "machine": "x86_64", "libraries": {"torch": "2.10"},
        "config_digest": "abc", "seed": seed, "device": "cpu", "algorithm": algorithm, "rounds": 8, "clients": 4,
        "classes": 50, "images": 350, "source": source, "dataset": "f36d", "skipped": 2,
        "splits": {"train": "61df", "calibration": "1f0a", "test": "9c41"},
        "people": {"train": 50, "calibration": 15, "test": 20, "auxiliary": 15}, "victims": "0319", "defense": defense,
        "utility": utility(auc), "baselines": {"untrained": utility(0.71)},
        "privacy": None if epsilon is None else privacy(epsilon), "seconds": 12.0,
    }  # fmt: skip
    config = {"seed": seed, "federation": {"algorithm": algorithm, "clients": 4}, "defense": defense}
    found = (FACES * 0.9 + 0.05).clamp(0, 1)
    return RunResult(
        f"runs/{algorithm}-{epsilon or 'plain'}-{seed}", about, config, attacks or [],
        lambda e: (FACES, found) if pictures and e.get("folder") else None,
    )  # fmt: skip


def with_draws(result: RunResult, auc: np.ndarray) -> RunResult:
    """A run that kept what its AUC is in each draw of people."""
    return replace(result, draws=lambda: {"trained/auc": auc})


def both_algorithms() -> list[RunResult]:
    """FedAvg and FedGC, each without and with a promise."""
    shared = [linkage("client", 0.61, 0.5, 0.71), linkage("server", 0.6, 0.5, 0.7), inversion(3.0)]
    stacked = [refusal("identity-linkage", "client"), linkage("server", 0.6, 0.5, 0.7), inversion(3.0)]
    weak = [linkage("server", 0.02, 0.0, 0.1), inversion(-0.5)]
    return [
        run("fedavg", None, shared), run("fedgc", None, stacked), run("fedavg", 7.83, weak, auc=0.74),
        run("fedgc", 7.83, [*weak, refusal("identity-linkage", "client")], auc=0.74),
    ]  # fmt: skip
