"""Runs under defenses, from training to scores: cut off and resumed, attacked, told of."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import TINY, Outcome

from fedgc.config import load_config
from fedgc.errors import RefusedError, UsageError
from fedgc.pipeline.attacking import attack
from fedgc.pipeline.evaluation import document
from fedgc.pipeline.grids import cells
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory

DEFENDED = {
    "secure-aggregation": (),
    "embedding-noise": ("defense.scale=0.5", "defense.noise_seed=1"),
    "client-dp": ("defense.epsilon=500", "defense.delta=0.1", "defense.noise_seed=1"),
}


class CutOffError(Exception):
    """As good as a kill: nothing is saved on the way out."""


@pytest.fixture(scope="module")
def defended(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root, made = tmp_path_factory.mktemp("defended"), {}
    for name, settings in DEFENDED.items():
        made[name] = root / name
        train(load_config(settings=(*TINY, f"defense.name={name}", *settings)), made[name])
    return made


@pytest.mark.parametrize("name", DEFENDED)
def test_a_run_that_was_cut_off_ends_with_the_same_bits(defended: dict[str, Path], tmp_path: Path, name: str) -> None:
    def cut() -> None:
        raise CutOffError

    config, out = load_config(settings=(*TINY, f"defense.name={name}", *DEFENDED[name])), tmp_path / "run"
    with pytest.raises(CutOffError):
        train(config, out, after_round=cut)
    train(config, out, resume=True)
    for folder in ("checkpoints", "transcript", "state", "attacker"):
        names = sorted(p.name for p in (defended[name] / folder).glob("*.safetensors"))
        assert sorted(p.name for p in (out / folder).glob("*.safetensors")) == names
        assert all((out / folder / n).read_bytes() == (defended[name] / folder / n).read_bytes() for n in names)
    assert document(RunDirectory(out))["privacy"] == document(RunDirectory(defended[name]))["privacy"]


def test_the_promise_is_made_for_clients(defended: dict[str, Path]) -> None:
    privacy = document(RunDirectory(defended["client-dp"]))["privacy"]
    assert privacy["unit"] == "client"
    assert 400 < privacy["epsilon"] <= 500
    assert document(RunDirectory(defended["embedding-noise"]))["privacy"] is None


def test_a_server_that_reads_sums_is_attacked_with_sums(defended: dict[str, Path], runs: dict[str, Path]) -> None:
    secure = defended["secure-aggregation"]
    seats = {e["threat"]: e for e in attack(secure, ["identity-linkage"])}
    assert set(seats) == {"server", "client", "outsider"}
    assert "aggregate" in seats["server"]["granted"]
    assert "client-updates" not in seats["server"]["granted"]
    assert seats["server"]["metrics"]["rank1"]["value"] is not None  # class embeddings are read all the same
    by_seat = {seat: attack(secure, ["embedding-recovery"], [seat]) for seat in ("server", "server-secagg", "client")}
    cosines = {seat: [e["metrics"]["embedding_cosine"]["value"] for e in found] for seat, found in by_seat.items()}
    assert cosines["server"] == cosines["server-secagg"]
    elsewhere = attack(runs["fedgc"], ["embedding-recovery"], ["server-secagg"])  # a seat on any transcript
    assert all("aggregate" in e["granted"] for e in elsewhere)
    with pytest.raises(RefusedError, match="no change of a class embedding"):
        attack(secure, ["identity-linkage"], ["server"], settings=["identity-linkage.source=embedding-changes"])


def test_a_seat_may_be_asked_for_that_is_not_usual(cli, defended: dict[str, Path]) -> None:
    found: Outcome = cli("attack", defended["secure-aggregation"], "-t", "server-secagg", "-a", "identity-linkage")
    assert found.code == 0


def test_what_cannot_be_defended_is_refused_before_training(cli, tmp_path: Path) -> None:
    for algorithm, name in (("fedavg", "correction-noise"), ("fedpe", "row-step-bound"), ("centralized", "pruning")):
        flags = [part for s in (*TINY, f"defense.name={name}") for part in ("--set", s)]
        refused: Outcome = cli("train", "--algorithm", algorithm, *flags, "--out", tmp_path / name)
        assert refused.code == 2
        assert f"{name} changes" in refused.err
        assert not (tmp_path / name / "run.json").exists()


def test_an_axis_of_epsilon_keeps_the_defense_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text('[defense]\nname = "client-dp"\nepsilon = 8.0\n')
    grid = cells(tmp_path / "c.toml", ["defense.epsilon=none,4"])
    assert [c.config().defense.name for c in grid] == ["none", "client-dp"]
    assert [c.config().defense.name for c in cells(None, ["defense.epsilon=none,4"])] == ["none", "dp-sgd"]


def test_axes_of_the_command_line_go_before_those_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text(
        '[defense]\nname = "dp-sgd"\nnoise_seed = 4\n[sweep]\nseeds = 2\ntargets = 3\n'
        '[sweep.over]\n"defense.epsilon" = [8, 50]\n"federation.clients" = [4]\n'
    )
    grid = cells(tmp_path / "c.toml", ["defense.epsilon=1"])
    assert [c.name for c in grid] == ["epsilon=1_clients=4_seed=0", "epsilon=1_clients=4_seed=1"]
    assert [(c.config().seed, c.config().defense.noise_seed) for c in grid] == [(0, 4), (1, 5)]
    assert {c.targets for c in grid} == {3}
    assert len(cells(tmp_path / "c.toml", seeds=1)) == 2


@pytest.mark.parametrize("seeds", [5_001, 2**63, 10**40])
def test_a_grid_has_an_end(seeds: int) -> None:
    with pytest.raises(UsageError, match=f"a grid of {2 * seeds:,} cells"):
        cells(None, ["federation.rounds=1,2"], seeds)
