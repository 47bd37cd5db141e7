"""Differential privacy for whole clients (DP-FedAvg, McMahan et al. 2018): what one sends is clipped as a vector, and noised.

The released sum is Σ w_k Δ_k with |Δ_k| ≤ S over backbone and class embeddings together. With the weights public (they are
shares of photos), putting zeros in the place of one client's update moves the mean by at most S times the largest weight of the
round, and class embeddings that are stacked and not averaged by at most S. Noise of σ times that on each makes the pair one
Gaussian release of noise multiplier σ or more, since (w_k/w_max)² |Δθ|² + |ΔW|² ≤ S². What the server does with it afterwards,
FedGC's correction included, is post-processing. Everybody knows who takes part: sampling of clients amplifies nothing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import nn

from defenses.accounting import (
    accountant,
    histories,
    largest_epsilon,
    most_steps,
    noise_for,
    randomness,
    require_target,
    require_worth,
)
from defenses.evidence import require_bounded, uncharged
from defenses.whole_update import clipped, noised, refuse_running_statistics
from fedgc.doors import ClientPlan, Defense, Drawn, Scheme
from fedgc.types import Charge, ClientUpdate, Tensors


class ClientDP(Defense):
    """Set either ``epsilon`` (a target for the whole run) or ``noise_multiplier``.

    max_grad_norm: S, the clipping norm of one client's update. delta: below one over the clients. noise: "central" leaves it to
    a server that is trusted with the clipped updates; "local" has every client add σS to each coordinate itself, so that the
    server is covered too. noise_seed: as for dp-sgd.
    """

    name: Literal["client-dp"] = "client-dp"
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-3, gt=0, lt=1)
    noise_multiplier: float | None = Field(default=None, gt=0)
    max_grad_norm: float = Field(default=0.5, gt=0)
    noise: Literal["central", "local"] = "central"
    unit: Literal["client"] = "client"
    noise_seed: int | None = None
    of_mean: ClassVar[bool] = True
    summary: ClassVar[str] = (
        "clip every client's whole update and noise it, at the server or by the client; epsilon a client"
    )

    @model_validator(mode="after")
    def _target_or_noise(self) -> Self:
        require_target(self.name, self.epsilon, self.noise_multiplier)
        return self

    def check_scheme(self, scheme: Scheme) -> None:
        scheme.require_updates(self.name)

    def check_module(self, module: nn.Module) -> None:
        refuse_running_statistics(module, self.name)

    def prepared(self, clients: Sequence[ClientPlan]) -> ClientDP:
        """Fix the noise multiplier: enough for a client that takes part in every round."""
        require_worth(self.delta, len(clients), f"one of {len(clients)} clients")
        if self.noise_multiplier is not None:
            return self
        assert self.epsilon is not None
        needed = noise_for(self.epsilon, self.delta, 1.0, max(plan.rounds for plan in clients))
        return self.model_copy(update={"noise_multiplier": needed})

    def outgoing(self, update: ClientUpdate, noise: torch.Generator) -> ClientUpdate:
        tensors = clipped(update.tensors, self.max_grad_norm)
        require_bounded(list(tensors.values()), self.max_grad_norm, f"the update of client {update.client}")
        if self.noise == "local":
            tensors = noised(tensors, self._deviation(1.0), noise)
        return ClientUpdate(update.client, tensors, update.num_examples)

    def aggregated(self, delta: Tensors, share: float, noise: torch.Generator) -> Tensors:
        return noised(delta, self._deviation(share), noise) if self.noise == "central" else delta

    def _deviation(self, share: float) -> float:
        """Of each coordinate of a sum to which one client adds at most ``share`` times S."""
        assert self.noise_multiplier is not None
        return self.noise_multiplier * self.max_grad_norm * share

    def charge(self, plan: ClientPlan, round: int, steps: int) -> Charge:
        """One release a round, whatever the number of steps behind it; of a client with a small share this is too much."""
        assert self.noise_multiplier is not None
        return Charge(plan.client, round, self.noise_multiplier, 1.0, 1)

    def contradicted(self, plans: Sequence[ClientPlan], ledger: Sequence[Charge], drawn: Drawn) -> str | None:
        return uncharged(self.charge, plans, ledger, drawn)

    def spent(self, ledger: Sequence[Charge], quick: bool = False) -> Mapping[str, Any]:
        """Epsilon of the client that spent most. quick: by RDP, an upper bound in milliseconds; otherwise by PRV."""
        runs = histories(ledger)
        central = self.noise == "central"
        return {
            "epsilon": largest_epsilon(runs.values(), self.delta, quick), "delta": self.delta, "unit": self.unit,
            "accountant": accountant(quick),
            "noise_multiplier": self.noise_multiplier, "max_grad_norm": self.max_grad_norm,
            "adjacency": "zero-out",  # one client's update against zeros; its weight stays
            "sampling": "no", "sample_rate": 1.0, "steps": most_steps(runs.values()),
            "target_epsilon": self.epsilon, "composition": "over the rounds that a client takes part in; largest over clients",
            "covers": "backbone and class embeddings of every update"
            + (", towards everybody but the server" if central else ", towards the server too"),
            "outside": "photo counts and so the weights, which classes exist and who takes part, loss and utility figures, "
            "the choice of settings, and the recorded single steps, which exist to be attacked",
            "view": "another client or whoever holds a released model; the server is trusted with the clipped updates" if central
            else "the server, which sees every noised update of every round; whoever sees less is covered too",
            "randomness": randomness(self.noise_seed),
        }  # fmt: skip
