"""NaN and infinity, put into one number of one round, or into one search of an attack.

Training: it stops in the round in which the number appears, before anything of that round is kept, with one line that says who
diverged; the rounds before are intact, and going on without the fault ends with the bytes of the run that nobody disturbed. Under
dp-sgd one photo's gradient is no reason to stop: it is left out before clipping, and counted. Attacks: the search that failed is
counted (`attack_nans`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedgc import algorithms, files, heads, local
from fedgc.client import Clients
from fedgc.federation import Federation
from fedgc.inbox import Inbox
from fedgc.models import FaceModel
from fedgc.runs import RunDirectory
from tests.trust.attack_nans import SEARCHES, searched
from tests.trust.cases import Case, command, refused, shown
from tests.trust.faulty import readable
from tests.trust.undisturbed import CONFIGS, ROUNDS, in_folder

VALUES = {"NaN": float("nan"), "infinity": float("inf")}
PLAIN, PRIVATE = ("none", "dp-sgd")
SERVER, CLIENT = "after the server's step", "training of client"
Call = Callable[..., Any]


@dataclass
class Moment:
    """The round of training in which the fault is there, once; recorded steps are left alone."""

    round: int
    value: float
    inside: bool = False
    spent: bool = False

    def now(self) -> bool:
        """Whether this is the moment; it does not come again."""
        if not self.inside or self.spent:
            return False
        self.spent = True
        return True

    def bad(self, tensor: Tensor) -> Tensor:
        """A copy with its first number put out."""
        tensor = tensor.clone()
        tensor[(0,) * tensor.ndim] = self.value
        return tensor

    def spoil(self, tensor: Tensor) -> None:
        with torch.no_grad():
            tensor[(0,) * tensor.ndim] = self.value


def watch_rounds(moment: Moment) -> None:
    """In a child: keep the moment up to date while clients train and the server steps."""
    train, step = Clients._trained, Federation._next

    def trained(self: Clients, party: Any, order: Any, home: Any) -> Any:
        moment.inside = not order.recorded and order.where[1] == moment.round
        try:
            return train(self, party, order, home)
        finally:
            moment.inside = False

    def stepped(self: Federation, state: Any, got: Any, constants: Any, where: Any) -> Any:
        moment.inside = where == ("round", moment.round)
        try:
            return step(self, state, got, constants, where)
        finally:
            moment.inside = False

    Clients._trained, Federation._next = trained, stepped  # type: ignore[method-assign]


# -- where the number is put: each patches one function of a child


def loss(moment: Moment) -> None:
    real = heads.loss
    heads.loss = lambda *a, **k: real(*a, **k) * (moment.value if moment.now() else 1)


def around_backward(moment: Moment, before: bool, act: Callable[[list[Any]], None]) -> None:
    real = local._backward

    def backward(model: Any, x: Any, labels: Any, constants: Any, team: Any, parameters: list[Any]) -> Tensor:
        if before and moment.now():
            act(parameters)
        result = real(model, x, labels, constants, team, parameters)
        if not before and moment.now():
            act(parameters)
        return result

    local._backward = backward


def backbone_weight(moment: Moment) -> None:
    around_backward(moment, True, lambda parameters: moment.spoil(parameters[0].data))


def head_weight(moment: Moment) -> None:
    around_backward(moment, True, lambda parameters: moment.spoil(parameters[-1].data))


def backbone_gradient(moment: Moment) -> None:
    around_backward(moment, False, lambda parameters: moment.spoil(parameters[0].grad))


def head_gradient(moment: Moment) -> None:
    around_backward(moment, False, lambda parameters: moment.spoil(parameters[-1].grad))


def momentum(moment: Moment) -> None:
    """Of the client's optimiser, between two steps."""
    real = torch.optim.SGD.step

    def step(self: Any, *arguments: Any, **named: Any) -> Any:
        held = [state["momentum_buffer"] for state in self.state.values() if state.get("momentum_buffer") is not None]
        if held and moment.now():
            moment.spoil(held[0])
        return real(self, *arguments, **named)

    torch.optim.SGD.step = step  # type: ignore[method-assign]


def photo(moment: Moment) -> None:
    """One number of one photo, on its way into the network."""
    real = FaceModel.forward
    FaceModel.forward = lambda self, x: real(self, moment.bad(x) if len(x) and moment.now() else x)  # type: ignore[method-assign]


def photo_gradient(moment: Moment) -> None:
    """What comes back to one photo's features."""
    real = FaceModel.forward

    def forward(self: FaceModel, x: Tensor) -> Tensor:
        out = real(self, x)
        if len(x) and moment.now():
            out.register_hook(moment.bad)
        return out

    FaceModel.forward = forward  # type: ignore[method-assign]


