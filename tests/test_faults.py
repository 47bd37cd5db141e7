"""A full, read-only or failing disk, damage, signals, a second process: what is refused, and exact resumption after the rest."""

from __future__ import annotations

import errno
import fcntl
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny import TINY, Outcome

from fedgc import files, stopping
from fedgc.config import Config, load_config
from fedgc.data.folder import Image
from fedgc.errors import RunError, UsageError, WorkFailedError
from fedgc.pipeline.evaluation import document
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from tests.trust.faulty import FAULTS, Faulty, readable, same

Cli = Callable[..., Outcome]
PRIVATE = ("defense.name=dp-sgd", "defense.noise_multiplier=1.0", "defense.noise_seed=1", "federation.rounds=3")
FLAGS = [part for setting in (*TINY, *PRIVATE) for part in ("--set", setting)]


@pytest.fixture(scope="module")
def config() -> Config:
    return load_config(settings=(*TINY, *PRIVATE))


@pytest.fixture(scope="module")
def whole(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody disturbed; tests compare with it."""
    out = tmp_path_factory.mktemp("whole") / "run"
    train(config, out)
    return out


# -- disk


WRITES = (0, 3, 11, 16, 20, 26)  # of the configuration, in the start, of the first, second and last round
QUICK = {("fdopen", 26), ("fsync", 11), ("replace", 16)}


@pytest.mark.parametrize(
    ("call", "number", "after"),
    [
        pytest.param(call, number, n, marks=() if (call, n) in QUICK else pytest.mark.slow)
        for call, number in FAULTS
        for n in WRITES
    ],
)
def test_a_failing_disk_stops_the_run_and_costs_nothing(
    cli: Cli, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, number: int, after: int
) -> None:
    out = tmp_path / "run"
    after = after * 2 + after % 2 if call == "fsync" else after  # the file, then its folder
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", Faulty(call, after, number))
        outcome = cli("train", *FLAGS, "--out", out)
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err.count("\n") == 1
    assert os.strerror(number) in outcome.err
    assert str(out) in outcome.err
    readable(out)
    begun = RunDirectory(out).exists
    assert cli("train", "--out", out, *(["--resume"] if begun else FLAGS)).code == 0
    same(out, whole)


def test_every_write_of_a_run_is_durable(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No other way of writing is used than the one that the test above lets fail."""
    written = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (written.append(Path(b)), real(a, b)))
    train(config, tmp_path / "run")
    found = {p for p in (tmp_path / "run").rglob("*") if p.is_file() and p.name != ".lock"}
    assert found <= set(written)


@pytest.mark.slow
def test_a_limit_on_file_size_is_a_full_disk(whole: Path, tmp_path: Path) -> None:
    """Not pretended: the system itself refuses to write more of the first round's state."""
    limit = (whole / "state" / "round-0001.safetensors").stat().st_size - 1
    child = subprocess.run(
        [sys.executable, "-m", "fedgc.cli", "train", *FLAGS, "--out", str(tmp_path / "run")], capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)), check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert (child.returncode, child.stdout) == (1, "")
    assert child.stderr.count("\n") == 1
    assert "File too large" in child.stderr
    readable(tmp_path / "run")
    train(None, tmp_path / "run", resume=True)
    same(tmp_path / "run", whole)


@pytest.mark.parametrize("call", ["mkdir", "open"])
def test_a_read_only_folder_is_one_clear_error(
    cli: Cli, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(tmp_path))

    out = tmp_path / "runs" / "x"
    with monkeypatch.context() as patch:
        patch.setattr(Path, "mkdir", refuse) if call == "mkdir" else patch.setattr(
            "fedgc.runs.open", refuse, raising=False
        )
        outcome = cli("train", *FLAGS, "--out", out)
    assert outcome.code == 1
    assert "could not be written" in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_finished_run_is_read_without_writing(whole: Path, config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "os", Faulty("fsync", 0, errno.EROFS))
    monkeypatch.setattr(RunDirectory, "locked", None)
    assert train(config, whole)["status"] == "finished"


