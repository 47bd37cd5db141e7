"""What noised, sampled releases cost, composed over a run: the privacy loss at a delta.

RDP is a quick upper bound, PRV (Gopi et al. 2021) tight; both by Opacus. PLD (Koskela et al. 2020), tight as well and of another
hand, by dp-accounting where it is installed. Gaussian DP is an approximation from below and is not used.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from fedgc.errors import UsageError
from fedgc.types import Charge

History = list[tuple[float, float, int]]  # (noise multiplier, sample rate, steps), as Opacus keeps it
FINEST = 1e-4  # of the mesh of privacy losses
PROFILE = 60  # points of a privacy profile
RELATIVE = 1e-4  # of the mesh, in parts of the bound: finer ones take minutes where epsilon is in the thousands


def merged(history: History) -> History:
    """Add up the steps at equal noise and rate: composition does not depend on their order."""
    total: dict[tuple[float, float], int] = defaultdict(int)
    for sigma, rate, steps in history:
        total[sigma, rate] += steps
    return [(sigma, rate, steps) for (sigma, rate), steps in sorted(total.items())]


def histories(ledger: Sequence[Charge]) -> dict[int, History]:
    """What each client was charged, added up."""
    found: dict[int, History] = defaultdict(list)
    for charge in ledger:
        found[charge.client].append((charge.noise_multiplier, charge.sample_rate, charge.steps))
    return {client: merged(history) for client, history in found.items()}


def largest_epsilon(runs: Iterable[History], delta: float, quick: bool = False) -> float:
    """Of the client that spent most. Clients that spent alike are looked at once; zero where nobody spent."""
    return max((epsilon_of(list(run), delta, quick) for run in {tuple(run) for run in runs}), default=0.0)


def most_steps(runs: Iterable[History]) -> int:
    return max((sum(steps for _, _, steps in run) for run in runs), default=0)


def require_worth(delta: float, holders: int, whom: str) -> None:
    """Raises UsageError where a promise at ``delta`` may be broken to one of so many holders altogether."""
    if delta >= 1 / holders:
        raise UsageError(f"defense.delta = {delta:g} promises nothing to {whom}: set it below {1 / holders:.1e}")


def undominated(runs: set[tuple[float, int]]) -> list[tuple[float, int]]:
    """(rate, steps) pairs that no other pair exceeds in both: only these can need the most noise."""
    return [a for a in runs if not any(b != a and b[0] >= a[0] and b[1] >= a[1] for b in runs)]


def epsilon_of(history: History, delta: float, quick: bool = False) -> float:
    """Upper bound of epsilon at delta for Poisson-subsampled Gaussians (add/remove), by PRV, or quickly by RDP.

    PRV works on a mesh whose error it adds to the bound; a mesh of 0.1 % of the RDP figure keeps it to a second at any epsilon.
    """
    from opacus.accountants import PRVAccountant, RDPAccountant

    rdp, prv = RDPAccountant(), PRVAccountant()
    rdp.history = prv.history = history
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # RDP says that its best order lies at the edge of its range; the bound still holds
        bound = float(rdp.get_epsilon(delta))
        found = bound if quick else min(bound, float(prv.get_epsilon(delta, eps_error=max(0.01, 1e-3 * bound))))
    return rounded_up(found)


def rounded_up(epsilon: float, digits: int = 10) -> float:
    """Up at the tenth digit: the last ones of a double depend on how many threads added the mesh up, and a report must not."""
    if not 0 < epsilon < math.inf:
        return epsilon
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(epsilon)))
    return math.ceil(epsilon * scale) / scale


@lru_cache
def noise_for(epsilon: float, delta: float, rate: float, steps: int) -> float:
    """The smallest noise multiplier (to 0.2 %) whose PRV epsilon is at most the target.

    RDP gives a safe upper end in milliseconds; PRV, which is tight but slow, only refines below it.
    """

    def reached(sigma: float, quick: bool) -> bool:
        return epsilon_of([(sigma, rate, steps)], delta, quick) <= epsilon

    high = 1.0
    while not reached(high, quick=True):
        high *= 2
        if high > 1e4:
            raise UsageError(f"defense.epsilon = {epsilon:g} cannot be reached in {steps} steps at rate {rate:.3g}")
    low = _bisect(lambda s: reached(s, quick=True), high / 1024, high)
    return _bisect(lambda s: reached(s, quick=False), low / 8, low)


def _bisect(holds: Any, low: float, high: float, precision: float = 2e-3) -> float:
    """The smallest value, to a relative precision and from above, at which a monotone condition holds; high holds."""
    while high - low > precision * high:
        middle = (low + high) / 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


def pld_epsilon(history: History, delta: float, photos: int = 1) -> float | None:
    """Epsilon by privacy loss distributions; None where dp-accounting is not installed.

    photos: how many photos of one person there are. Neighbouring data then differ in all of them: each is in a batch or not, so
    a step is a mixture of Gaussians whose means are the number of them in the batch (binomial), their gradients taken as equal,
    the worst case. With one photo that is the figure per photo.
    """
    whole = _losses(tuple(merged(history)), delta, photos) if pld_version() else None
    return None if whole is None else float(whole.get_epsilon_for_delta(delta))


def profile(history: History, delta: float) -> list[tuple[float, float]] | None:
    """(epsilon, delta(epsilon)) pairs of a whole run, each of which holds; None where dp-accounting is not installed."""
    whole = _losses(tuple(merged(history)), delta, 1) if pld_version() else None
    if whole is None:
        return None
    top = 1.5 * max(1.0, float(whole.get_epsilon_for_delta(delta)))
    epsilons = [0.0, *np.geomspace(0.01, top, PROFILE - 1).tolist()]
    return [(e, min(1.0, float(whole.get_delta_for_epsilon(e)))) for e in epsilons]


@lru_cache(maxsize=16)
def _losses(history: tuple[tuple[float, float, int], ...], delta: float, photos: int) -> Any:
    """The distribution of privacy losses of all these steps, and None without any."""
    from dp_accounting.pld import privacy_loss_distribution as pld
    from scipy.stats import binom

    bound = epsilon_of(list(history), delta, quick=True) * photos if history else 0.0
    mesh = max(FINEST, RELATIVE * bound) if math.isfinite(bound) else 1.0
    whole = None
    for sigma, rate, steps in history:
        if photos == 1:
            step = pld.from_gaussian_mechanism(
                sigma, sampling_prob=rate, value_discretization_interval=mesh, use_connect_dots=True
            )
        else:
            counts = range(photos + 1)
            shares = binom.pmf(counts, photos, rate)
            step = pld.from_mixture_gaussian_mechanism(
                sigma, list(counts), list(shares / shares.sum()), value_discretization_interval=mesh
            )
        part = step.self_compose(steps)
        whole = part if whole is None else whole.compose(part)
    return whole


def pld_version() -> str | None:
    from importlib import metadata

    try:
        return metadata.version("dp-accounting")
    except metadata.PackageNotFoundError:
        return None


def require_target(defense: str, epsilon: float | None, noise_multiplier: float | None) -> None:
    """Raises ValueError where neither says how much noise there is to be, or both do: one of them would not be kept."""
    if epsilon is None and noise_multiplier is None:
        raise ValueError(f"{defense} needs defense.epsilon (a target) or defense.noise_multiplier")
    if epsilon is not None and noise_multiplier is not None:
        raise ValueError("defense.epsilon (a target) and defense.noise_multiplier each say how much noise: give one")


def accountant(quick: bool) -> str:
    import opacus

    return f"{'rdp' if quick else 'prv'} (opacus {opacus.__version__})"


def randomness(seed: int | None) -> str:
    return "research-grade (torch generators)" + (", from a known seed" if seed is not None else "")