def noise(moment: Moment) -> None:
    from defenses.bookkeeping import BookKeepingOptimizer

    real = BookKeepingOptimizer.add_noise

    def add(self: Any) -> None:
        real(self)
        if moment.now():
            moment.spoil(self.params[0].grad)

    BookKeepingOptimizer.add_noise = add  # type: ignore[method-assign]


def aggregate(moment: Moment) -> None:
    real = Inbox.aggregate

    def summed(self: Inbox) -> Any:
        total = dict(real(self))
        if moment.now():
            name = next(iter(total))
            total[name] = moment.bad(total[name])
        return total

    Inbox.aggregate = summed  # type: ignore[method-assign]


def server_momentum(moment: Moment) -> None:
    real = Federation._next

    def step(self: Federation, state: Any, *more: Any) -> Any:
        if state.momentum and moment.now():
            name = next(iter(state.momentum))
            state = replace(state, momentum={**state.momentum, name: moment.bad(state.momentum[name])})
        return real(self, state, *more)

    Federation._next = step  # type: ignore[method-assign]


def correction(moment: Moment) -> None:
    real = algorithms.correction.gradient

    def gradient(*arguments: Any, **named: Any) -> Tensor:
        found = real(*arguments, **named)
        return moment.bad(found) if moment.now() else found

    algorithms.correction.gradient = gradient


# -- what must come of it


def prepared(site: Call, moment: Moment) -> None:
    """In a child."""
    site(moment)
    watch_rounds(moment)  # last, and so outermost


def stops(case: tuple[str, str], site: Call, round: int, value: float, says: str, folder: Path) -> str | None:
    trial, out = in_folder(case, folder), folder / "run"
    outcome = command(*trial.command(out), hook=partial(prepared, site, Moment(round, value)))
    if complaint := refused(outcome, (1,), ["diverged", says]):
        return complaint
    if (last := RunDirectory(out).last_round()) != round - 1:
        return f"the last round that was kept is {last}, not {round - 1}"
    readable(out)
    if command(*trial.go_on(out)).code:
        return "did not go on"
    return ", ".join(trial.compared(out)[:6]) or None


def drops(case: tuple[str, str], site: Call, round: int, value: float, folder: Path) -> str | None:
    """A photo's gradient is left out and counted, and costs no privacy; what is trained is finite."""
    trial, out = in_folder(case, folder), folder / "run"
    outcome = command(*trial.command(out), hook=partial(prepared, site, Moment(round, value)))
    if outcome.code:
        return f"exit code {outcome.code}: {shown(outcome.err)}"
    run = RunDirectory(out)
    dropped = {m["round"]: m["dropped_gradients"] for m in run.metrics() if "dropped_gradients" in m}
    if list(dropped) != [round]:
        return f"dropped {dropped}, and round {round} had the fault"
    if (out / "privacy.json").read_bytes() != (trial.reference / "privacy.json").read_bytes():
        return "another privacy ledger"
    every = (files.read_tensors(run.checkpoint_path(t))[0].values() for t in range(1, ROUNDS + 1))
    return None if all(bool(x.isfinite().all()) for tensors in every for x in tensors) else "a checkpoint is not finite"


ALWAYS = (backbone_weight, head_weight, momentum, aggregate, server_momentum, correction)  # whatever the defense
OPEN = (loss, photo, backbone_gradient, head_gradient)  # where nothing looks at single photos
OF_A_PHOTO = (loss, photo, photo_gradient)
AT_THE_SERVER = (aggregate, server_momentum, correction)


def _cases(seed: int = 0) -> Iterator[Case]:
    drawn = random.Random(seed)
    for sites, defense in (((*OPEN, *ALWAYS), PLAIN), ((*ALWAYS[2:5], noise), PRIVATE)):
        for site in sites:
            for word, value in VALUES.items():
                algorithm = "fedgc" if site is correction else drawn.choice(("fedavg", "fedgc"))
                round = drawn.randint(2 if site is server_momentum else 1, ROUNDS)
                says = SERVER if site in AT_THE_SERVER else CLIENT
                name = f"{word} in {site.__name__.replace('_', ' ')}, round {round}: {algorithm}, {defense}"
                yield Case(name, partial(stops, (algorithm, defense), site, round, value, says))
    for site in OF_A_PHOTO:
        for word, value in VALUES.items():
            case, round = drawn.choice([c for c in CONFIGS if c[1] == PRIVATE]), drawn.randint(1, ROUNDS)
            name = f"{word} in {site.__name__.replace('_', ' ')}, round {round}: {', '.join(case)}"
            yield Case(name, partial(drops, case, site, round, value))
    for name, search in SEARCHES.items():
        yield Case(name, partial(searched, search))


NANS = tuple(_cases())
