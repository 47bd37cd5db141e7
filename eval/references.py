"""Lines that measured values stand beside in figures: baselines that need no attack, and what the analysis allows at most.

Upper bounds (a proof) and attacks (what was found) are drawn together and never merged.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from eval.privacy import rero_from_profile
from eval.results import Cell, Spread


def baseline_auc(cells: Sequence[Cell], net: str) -> float | None:
    """Mean AUC of a net that federated training did not touch ("untrained", "public-only"); None where no run holds one."""
    values = [v for c in cells if (v := c.utility("auc", net).value) is not None]
    return float(np.mean(values)) if values else None


def gamma(cell: Cell, prior: float) -> float | None:
    """γ: the most that any attack on one photo succeeds under the whole run's (ε, δ) profile, where a guess succeeds with
    probability ``prior`` (reconstruction robustness, 2302.07225). None without an ε for photos."""
    privacy = cell.first.about.get("privacy") or {}
    if cell.epsilon is None or privacy.get("unit", "image") != "image" or not 0 < prior <= 1:
        return None
    pairs = [*(privacy.get("profile") or ()), (privacy["epsilon"], privacy["delta"])]
    return rero_from_profile([e for e, _ in pairs], [d for _, d in pairs], prior)


def ceiling(cell: Cell, attack: str, seat: str, metric: str) -> float | None:
    """What no attack on the same messages can exceed, where the attack's figure holds it."""
    found = [
        e["metrics"].get(metric) or {} for r in cell.runs if (e := r.leading(attack, seat)) and not e.get("refused")
    ]
    values = [v["ceiling"] for v in found if v.get("ceiling") is not None]
    return float(np.mean(values)) if values else None


def measured_epsilon(cell: Cell, seat: str) -> Spread:
    """Lower bound on ε that canaries show from a seat, with the bound that perfect guesses would show as its upper end."""
    found = Spread.of([
        e["metrics"].get("epsilon_lower_bound") if (e := r.leading("canary-inference", seat)) else None for r in cell.runs
    ])  # fmt: skip
    if found.value is None:
        return found
    return Spread(
        found.value, found.value, ceiling(cell, "canary-inference", seat, "epsilon_lower_bound"), found.n, 0.0
    )
