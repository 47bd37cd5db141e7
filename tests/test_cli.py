"""What a person types and sees: exit codes, one clear line, JSON and nothing else."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tiny import TINY, Outcome

from fedgc.data.synthetic import synthetic_faces
from fedgc.runs import RunDirectory

Cli = Callable[..., Outcome]
TINY_FLAGS = [part for setting in TINY for part in ("--set", setting)]


def one_line(outcome: Outcome, code: int, *words: str) -> None:
    """The exit code, and one line on stderr that says all of the words."""
    assert outcome.code == code, outcome
    assert outcome.out == ""
    assert outcome.err.strip().count("\n") == 0, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in outcome.err


@pytest.fixture
def faces(tmp_path: Path) -> Path:
    """A folder of 14 people with 5 photos each."""
    photos, labels = synthetic_faces(14, 5, 48, 3)
    for n, (photo, label) in enumerate(zip(photos, labels.tolist(), strict=True)):
        folder = tmp_path / "faces" / f"person-{label:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(folder / f"{n}.jpg")
    return tmp_path / "faces"


def test_help_names_every_command(cli: Cli) -> None:
    outcome = cli("--help")
    assert outcome.code == 0
    for command in ("demo", "data", "train", "evaluate", "attack", "sweep", "report", "audit", "list"):
        assert command in outcome.out


def test_help_imports_nothing_heavy() -> None:
    code = "import sys, fedgc.cli; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic', 'rich', 'numpy', 'opacus')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("kind", ["attacks", "defenses", "threats", "algorithms", "models", "datasets"])
def test_list(cli: Cli, kind: str) -> None:
    rows = json.loads(cli("list", kind, "--json").out)
    assert all(row["name"] for row in rows)
    assert rows[0]["name"] in cli("list", kind).out


def test_bad_folder_is_named_skipped_and_trained_on(cli: Cli, faces: Path, tmp_path: Path) -> None:
    whole = (faces / "person-00/0.jpg").read_bytes()
    (faces / "person-00/truncated.jpg").write_bytes(whole[: len(whole) // 2])
    (faces / "person-01/empty.jpg").write_bytes(b"")
    (faces / "person-02/notes.txt").write_text("not a photo")
    (faces / "lonely").mkdir()
    (faces / "lonely/only.jpg").write_bytes(whole)
    inspected = json.loads(cli("data", "inspect", faces, "--json").out)
    named = json.dumps(inspected)
    for name in ("truncated.jpg", "empty.jpg", "notes.txt", "lonely"):
        assert name in named
    assert "truncated.jpg" in cli("data", "inspect", faces).out
    outcome = cli(
        "train", "--data", faces, "--out", tmp_path / "run", *TINY_FLAGS[2:], "--set", "data.min_images=3", "--json"
    )
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["status"] == "finished"
    assert RunDirectory(tmp_path / "run").about()["skipped"] == 4
    assert "skipped 4 files" in outcome.err


def test_empty_and_missing_folders(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "nothing").mkdir()
    one_line(cli("train", "--data", tmp_path / "nothing", "--out", tmp_path / "run"), 2, "nothing")
    one_line(cli("train", "--data", tmp_path / "absent", "--out", tmp_path / "run"), 2, "absent")
    one_line(cli("data", "inspect", tmp_path / "absent"), 2, "absent")
    assert not (tmp_path / "run" / "run.json").exists()


def test_wrong_settings(cli: Cli) -> None:
    one_line(cli("train", "--set", "federation.round=3"), 2, "federation.round", "did you mean 'federation.rounds'")
    one_line(cli("train", "--set", "defense.name=dp-sgd", "--set", "defense.epsilon=-1"), 2, "defense.epsilon", "-1")
    one_line(cli("train", "--set", "defense.epsilon=1"), 2, "defense.name")
    one_line(cli("train", "--set", "nonsense"), 2, "KEY=VALUE")
    one_line(cli("train", "--algorithm", "fedxyz"), 2, "fedxyz", "fedavg")
    one_line(cli("train", "missing.toml"), 2, "missing.toml")


def test_a_network_that_cannot_be_trained_leaves_nothing_behind(cli: Cli, tmp_path: Path) -> None:
    flags = [*TINY_FLAGS, "--set", "defense.name=dp-sgd", "--set", "defense.epsilon=8", "--set", "defense.delta=0.5"]
    one_line(cli("train", *flags, "--out", tmp_path / "run"), 2, "defense.delta")
    assert not (tmp_path / "run" / "run.json").exists()
    assert cli("train", *TINY_FLAGS, "--out", tmp_path / "run").code == 0


def test_missing_and_foreign_runs(cli: Cli, tmp_path: Path) -> None:
    one_line(cli("attack", tmp_path / "none"), 3, "not a run directory")
    one_line(cli("report", tmp_path / "none"), 3, "not a run directory")
    one_line(cli("evaluate", tmp_path / "none"), 3, "not a run directory")
    (tmp_path / "old").mkdir()
    (tmp_path / "old/run.json").write_text('{"schema": 99}')
    one_line(cli("attack", tmp_path / "old"), 3, "schema 99")
    (tmp_path / "old/run.json").write_text("{")
    one_line(cli("attack", tmp_path / "old"), 3, "damaged")


def test_unknown_names_are_answered_with_the_known(cli: Cli, runs: dict[str, Path]) -> None:
    one_line(cli("attack", runs["fedgc"], "-a", "magic"), 2, "magic", "identity-linkage")
    one_line(cli("attack", runs["fedgc"], "-t", "martian"), 2, "martian", "outsider")
    one_line(cli("attack", runs["fedgc"], "--round", "7"), 2, "recorded rounds are 1, 2")
    one_line(cli("attack", runs["fedgc"], "--set", "gradient-inversion.speed=3"), 2, "speed", "iterations")
    one_line(cli("attack", runs["fedgc"], "-a", "identity-linkage", "-t", "client"), 2, "no class embedding")


def test_dry_run_trains_nothing(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("train", "--dry-run", "--set", "federation.rounds=7", "--out", tmp_path / "run", "--json")
    assert json.loads(outcome.out)["federation"]["rounds"] == 7
    assert not (tmp_path / "run").exists()


def test_tables_are_for_people(cli: Cli, runs: dict[str, Path]) -> None:
    shown = cli("train", "--out", runs["dp"], "--resume")
    assert shown.code == 0, shown.err
    assert "untrained" in shown.out
    assert "ε = " in shown.out
    attacked = cli("attack", runs["fedgc"], "-t", "server", "-t", "client", "-a", "identity-linkage")
    assert "refused" in attacked.out
    assert "not a guarantee" in attacked.out


def test_report_and_gate(cli: Cli, runs: dict[str, Path], tmp_path: Path) -> None:
    assert cli("attack", runs["fedavg"], "-a", "identity-linkage").code == 0
    made = cli("report", runs["fedavg"], "-o", tmp_path / "page")
    assert made.out.strip().splitlines()[-1] == str(tmp_path / "page/report.html")
    rate = "identity-linkage@client.rank1"
    tripped = cli("report", runs["fedavg"], "-o", tmp_path / "page", "--fail-if", f"{rate} > -1", "--json")
    assert tripped.code == 4
    assert json.loads(tripped.out)["report"]
    assert cli("report", runs["fedavg"], "-o", tmp_path / "page", "--fail-if", f"{rate} > 2").code == 0
    one_line(
        cli("report", runs["fedavg"], "-o", tmp_path / "page", "--json", "--fail-if", "rubbish")._replace(out=""),
        2,
        "rubbish",
    )


def test_a_sweep_of_two(cli: Cli, tmp_path: Path) -> None:
    config = tmp_path / "base.toml"
    config.write_text(
        '[data]\nsource = "synthetic:24x6"\nimage_size = 32\n[federation]\nclients = 2\nrounds = 1\nlocal_epochs = 1\n'
        '[record]\nvictims = 0\n[model]\nembedding_size = 32\n'
    )  # fmt: skip
    outcome = cli("sweep", config, "--over", "federation.algorithm=fedavg,fedgc", "--out", tmp_path / "grid", "--json")
    assert outcome.code == 0, outcome.err
    summary = json.loads(outcome.out)
    assert summary["failed"] == []
    assert (tmp_path / "grid/algorithm=fedgc/run.json").exists()
    assert Path(summary["report"]).exists()
    one_line(
        cli("sweep", config, "--over", "federation.algorithm=fedavg", "--out", tmp_path / "grid"), 2, "another grid"
    )


SWEPT = """
[data]
source = "synthetic:24x6"
image_size = 32
[federation]
clients = 2
rounds = 1
local_epochs = 1
[record]
victims = 0
[model]
embedding_size = 32
[sweep]
attacks = ["identity-linkage"]
threats = ["client"]
[sweep.over]
"federation.algorithm" = ["fedavg", "fedgc"]
"defense.name" = ["none", "correction-noise"]
"""


def test_a_failed_cell_is_on_record_and_on_the_page(cli: Cli, tmp_path: Path) -> None:
    (tmp_path / "grid.toml").write_text(SWEPT)
    summary = json.loads(cli("sweep", tmp_path / "grid.toml", "--out", tmp_path / "grid", "--json").out)
    assert (summary["runs"], [f["cell"] for f in summary["failed"]]) == (3, ["algorithm=fedavg_name=correction-noise"])
    assert {p.name.partition("@")[0] for p in tmp_path.glob("grid/algorithm=fedavg_name=none/attacks/*")} == {
        "identity-linkage"
    }
    again = cli("report", tmp_path / "grid", "-o", tmp_path / "page", "--json")
    assert json.loads(again.out)["failed"] == summary["failed"]
    for text in ((tmp_path / "page/report.html").read_text(), (tmp_path / "page/results.csv").read_text()):
        assert "correction-noise changes" in text
    mistaken = tmp_path / "mistaken.toml"
    mistaken.write_text(SWEPT.replace("identity-linkage", "identity-linkages"))
    one_line(cli("sweep", mistaken, "--out", tmp_path / "other"), 2, "no attack 'identity-linkages'")
    mistaken.write_text(SWEPT.replace("threats", "threat"))
    one_line(cli("sweep", mistaken, "--out", tmp_path / "other"), 2, "sweep.threat", "threats")


def start(out: Path) -> subprocess.Popen[str]:
    """A training in a process of its own, that has finished its first round."""
    flags = [*TINY_FLAGS, "--set", "federation.rounds=500", "--set", "record.rounds=last"]
    process = subprocess.Popen(
        [sys.executable, "-m", "fedgc.cli", "train", *flags, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    while process.poll() is None and RunDirectory(out).last_round() < 2:
        time.sleep(0.02)
    return process


def test_killed_in_mid_round_nothing_is_lost(cli: Cli, tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    run = RunDirectory(tmp_path / "run")
    last = run.last_round()
    state = run.load_state()
    assert state is not None
    assert state.round == last >= 2
    one_line(cli("attack", tmp_path / "run"), 3, f"stopped after round {last} of 500", "--resume")
    one_line(cli("train", "--out", tmp_path / "run", *TINY_FLAGS), 2, "another configuration")


def test_interrupted_with_the_state_saved(tmp_path: Path) -> None:
    process = start(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (130, "")
    assert f"fedgc-priv train --out {tmp_path / 'run'} --resume" in err
    assert RunDirectory(tmp_path / "run").load_state() is not None


# -- audit

CLIENT_DP = ("--set", "defense.name=client-dp", "--set", "defense.noise_multiplier=1")


def test_an_audit_says_what_is_claimed_found_and_could_have_been(cli: Cli) -> None:
    outcome = cli("audit", *CLIENT_DP, "--runs", 60)
    assert outcome.code == 0, outcome.err
    said = ("claimed: client-level, zero-out: ε = 4.8", "95 % confidence", "attack on 30 counted", "no bug found")
    for words in said:
        assert words in outcome.out
    found = json.loads(cli("audit", *CLIENT_DP, "--runs", 60, "--json").out)
    assert found["epsilon_lower_bound"]["value"] < found["claimed"] < found["epsilon_lower_bound"]["ceiling"]
    assert (found["exceeded"], found["runs"], found["defense"]["name"]) == (False, 60, "client-dp")


def test_an_audit_that_finds_a_bug_fails(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    from defenses.client_dp import ClientDP

    monkeypatch.setattr(ClientDP, "aggregated", lambda self, delta, share, noise: delta)
    outcome = cli("audit", *CLIENT_DP, "--runs", 60)
    assert outcome.code == 1
    assert "does not keep its promise" in outcome.out
    assert outcome.err == ""


def test_an_audit_of_what_promises_nothing_is_refused(cli: Cli) -> None:
    one_line(cli("audit"), 2, "none promises no epsilon", "--set defense.name=dp-sgd")
    one_line(cli("audit", "--set", "defense.name=pruning"), 2, "pruning promises no epsilon")
    one_line(cli("audit", *CLIENT_DP, "--set", "federation.algorithm=local"), 2, "client-dp", "under local none does")
