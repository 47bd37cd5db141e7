"""DP-SGD (Abadi et al. 2016) inside every client, with Opacus: per-photo clipping, Gaussian noise, Poisson sampling.

The mechanism releases the change of backbone *and* class embeddings of one client; both are clipped as one vector and
noised, since a class embedding that leaves un-noised is a face template. What the server does with them afterwards,
FedGC's correction included, is post-processing. Clients hold disjoint photos, so the federation's epsilon is the largest
of the clients'.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from defenses.accounting import (
    History,
    accountant,
    histories,
    largest_epsilon,
    most_steps,
    noise_for,
    pld_epsilon,
    pld_version,
    profile,
    randomness,
    require_target,
    require_worth,
    undominated,
)
from defenses.evidence import uncharged, unlike_poisson
from fedgc.doors import ClientPlan, Defense, Drawn, LocalSession
from fedgc.errors import UsageError
from fedgc.rng import on_device
from fedgc.types import Charge

if TYPE_CHECKING:
    from defenses.per_unit import UnitOptimizer  # Opacus is imported where a private step is taken: it takes seconds


EXCEEDED = 0.01  # odds that some batch of a client's run is larger than what it is reckoned with


class DPSGD(Defense):
    """Set either ``epsilon`` (a target for the whole run) or ``noise_multiplier``.

    max_grad_norm: clipping norm of one photo's gradient. delta: below one over the photos of the smallest client.
    unit: whom epsilon speaks of. "image": photos are sampled, and each photo's gradient is clipped. "identity": people are
    sampled, at most ``photos_per_person`` photos of each are looked at, and their mean gradient is clipped (McMahan et al. 2018).
    mode: how gradients are clipped, to the same result. "bookkeeping": without forming those of single photos (several times
    faster, least memory); "hooks": Opacus's, which form them; "auto": the first where it knows all layers.
    noise_seed: leave unset for noise from the operating system's randomness, kept in an owner-only file; set it to make
    an experiment repeatable, knowing that whoever knows it can subtract the noise.
    """

    name: Literal["dp-sgd"] = "dp-sgd"
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-3, gt=0, lt=1)
    noise_multiplier: float | None = Field(default=None, gt=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    unit: Literal["image", "identity"] = "image"
    photos_per_person: int = Field(default=4, ge=1)
    mode: Literal["auto", "bookkeeping", "hooks"] = "auto"
    noise_seed: int | None = None
    per_photo: ClassVar[bool] = True
    summary: ClassVar[str] = "clip and noise every photo's gradient (Opacus), accounted over the whole run"

    @model_validator(mode="after")
    def _target_or_noise(self) -> Self:
        require_target(self.name, self.epsilon, self.noise_multiplier)
        return self

    def prepared(self, clients: Sequence[ClientPlan]) -> DPSGD:
        """Fix the noise multiplier: one for all clients, enough for the client that needs most."""
        smallest, what = min((self._sampled(plan), plan.client) for plan in clients)[0], self._units
        require_worth(self.delta, smallest, f"a client with {smallest} {what}")
        if self.noise_multiplier is not None:
            return self
        assert self.epsilon is not None
        runs = {(self.rate(plan), plan.steps) for plan in clients}
        needed = max(noise_for(self.epsilon, self.delta, rate, steps) for rate, steps in undominated(runs))
        return self.model_copy(update={"noise_multiplier": needed})

    @property
    def _units(self) -> str:
        return "photos" if self.unit == "image" else "people"

    def _sampled(self, plan: ClientPlan) -> int:
        """How many units of privacy a client holds."""
        return plan.images if self.unit == "image" else plan.persons

    def _expected(self, plan: ClientPlan, sampled: bool = True) -> int:
        """Units in a batch, on average: a public constant, which the sum of gradients is divided by. Where nothing is sampled (a
        recorded step), everybody is in it."""
        if self.unit == "image":
            return plan.batch_size
        if not sampled:
            return plan.persons
        return min(plan.persons, max(1, round(plan.batch_size / self.photos_per_person)))

    def rate(self, plan: ClientPlan) -> float:
        """The probability with which a unit joins a batch."""
        return self._expected(plan) / self._sampled(plan)

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

    def forms_photo_gradients(self, module: nn.Module) -> bool:
        from defenses.layer_gradients import unknown_layers

        return self.mode == "hooks" or (self.mode == "auto" and bool(unknown_layers(module)))

    def largest_batch(self, plan: ClientPlan) -> int:
        """Photos in a Poisson batch that the run exceeds with probability EXCEEDED at most: the mean and some 4.3 standard
        deviations for 100 steps, 5.3 for 10,000, and more of small batches, by Bernstein's inequality and a union over steps."""
        units, rate = self._sampled(plan), self.rate(plan)
        odds = math.log(max(1, plan.steps) / EXCEEDED)
        margin = odds / 3 + math.sqrt((odds / 3) ** 2 + 2 * odds * units * rate * (1 - rate))
        largest = min(units, math.ceil(units * rate + margin))
        return largest if self.unit == "image" else largest * min(self.photos_per_person, plan.most_photos)

    @contextmanager
    def local_training(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Tensor], plan: ClientPlan,
        sampling: torch.Generator | None, noise: torch.Generator | None,
    ) -> Iterator[LocalSession]:  # fmt: skip
        """Poisson batches where ``sampling`` is given, else ``batches`` as they come."""
        from defenses.per_unit import with_people

        device = next(module.parameters()).device
        assert noise is not None
        if sampling is not None:
            # as many steps a round as epochs of plain batches would take, so that schemes stay comparable
            steps = sum(1 for _ in batches)
            batches = poisson_units(self._sampled(plan), self.rate(plan), steps, sampling)
            if self.unit == "identity":
                batches = photos_of_people(batches, plan, self.photos_per_person, sampling)
        module.train()  # hooks listen in training mode only
        expected = self._expected(plan, sampling is not None)  # public: the realised size would leak
        with self._private(module, optimizer, expected, on_device(noise, device)) as private:
            try:
                if self.unit == "identity":
                    batches = with_people(batches, plan, private)
                yield LocalSession(private, batches, bounded=True)
            finally:
                for parameter in module.parameters():
                    parameter.grad = None

    @contextmanager
    def _private(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, expected: int, noise: torch.Generator
    ) -> Iterator[UnitOptimizer]:
        """The optimiser that clips and noises, while the network is prepared for it."""
        from opacus.grad_sample import GradSampleHooks

        from defenses.bookkeeping import Book, BookKeepingOptimizer
        from defenses.cosine_samplers import register_cosine_head
        from defenses.per_unit import UnitOptimizer

        settings = {
            "noise_multiplier": self.noise_multiplier, "max_grad_norm": self.max_grad_norm, "expected_batch_size": expected,
            "loss_reduction": "mean", "generator": noise,
        }  # fmt: skip
        if not self.forms_photo_gradients(module):
            book = Book(module)
            try:
                yield BookKeepingOptimizer(optimizer, book, **settings)
            finally:
                book.close()
            return
        register_cosine_head()
        module.to(memory_format=torch.contiguous_format)
        hooks = GradSampleHooks(module, loss_reduction="mean")
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Full backward hook")
                yield UnitOptimizer(optimizer, **settings)
        finally:
            hooks.cleanup()

    def charge(self, plan: ClientPlan, round: int, steps: int) -> Charge:
        assert self.noise_multiplier is not None
        photos = plan.most_photos if self.unit == "image" else 1
        return Charge(plan.client, round, self.noise_multiplier, self.rate(plan), steps, photos)

    def contradicted(self, plans: Sequence[ClientPlan], ledger: Sequence[Charge], drawn: Drawn) -> str | None:
        why = uncharged(self.charge, plans, ledger, drawn)
        rates = {plan.client: self.rate(plan) for plan in plans}
        return why or unlike_poisson(plans, rates, {plan.client: self._photos(plan) for plan in plans}, drawn)

    def _photos(self, plan: ClientPlan) -> Tensor:
        """(units,) photos that each unit adds to a batch it is in."""
        if self.unit == "image" or plan.people is None:
            return torch.ones(plan.images)
        return plan.people.unique(return_counts=True)[1].clamp(max=self.photos_per_person)

    def spent(self, ledger: Sequence[Charge], quick: bool = False) -> Mapping[str, Any]:
        """Epsilon of the client that spent most. quick: by RDP, an upper bound in milliseconds; otherwise by PRV, with the figure
        of another library (PLD) beside it, and what the same run promises to a person with all photos."""
        runs = histories(ledger)
        photos = {charge.client: charge.photos for charge in ledger}
        rate = max((q for h in runs.values() for _, q, _ in h), default=0.0)
        return {
            "epsilon": largest_epsilon(runs.values(), self.delta, quick), "delta": self.delta, "unit": self.unit,
            "accountant": accountant(quick),
            **({} if quick else self._second_opinion(runs, photos)),
            "noise_multiplier": self.noise_multiplier, "max_grad_norm": self.max_grad_norm, "adjacency": "add-remove",
            "sampling": "poisson", "sample_rate": rate, "steps": most_steps(runs.values()), "target_epsilon": self.epsilon,
            "composition": "largest over clients, which hold disjoint photos",
            "covers": "backbone and class embeddings of every update",
            "outside": "photo counts, which classes exist, loss and utility figures, the choice of settings, and the recorded "
            "single steps, which exist to be attacked",
            "clipping": "each photo" if self.unit == "image" else f"a person's mean of {self.photos_per_person} photos or fewer",
            "randomness": randomness(self.noise_seed),
        }  # fmt: skip

    def _second_opinion(self, runs: Mapping[int, History], photos: Mapping[int, int]) -> dict[str, Any]:
        """Epsilon by PLD, and for all photos of a person, each of the client for which it is largest."""
        version = pld_version()
        if version is None:
            return {"epsilon_pld": None, "pld": "not computed: dp-accounting is not installed"}
        by_client = {client: pld_epsilon(h, self.delta) or 0.0 for client, h in runs.items()}
        said: dict[str, Any] = {"epsilon_pld": max(by_client.values(), default=0.0), "pld": f"dp-accounting {version}"}
        if by_client:
            said["profile"] = profile(runs[max(by_client, key=by_client.__getitem__)], self.delta)
        if self.unit == "image":
            person = max((pld_epsilon(h, self.delta, photos[client]) or 0.0 for client, h in runs.items()), default=0.0)
            said |= {"epsilon_identity": person, "photos_of_a_person": max(photos.values(), default=1)}
        return said


def poisson_units(count: int, rate: float, steps: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Every unit joins each batch with probability ``rate``; a batch may be empty."""
    from opacus.utils.uniform_sampler import UniformWithReplacementSampler

    sampler = UniformWithReplacementSampler(num_samples=count, sample_rate=rate, generator=generator, steps=steps)
    for index in sampler:
        yield torch.tensor(index, dtype=torch.long)


def photos_of_people(
    batches: Iterator[Tensor], plan: ClientPlan, most: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Photo indices of batches of people (places among the client's people), at most so many of each, drawn anew each time."""
    assert plan.people is not None
    names = plan.people.unique()
    photos = [(plan.people == name).nonzero()[:, 0] for name in names]
    for batch in batches:
        drawn = [photos[i][torch.randperm(len(photos[i]), generator=generator)[:most]] for i in batch.tolist()]
        yield torch.cat(drawn) if drawn else torch.zeros(0, dtype=torch.long)
