"""DP-SGD (Abadi et al. 2016) inside every client, with Opacus: per-photo clipping, Gaussian noise, Poisson sampling.

The mechanism releases the change of backbone *and* class embeddings of one client; both are clipped as one vector and
noised, since a class embedding that leaves un-noised is a face template. What the server does with them afterwards,
FedGC's correction included, is post-processing. Clients hold disjoint photos, so the federation's epsilon is the largest
of the clients'.
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from fedgc.doors import ClientPlan, Defense, LocalSession
from fedgc.errors import UsageError
from fedgc.rng import on_device
from fedgc.types import Charge

History = list[tuple[float, float, int]]  # (noise multiplier, sample rate, steps), as Opacus keeps it


class DPSGD(Defense):
    """Set either ``epsilon`` (a target for the whole run) or ``noise_multiplier``.

    max_grad_norm: clipping norm of one photo's gradient. delta: below one over the photos of the smallest client.
    noise_seed: leave unset for noise from the operating system's randomness, kept in an owner-only file; set it to make
    an experiment repeatable, knowing that whoever knows it can subtract the noise.
    """

    name: Literal["dp-sgd"] = "dp-sgd"
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-3, gt=0, lt=1)
    noise_multiplier: float | None = Field(default=None, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    unit: Literal["image"] = "image"
    noise_seed: int | None = None
    per_photo: ClassVar[bool] = True
    summary: ClassVar[str] = "clip and noise every photo's gradient (Opacus), accounted over the whole run"

    @model_validator(mode="after")
    def _target_or_noise(self) -> Self:
        if self.epsilon is None and self.noise_multiplier is None:
            raise ValueError("dp-sgd needs defense.epsilon (a target) or defense.noise_multiplier")
        return self

    def prepared(self, clients: Sequence[ClientPlan]) -> DPSGD:
        """Fix the noise multiplier: one for all clients, enough for the client that needs most."""
        smallest = min(plan.images for plan in clients)
        if self.delta >= 1 / smallest:
            raise UsageError(
                f"defense.delta = {self.delta:g} promises nothing to a client with {smallest} photos: "
                f"set it below {1 / smallest:.1e}"
            )
        if self.noise_multiplier is not None:
            return self
        assert self.epsilon is not None
        runs = {(plan.batch_size / plan.images, plan.steps) for plan in clients}
        needed = max(noise_for(self.epsilon, self.delta, rate, steps) for rate, steps in undominated(runs))
        return self.model_copy(update={"noise_multiplier": needed})

    def check_module(self, module: nn.Module) -> None:
        from opacus.validators import ModuleValidator

        mixing = [name for name, layer in module.named_modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
        if mixing:
            raise UsageError(
                f"dp-sgd cannot train this network: {mixing[0]} and {len(mixing) - 1} more layers are BatchNorm, which mixes "
                "photos, so that no per-photo gradient exists. Use --set model.norm=group"
            )
        for error in ModuleValidator.validate(module, strict=False):
            raise UsageError(f"dp-sgd cannot train this network: {error}")

    @contextmanager
    def local_training(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Tensor], plan: ClientPlan,
        sampling: torch.Generator | None, noise: torch.Generator,
    ) -> Iterator[LocalSession]:  # fmt: skip
        """Poisson batches of ``plan.batch_size`` expected photos where ``sampling`` is given, else ``batches`` as they come."""
        from opacus.grad_sample import GradSampleHooks
        from opacus.optimizers import DPOptimizer

        _register_cosine_head()
        device = next(module.parameters()).device
        if sampling is not None:
            # as many steps a round as epochs of plain batches would take, so that schemes stay comparable
            batches = poisson_batches(plan, sum(1 for _ in batches), sampling)
        assert self.noise_multiplier is not None
        module.train().to(memory_format=torch.contiguous_format)  # hooks listen in training mode only
        hooks = GradSampleHooks(module, loss_reduction="mean")
        private = DPOptimizer(
            optimizer,
            noise_multiplier=self.noise_multiplier,
            max_grad_norm=self.max_grad_norm,
            expected_batch_size=plan.batch_size,  # a public constant: the realised size would leak
            loss_reduction="mean",
            generator=on_device(noise, device),
        )
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook")
                yield LocalSession(private, batches, bounded=True)
        finally:
            hooks.cleanup()
            for parameter in module.parameters():
                parameter.grad = None

    def charge(self, plan: ClientPlan, round: int, steps: int) -> Charge:
        assert self.noise_multiplier is not None
        return Charge(plan.client, round, self.noise_multiplier, plan.batch_size / plan.images, steps)

    def spent(self, ledger: Sequence[Charge], quick: bool = False) -> Mapping[str, Any]:
        """Epsilon of the client that spent most. quick: by RDP, an upper bound in milliseconds; otherwise by PRV."""
        import opacus

        histories: dict[int, History] = defaultdict(list)
        for charge in ledger:
            histories[charge.client].append((charge.noise_multiplier, charge.sample_rate, charge.steps))
        runs = {client: merged(history) for client, history in histories.items()}
        worst = max((epsilon_of(h, self.delta, quick) for h in runs.values()), default=0.0)
        steps = max((sum(n for _, _, n in h) for h in runs.values()), default=0)
        rate = max((q for h in runs.values() for _, q, _ in h), default=0.0)
        return {
            "epsilon": worst, "delta": self.delta, "unit": self.unit,
            "accountant": f"{'rdp' if quick else 'prv'} (opacus {opacus.__version__})",
            "noise_multiplier": self.noise_multiplier, "max_grad_norm": self.max_grad_norm, "adjacency": "add-remove",
            "sampling": "poisson", "sample_rate": rate, "steps": steps, "target_epsilon": self.epsilon,
            "composition": "largest over clients, which hold disjoint photos",
            "covers": "backbone and class embeddings of every update",
            "outside": "photo counts, which classes exist, loss and utility figures, the choice of settings, and the recorded "
            "single steps, which exist to be attacked",
            "randomness": "research-grade (torch generators)" + (", from a known seed" if self.noise_seed is not None else ""),
        }  # fmt: skip


def poisson_batches(plan: ClientPlan, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every photo joins each batch with probability batch_size / images; a batch may be empty."""
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    sampler = UniformWithReplacementSampler(
        num_samples=plan.images, sample_rate=plan.batch_size / plan.images, generator=generator, steps=steps
    )
    for index in sampler:
        yield torch.tensor(index, dtype=torch.long)