# -- damage


def interrupted(config: Config, out: Path, rounds: int) -> RunDirectory:
    """A run that stopped after some rounds."""
    left = rounds

    def stop() -> None:
        nonlocal left
        left -= 1
        if not left:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config, out, after_round=stop)
    return RunDirectory(out)


@pytest.mark.parametrize(
    "harm",
    [
        "state bit", "commit", "all", *(
            pytest.param(harm, marks=pytest.mark.slow)
            for harm in ("state cut", "state gone", "early commit", "all states", "ledger bit", "ledger gone")
        ),
    ],
)  # fmt: skip
def test_damage_is_noticed_and_played_over(config: Config, whole: Path, tmp_path: Path, harm: str) -> None:
    run = interrupted(config, tmp_path / "run", 2)
    tensors, commit = (run.path / "state" / f"round-0002.{s}" for s in ("safetensors", "json"))
    if harm == "state bit":
        flip(tensors, 5000)
    elif harm == "state cut":
        tensors.write_bytes(tensors.read_bytes()[:-7])
    elif harm == "state gone":
        tensors.unlink()
    elif harm == "commit":
        flip(commit, commit.read_bytes().index(b"noise_multiplier") + 19)
    elif harm == "early commit":
        (run.path / "state" / "round-0001.json").write_text("{")
    if harm in ("all states", "all"):
        for path in (run.path / "state").glob("round-*.safetensors"):
            flip(path, 9)
    if harm == "ledger bit":
        flip(run.path / "privacy.json", (run.path / "privacy.json").read_bytes().index(b"noise_multiplier") + 19)
    if harm in ("ledger gone", "all"):
        (run.path / "privacy.json").unlink()
    train(None, run.path, resume=True)
    same(run.path, whole)


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_a_charge_that_the_state_does_not_know_is_counted(config: Config, whole: Path, tmp_path: Path) -> None:
    """What was released under other noise stays released: epsilon is that of the whole ledger."""
    run = interrupted(config, tmp_path / "run", 2)
    state = run.load_state()
    assert state is not None
    run.charge(tuple(type(c)(c.client, c.round, 0.9, c.sample_rate, c.steps) for c in state.ledger))
    resumed = train(None, run.path, resume=True)
    assert resumed["privacy"]["epsilon"] > document(RunDirectory(whole))["privacy"]["epsilon"]


def test_other_noise_is_refused_where_privacy_was_promised(config: Config, tmp_path: Path) -> None:
    run = interrupted(config, tmp_path / "run", 1)
    before = run.about()
    changes = {"libraries": {"torch": "1.0"}, "device": "cuda", "defense": {"noise_multiplier": 2.0}}
    for name, value in changes.items():
        run.update(**{**before, name: value})
        with pytest.raises(RunError, match=f"begun with other {name} "):
            train(None, run.path, resume=True)
    plain = interrupted(load_config(settings=TINY), tmp_path / "plain", 1)
    plain.update(**changes)
    assert train(None, plain.path, resume=True)["status"] == "finished"


# -- two processes


