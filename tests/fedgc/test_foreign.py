"""An update from elsewhere is read as what it is, or refused with the one thing that is wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fedgc.errors import UsageError
from fedgc.files import read_tensors
from fedgc.foreign import holds_update, save_update, unpack_update
from fedgc.models import build_model
from fedgc.types import HEAD, ModelSpec

SPEC = ModelSpec("small", "batch", 16, 32, "cosface", 0.2, 8.0)
ABOUT = {"format": 1, "spec": asdict(SPEC), "lr": 0.1, "batch_size": 2}
LAYER = "backbone.embedding.weight"


@pytest.fixture(scope="module")
def states() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    model = build_model(SPEC, 3)
    model.head.weight.data = torch.randn(3, 16, generator=torch.Generator().manual_seed(0))
    before = {name: t.clone() for name, t in model.state_dict().items()}
    return before, {name: t + 1 for name, t in before.items()}


def named(before: dict[str, Tensor], after: dict[str, Tensor], prefix: str = "after/") -> dict[str, Tensor]:
    return {f"before/{n}": t for n, t in before.items()} | {prefix + n: t for n, t in after.items()}


def test_what_is_saved_is_read(states: Any, tmp_path: Path) -> None:
    save_update(tmp_path / "u.safetensors", *states, SPEC, lr=0.1, batch_size=2, classes=(4, 7, 1), momentum=0.9)
    assert (tmp_path / "u.safetensors").stat().st_mode & 0o777 == 0o600
    tensors, about = read_tensors(tmp_path / "u.safetensors")
    assert holds_update(tensors)
    update, constants = unpack_update(tensors, about, "u")
    assert update.classes == (4, 7, 1)
    assert update.images == constants.batch_size == 2
    assert (constants.spec, constants.lr, constants.momentum, constants.steps) == (SPEC, 0.1, 0.9, 1)
    assert all((d - 1).abs().max() < 1e-5 for d in update.delta.values())
    assert not any("num_batches" in name for name in update.before)


def test_a_state_that_was_not_copied_is_noticed(states: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="deepcopy"):
        save_update(tmp_path / "u.safetensors", states[0], states[0], SPEC, lr=0.1, batch_size=2)


def test_a_change_is_subtracted_in_the_files_own_precision(states: Any) -> None:
    before, _ = states
    wide = {n: t.double() for n, t in before.items() if t.is_floating_point()}
    update, _ = unpack_update(named(wide, {n: t + 1e-12 for n, t in wide.items()}), ABOUT, "u")
    assert update.delta[HEAD].dtype == torch.float32
    assert torch.allclose(update.delta[HEAD], torch.full_like(update.delta[HEAD], 1e-12), rtol=1e-3)


def test_a_delta_and_a_backbone_alone_will_do(states: Any) -> None:
    before, after = ({n: t for n, t in state.items() if n != HEAD} for state in states)
    update, _ = unpack_update(named(before, {LAYER: torch.ones_like(after[LAYER])}, "delta/"), ABOUT, "u")
    assert update.classes == ()
    assert list(update.delta) == [LAYER]


def test_the_noise_is_told_to_the_attack(states: Any) -> None:
    about = {**ABOUT, "dp_sgd": {"max_grad_norm": 1.0, "noise_multiplier": 0.5}}
    card = unpack_update(named(*states), about, "u")[1].defense
    assert card == {"name": "dp-sgd", "max_grad_norm": 1.0, "noise_multiplier": 0.5}


def without(name: str) -> Callable[[dict[str, Tensor]], None]:
    def spoil(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return spoil


def put(name: str, tensor: Tensor) -> Callable[[dict[str, Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (without("before/" + LAYER), f"before/{LAYER} is missing"),
        (without("after/" + HEAD), "must be there before and after"),
        (put("model.weight", torch.ones(1)), "'model.weight' is neither before/NAME"),
        (put("after/backbone.other", torch.ones(1)), "no tensor of that network"),
        (put("delta/" + LAYER, torch.ones(1)), "both of after/ and delta/"),
        (put("after/" + LAYER, torch.ones(3)), "a float of"),
        (put("after/" + HEAD, torch.ones(3, 16, dtype=torch.int64)), "a float of"),
        (put("before/" + HEAD, torch.full((3, 16), torch.nan)), "not finite"),
        (put("before/" + HEAD, torch.ones(4, 16)), "a float of"),
    ],
)
def test_wrong_tensors_are_named(states: Any, spoil: Callable[[dict[str, Tensor]], None], why: str) -> None:
    tensors = named(*states)
    spoil(tensors)
    with pytest.raises(UsageError, match=why):
        unpack_update(tensors, ABOUT, "u.safetensors")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": 2}, "wrong format"),
        ({"lr": 0}, "wrong lr"),
        ({"lr": float("inf")}, "wrong lr"),
        ({"rate": 1}, "wrong rate"),
        ({"classes": [1, 1, 2]}, "each named once"),
        ({"classes": [1, 2]}, "2 classes are named, and head.weight has 3 rows"),
        ({"spec": {**asdict(SPEC), "backbone": "vgg"}}, "backbone is one of small"),
        ({"spec": {**asdict(SPEC), "layers": 3}}, "wrong spec"),
        ({"spec": {**asdict(SPEC), "norm": "layer"}}, "wrong spec: norm"),
        ({"spec": {"backbone": "small"}}, "wrong spec"),
        ({"spec": {**asdict(SPEC), "image_size": 100_000}}, "image_size lies in"),
    ],
)
def test_a_wrong_description_is_named(states: Any, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(UsageError, match=why):
        unpack_update(named(*states), {**ABOUT, **changes}, "u.safetensors")


@pytest.mark.parametrize("about", [None, [], "text", 3])
def test_a_file_without_description_is_refused(states: Any, about: Any) -> None:
    with pytest.raises(UsageError, match="wrong format"):
        unpack_update(named(*states), about, "u.safetensors")