def merged(history: History) -> History:
    """Add up the steps at equal noise and rate: composition does not depend on their order."""
    total: dict[tuple[float, float], int] = defaultdict(int)
    for sigma, rate, steps in history:
        total[sigma, rate] += steps
    return [(sigma, rate, steps) for (sigma, rate), steps in sorted(total.items())]


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
        return bound if quick else min(bound, float(prv.get_epsilon(delta, eps_error=max(0.01, 1e-3 * bound))))


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


def _register_cosine_head() -> None:
    """Per-sample gradient of `CosineHead` in closed form: (g_bj / |w_j|) (e_b - c_bj w_j/|w_j|), with g = dL/dc."""
    import torch.nn.functional as F
    from opacus.grad_sample import register_grad_sampler

    from fedgc.heads import CosineHead

    def sampler(layer: CosineHead, activations: list[Tensor], backprops: Tensor) -> dict[nn.Parameter, Tensor]:
        e, rows = F.normalize(activations[0], dim=1), F.normalize(layer.weight, dim=1)
        g = backprops / layer.weight.norm(dim=1)
        pull = torch.einsum("bc,bd->bcd", g, e)
        return {layer.weight: pull - (g * (e @ rows.T))[:, :, None] * rows}

    register_grad_sampler(CosineHead)(sampler)
