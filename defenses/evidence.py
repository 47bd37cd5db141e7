"""Whether what ran is what was accounted for: an epsilon speaks of a mechanism, and is worth nothing where another one ran.

`Drawn` is what each client drew in each round, counted where batches are used and not where they are made. Poisson sampling has
a law, and counts that it all but never gives are those of another sampling: too many photos, too few, or as many every time, as a
shuffle or a sampler balanced over people gives. At `CHANCE` an honest run is never doubted in practice.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from scipy.stats import binom, combine_pvalues
from torch import Tensor

from fedgc.doors import ClientPlan, Drawn
from fedgc.errors import WorkFailedError
from fedgc.types import Charge

CHANCE = 1e-9  # with which an honest run would be doubted
TOLERANCE = 1e-4  # of a length, for rounding


def uncharged(
    charge: Callable[[ClientPlan, int, int], Charge],
    plans: Sequence[ClientPlan],
    ledger: Sequence[Charge],
    drawn: Drawn,
) -> str | None:
    """The first release that the ledger does not hold as it should, or None. charge: plan, round and steps -> what is due."""
    of, held = {plan.client: plan for plan in plans}, Counter(ledger)
    for (t, client), (steps, _) in sorted(drawn.items()):
        if not held[charge(of[client], t, steps)]:
            return f"composition: {steps} steps of client {client} in round {t} were not charged as they ran"
    return None


def unlike_poisson(
    plans: Sequence[ClientPlan], rates: Mapping[int, float], most: Mapping[int, Tensor], drawn: Drawn
) -> str | None:
    """Why these counts are not those of Poisson sampling at these rates, or None.

    most: how many photos each unit of a client adds to a batch that it is in, (units,). The mean is held against Bernstein's
    inequality, the spread, where every unit is one photo, against exact binomials (Fisher's method).
    """
    even: list[float] = []
    of: dict[int, list[tuple[int, int]]] = defaultdict(list)
    for (_, client), counts in sorted(drawn.items()):
        of[client].append(counts)
    for plan in plans:
        q, sizes = rates[plan.client], most[plan.client].double()
        rounds = of[plan.client]
        steps, photos = (sum(part) for part in zip(*rounds, strict=True)) if rounds else (0, 0)
        mean, variance = steps * q * float(sizes.sum()), steps * q * (1 - q) * float((sizes**2).sum())
        if abs(photos - mean) > _bernstein(variance, float(sizes.max()), CHANCE / max(1, len(plans))):
            return (
                f"sampling: client {plan.client} drew {photos} photos in {steps} steps, and Poisson sampling at the rate "
                f"that was accounted, {q:.3g}, gives {mean:.0f} ± {math.sqrt(variance):.1f}"
            )
        if q < 1 and bool((sizes == 1).all()):
            even += [_closeness(count, n, len(sizes), q) for n, count in rounds]
    if even and float(combine_pvalues(even, method="fisher").pvalue) < CHANCE:
        return (
            f"sampling: {len(even)} rounds of clients drew almost the same number of photos every time, as a shuffle does, and "
            "Poisson sampling does not"
        )
    return None


def _bernstein(variance: float, most: float, chance: float) -> float:
    """A sum of independent terms in [0, most] of that variance is farther from its mean with less than this chance."""
    log = math.log(2 / chance)
    return most * log / 3 + math.sqrt((most * log / 3) ** 2 + 2 * variance * log)


def _closeness(count: int, steps: int, units: int, rate: float) -> float:
    """P(|X - mean| <= |count - mean|) of a binomial: uniform or larger for honest counts, small for those too near the mean."""
    trials = steps * units
    away = abs(count - trials * rate)
    low, high = math.ceil(trials * rate - away - 1e-9), math.floor(trials * rate + away + 1e-9)
    return float(np.clip(binom.cdf(high, trials, rate) - binom.cdf(low - 1, trials, rate), 1e-300, 1.0))


def require_bounded(tensors: Sequence[Tensor], bound: float, what: str) -> None:
    """Raises WorkFailedError where these are longer, as one vector, than what noise is measured by: nothing clipped them. It is
    looked at apart from the clipping itself, and before any noise is added."""
    length = float(torch.stack(torch._foreach_norm(list(tensors))).double().norm()) if tensors else 0.0
    if not length <= bound * (1 + TOLERANCE):
        raise WorkFailedError(
            f"clipping: {what} has length {length:.6g}, and {bound:.6g} is accounted for; nothing was sent, and no epsilon would "
            "hold. That is a mistake in the defense, or in what replaced it"
        )
