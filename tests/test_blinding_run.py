"""A run under the blinded correction, from training to scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import TINY

from defenses.blinded_correction import BlindedCorrection
from fedgc.config import load_config
from fedgc.errors import RunError
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.blinding import as_clients_read
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from fedgc.threats import THREATS
from fedgc.types import HEAD

MORE = ("record.rounds=all", "correction.weight=4", "defense.name=blinded-correction")


@pytest.fixture(scope="module")
def blinded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("blinded") / "run"
    train(load_config(settings=(*TINY, *MORE)), path)
    return path


def tensors_outside_state(path: Path) -> list[tuple[str, torch.Tensor]]:
    files = [f for f in path.rglob("*.safetensors") if f.relative_to(path).parts[0] != "state"]
    return [(name, tensor) for f in files for name, tensor in load_file(f).items()]


def test_nothing_but_the_state_gives_the_rotation_away(blinded: Path) -> None:
    """No plain row and no key is outside state/, which is its owner's alone."""
    run = RunDirectory(blinded)
    key = run.noise_key(None)
    wire = run.load_transcript("round-0002")
    plain = as_clients_read(run, wire)
    known = torch.cat([t.sent[k][HEAD] for t in (plain,) for k in t.sent])
    on_wire = torch.cat([wire.sent[k][HEAD] for k in wire.sent])
    kept = [t for _, t in tensors_outside_state(blinded) if t.ndim == 2 and t.shape[1] == known.shape[1]]
    rows = torch.nn.functional.normalize(torch.cat(kept).float(), dim=1)
    nearest = lambda w: (torch.nn.functional.normalize(w, dim=1) @ rows.T).max(dim=1).values  # noqa: E731
    assert float(nearest(on_wire).min()) > 0.9999  # the search does find rows
    assert float(nearest(known).max()) < 0.9
    for file in blinded.rglob("*"):
        if file.is_file() and file.suffix in (".json", ".toml", ".jsonl"):
            if file.parent.name != "state":
                assert str(key) not in file.read_text()
            else:
                assert file.stat().st_mode & 0o077 == 0
    assert (blinded / "state").stat().st_mode & 0o077 == 0
    assert load_config(blinded / "config.toml").defense == BlindedCorrection()


def test_a_run_that_was_cut_off_ends_bit_for_bit_the_same(blinded: Path, tmp_path: Path) -> None:
    """Played on from its first round with the secret that it began with."""
    cut, last = tmp_path / "cut", "round-0002"
    shutil.copytree(blinded, cut)
    for place in ("state", "checkpoints", "transcript"):
        for file in (cut / place).glob(f"{last}*"):
            file.unlink()
    header = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**header, "status": "running"}))
    train(None, cut, resume=True)
    names = [f"checkpoints/{last}", f"state/{last}", f"transcript/{last}"]
    for name in names:
        assert (cut / f"{name}.safetensors").read_bytes() == (blinded / f"{name}.safetensors").read_bytes()


def test_a_run_that_lost_its_secret_is_not_gone_on_with(blinded: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut"
    shutil.copytree(blinded, cut)
    (cut / "state/noise-key.json").unlink()
    header = json.loads((cut / "run.json").read_text())
    (cut / "run.json").write_text(json.dumps({**header, "status": "running"}))
    with pytest.raises(RunError, match="lost or damaged"):
        train(None, cut, resume=True)


def test_a_client_reads_what_the_server_cannot(blinded: Path) -> None:
    run = RunDirectory(blinded)
    wire = run.load_transcript("round-0002")
    read = as_clients_read(run, wire)
    secret, seen = (THREATS["client"].observe(t).own_class_embeddings for t in (read, wire))
    assert torch.nn.functional.cosine_similarity(secret.weight, seen.weight).max() < 0.9
    torch.testing.assert_close(secret.weight @ secret.weight.T, seen.weight @ seen.weight.T, rtol=0, atol=1e-5)
    entry = attack(blinded, ["correction-probe"], ["client"])[0]
    assert entry["metrics"]["embedding_cosine"]["value"] > entry["metrics"]["embedding_cosine"]["chance"]


def test_attacks_on_steps_do_without_class_embeddings(blinded: Path) -> None:
    entry = attack(blinded, ["embedding-recovery"], ["server"])[0]
    assert entry["metrics"]["embedding_cosine"]["value"] > 0.999
    linked = attack(blinded, ["identity-linkage"], ["server"], settings=["identity-linkage.source=face-embeddings"])[0]
    assert linked["refused"] is None
    assert linked["metrics"]["auc"]["value"] > 0.5


@pytest.mark.parametrize("known", [0, 8])
def test_alignment_leaves_out_whom_the_attacker_knows(blinded: Path, known: int) -> None:
    run, quick = RunDirectory(blinded), ["identity-linkage.through=alignment", "identity-linkage.restarts=2"]
    entry = attack(blinded, ["identity-linkage"], ["server"], settings=[*quick, f"identity-linkage.known={known}"])[0]
    assert entry["targets"] == run.about()["classes"] - known
    assert ("acquaintances" in entry["granted"]) is bool(known)


def test_a_finished_run_without_the_defense_is_read_as_it_is(runs: dict[str, Path]) -> None:
    run = RunDirectory(runs["fedgc"])
    transcript = run.load_transcript("round-0002")
    assert as_clients_read(run, transcript) is transcript
