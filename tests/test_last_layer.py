"""model.trained = last: all layers but the last stay as public weights left them, and nobody sends them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import TINY

from fedgc.config import load_config
from fedgc.errors import UsageError
from fedgc.files import read_tensors
from fedgc.models import build_backbone, train_last_layer_only
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from fedgc.types import BACKBONE, HEAD, ModelSpec

LAST = {BACKBONE + "embedding.weight", BACKBONE + "embedding.bias"}
PRIVATE = ("defense.name=dp-sgd", "defense.noise_multiplier=0.5", "defense.noise_seed=1")
DEFENSES = {
    "none": (),
    "bookkeeping": (*PRIVATE, "defense.mode=bookkeeping"),
    "hooks": (*PRIVATE, "defense.mode=hooks"),
    "pruning": ("defense.name=pruning",),
}


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("public") / "run"
    train(load_config(settings=(*TINY, "seed=7")), path)
    return path


@pytest.fixture(scope="module", params=DEFENSES)
def tuned(request: pytest.FixtureRequest, public: Path, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    path = tmp_path_factory.mktemp("tuned") / "run"
    settings = (*TINY, "model.trained=last", f"model.init={public}", "audit.canaries=8", *DEFENSES[request.param])
    train(load_config(settings=settings), path)
    return RunDirectory(path)


def test_only_the_last_layer_moves_and_is_sent(tuned: RunDirectory, public: Path) -> None:
    last = f"checkpoints/round-{RunDirectory(public).last_round():04d}.safetensors"
    before, _ = read_tensors(public / last)
    after, _ = read_tensors(tuned.path / last)
    assert {name for name in after if name.startswith(BACKBONE) and not torch.equal(after[name], before[name])} == LAST
    for name in tuned.transcripts():
        transcript = tuned.load_transcript(name)
        assert all(update.tensors.keys() == LAST | {HEAD} for update in transcript.updates.values())
        assert transcript.broadcast.keys() == {n for n in before if n.startswith(BACKBONE)}  # the server sends all


def test_attackers_read_what_is_sent(tuned: RunDirectory) -> None:
    asked = ["label-inference", "candidate-match", "canary-inference"]
    entries = attack(tuned.path, asked, ["server"], targets=2)
    assert [e["attack"] for e in entries if e["refused"] is None] == asked
    (of_the_others,) = attack(tuned.path, ["candidate-match"], ["client"], targets=2)
    assert of_the_others["refused"] is None
    if tuned.about()["defense"]["name"] == "none":
        assert entries[0]["metrics"]["label_accuracy"]["value"] == 1


def test_it_needs_public_weights_and_no_batch_statistics(public: Path) -> None:
    for settings in ((), (f"model.init={public}", "model.norm=batch")):
        with pytest.raises(UsageError, match="trained = last keeps all other layers as public weights left them"):
            load_config(settings=(*TINY, "model.trained=last", *settings))


@pytest.mark.parametrize(("backbone", "side"), [("mobilefacenet", 32), ("iresnet18", 32)])
def test_the_norm_behind_the_last_layer_trains_with_it(backbone: str, side: int) -> None:
    net = build_backbone(ModelSpec(backbone, "group", 16, side, "cosface", 0.2, 8.0), 0)
    train_last_layer_only(net)
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    bias = {"embedding.bias"} if backbone == "iresnet18" else set()
    assert trained == {"embedding.weight", "norm.weight", "norm.bias"} | bias