def test_a_second_process_is_refused_until_the_first_is_gone(cli: Cli, config: Config, tmp_path: Path) -> None:
    run = interrupted(config, tmp_path / "run", 1)
    code = (
        "import fcntl, sys, time; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True);"
        "time.sleep(600)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(run.path / ".lock")], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    holder.stdout.readline()
    try:
        for more in ((), ("--resume",)):
            outcome = cli("train", *FLAGS, "--out", run.path, *more)
            assert outcome.code == 3
            assert "in use by another process" in outcome.err
            assert outcome.err.count("\n") == 1
        assert run.last_round() == 1
    finally:
        holder.kill()
        holder.communicate()
    assert cli("train", *FLAGS, "--out", run.path, "--resume").code == 0


def test_a_run_that_another_process_began_meanwhile_is_not_gone_on_with(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at an empty folder and the lock, another process begins a run of another configuration."""
    other, real = load_config(settings=TINY), fcntl.flock
    out = tmp_path / "run"

    def late(file: Any, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", real)
        interrupted(other, out, 1)
        real(file, how)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(UsageError, match="holds a run of another configuration"):
        train(config, out)
    assert RunDirectory(out).about()["config_digest"] == other.digest()


# -- killed starts and signals


@pytest.mark.parametrize(
    "place",
    [
        "make_folder", "noise_key", *(
            pytest.param(place, marks=pytest.mark.slow)
            for place in ("write_text", "save_knowledge", "save_identities", "begin")
        ),
    ],
)  # fmt: skip
def test_a_start_that_was_cut_off_anywhere_is_started_again(
    config: Config, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        if place == "write_text":
            patch.setattr("fedgc.runs.write_text", cut)
        elif place == "make_folder":
            patch.setattr(
                "fedgc.runs.SHARED_FOLDERS", ("checkpoints", None)
            )  # / None raises TypeError: between two folders
        else:
            patch.setattr(RunDirectory, place, cut)
        with pytest.raises((KeyboardInterrupt, TypeError)):
            train(config, out)
    assert not RunDirectory(out).exists
    train(config, out)
    same(out, whole)


def test_a_decoder_cannot_swallow_a_signal(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Photos are decoded under `except Exception`: a signal there would pass for a damaged photo."""
    from fedgc.data.faces import load_faces
    from fedgc.data.synthetic import synthetic_faces

    photos, labels = synthetic_faces(4, 2, 32, 0)
    for n, (photo, label) in enumerate(zip(photos, labels.tolist(), strict=True)):
        (tmp_path / f"p{label}").mkdir(exist_ok=True)
        Image.fromarray(photo.permute(1, 2, 0).numpy()).save(tmp_path / f"p{label}" / f"{n}.png")

    def signalled(*_: Any, **__: Any) -> None:
        raise stopping.StopSignalError(130)

    monkeypatch.setattr(Image, "open", signalled)
    with pytest.raises(stopping.StopSignalError):
        load_faces(str(tmp_path), image_size=32, align="none", seed=0)


STUCK = """
import os, sys, time
from fedgc import stopping
stopping.GRACE = float(sys.argv[1])
stopping.stop_on_signals()
while True:
    try:
        print("ready", flush=True)
        time.sleep(600)
    except stopping.StopSignalError:
        print("raised", flush=True)  # and yet does not end, like work inside one long call
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("grace", [0.1, 600])
def test_what_does_not_stop_by_itself_is_ended(number: signal.Signals, grace: float) -> None:
    """After a while, or by a second signal."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, str(grace)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(number)
    if grace > 1:
        assert process.stdout.readline() == "raised\n"
        process.send_signal(number)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 128 + number
    assert "--resume" in err


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("rounds", [-1, 0, 1, 3])
def test_a_signal_keeps_the_last_round(whole: Path, tmp_path: Path, number: signal.Signals, rounds: int) -> None:
    """While faces are read (-1), after a round, in the evaluation (3): the exit code, and a message that is right."""
    out = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fedgc.cli", "train", *FLAGS, "--out", str(out)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    run = RunDirectory(out)
    while process.poll() is None and not (
        run.exists and run.last_round() >= rounds if rounds >= 0 else (out / ".lock").exists()
    ):
        time.sleep(0.002)
    process.send_signal(number)
    printed, err = process.communicate(timeout=60)
    assert (process.returncode, printed) == (128 + number, "")
    readable(out)
    if run.exists:
        assert f"fedgc-priv train --out {out} --resume" in err
        train(None, out, resume=True)
    else:
        assert "repeat the command" in err
        train(load_config(settings=(*TINY, *PRIVATE)), out)
    same(out, whole)


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(WorkFailedError, match=r"none/file could not be written .*put that right") as error:
        files.write_bytes(tmp_path / "none" / "file", b"x")
    assert error.value.exit_code == 1
