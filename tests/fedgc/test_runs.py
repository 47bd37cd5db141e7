"""The run directory: exact round trips, owner-only secrets, whole files or none, and errors that say what to do."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from defenses.dp_sgd import DPSGD
from fedgc.errors import RunError, UsageError, WorkFailedError
from fedgc.files import read_tensors, write_bytes, write_json, write_tensors
from fedgc.runs import RunDirectory, require_new
from fedgc.transcripts import pack_transcript, round_of, size_of, step_of, transcript_name
from fedgc.types import Charge, ModelSpec, State, Truth
from fedgc.victims import victims

SPEC = ModelSpec("small", "group", 16, 32, "cosface", 0.2, 8.0)


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    run = RunDirectory(tmp_path / "run")
    run.create("seed = 0\n")
    run.noise_key(None)
    run.begin({"config_digest": "abc", "rounds": 9})
    return run


def state(round: int) -> State:
    drawn = torch.Generator().manual_seed(round)
    backbone = {"backbone.a": torch.randn(3, 4, generator=drawn), "backbone.b": torch.randn(2, generator=drawn)}
    charges = tuple(Charge(k, t, 1.1, 0.1, 5) for t in range(1, round + 1) for k in range(2))
    momentum = {name: torch.randn(x.shape, generator=drawn) for name, x in backbone.items()}
    return State(round, backbone, torch.randn(5, 4, generator=drawn), charges, momentum)


def saved(run: RunDirectory, *rounds: int) -> None:
    for t in rounds:
        run.save_round(state(t), {"round": t, "loss": 1 / t}, SPEC)


def same(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def damage(path: Path, at: int = -1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def refusal(call, *names: str) -> str:
    """The message of the run error (exit code 3) that a call must end in; it names every one of ``names``."""
    with pytest.raises(RunError) as error:
        call()
    assert error.value.exit_code == 3
    for name in names:
        assert name in str(error.value)
    return str(error.value)


# -- round trips


@pytest.mark.parametrize("defense", [None, DPSGD(noise_multiplier=1.0, delta=1e-2)], ids=["none", "dp-sgd"])
@pytest.mark.parametrize("algorithm", ["fedavg", "fedpe", "fedgc"])
@pytest.mark.parametrize("kind", ["round", "step"])
def test_a_transcript_survives_the_disk_bit_for_bit(run, federation, algorithm: str, kind: str, defense) -> None:
    fed = federation(algorithm, defense=defense, participation=0.67, clip_norm=1.0)
    start = fed.initial_state()
    if kind == "round":
        written = fed.play(start).transcript
    else:
        written = fed.play_step(start, 0, *victims(fed.parties, 1, 3, seed=0)[0])[0]
    run.save_transcript("x", written)
    read = run.load_transcript("x")
    for name in ("algorithm", "round", "kind", "constants", "rows", "owners", "examples"):
        assert getattr(read, name) == getattr(written, name)
    assert same(read.broadcast, written.broadcast)
    assert same(read.released, written.released)
    for place in ("sent", "returned"):
        a, b = getattr(read, place), getattr(written, place)
        assert a.keys() == b.keys()
        assert all(same(a[k], b[k]) for k in a)
    assert read.updates.keys() == written.updates.keys()
    for k, update in read.updates.items():
        assert (update.client, update.num_examples) == (k, written.updates[k].num_examples)
        assert same(update.tensors, written.updates[k].tensors)


def test_a_truncated_record_keeps_the_clients_that_trained(run, federation) -> None:
    fed = federation("fedgc")
    whole = fed.play(fed.initial_state()).transcript
    run.save_transcript("x", replace(whole, updates={1: whole.updates[1]}))
    read = run.load_transcript("x")
    assert set(read.updates) == {1}
    assert read.examples == {0: 8, 1: 9, 2: 12}


def test_truth_and_knowledge_survive_the_disk(run) -> None:
    photos = torch.randint(0, 256, (2, 3, 3, 8, 8), dtype=torch.uint8)
    labels = torch.tensor([[0, 1, 1], [2, 2, 3]])
    run.save_truth("x", Truth((0, 4), photos.float() / 255, labels))
    truth = run.load_truth("x")
    assert truth.clients == (0, 4)
    assert torch.equal(truth.images, photos.float() / 255)
    assert torch.equal(truth.labels, labels)
    run.save_knowledge((photos[0], torch.tensor([0, 0, 1])), (photos[1], torch.tensor([0, 1, 0])))
    owned = run.load_knowledge()
    strangers, gallery = owned.auxiliary_faces, owned.gallery
    assert owned.auxiliary_people.tolist() == [0, 0, 1]
    assert torch.equal(strangers, photos[0].float() / 255)
    assert torch.equal(gallery.images, photos[1].float() / 255)
    assert gallery.size == 2
    run.save_identities({"class_name": {"0": "Ünal"}})
    assert run.load_identities() == {"class_name": {"0": "Ünal"}}


def test_a_state_survives_the_disk_bit_for_bit(run) -> None:
    saved(run, 1, 2)
    read, written = run.load_state(), state(2)
    assert (read.round, read.ledger) == (2, written.ledger)
    assert same(read.backbone, written.backbone)
    assert same(read.momentum, written.momentum)
    assert torch.equal(read.rows, written.rows)
    assert run.metrics() == [{"round": 1, "loss": 1.0}, {"round": 2, "loss": 0.5}]
    assert [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()] == run.metrics()


def test_a_state_without_server_momentum_survives_too(run) -> None:
    run.save_round(replace(state(1), momentum={}), {"round": 1}, SPEC)
    read = run.load_state()
    assert read.momentum == {}
    assert same(read.backbone, state(1).backbone)


def test_a_released_checkpoint_holds_the_backbone_and_nothing_else(run) -> None:
    saved(run, 1)
    tensors, about = read_tensors(run.checkpoint_path(1))
    assert same(tensors, state(1).backbone)
    assert ModelSpec(**about["spec"]) == SPEC


@pytest.mark.parametrize(
    ("arguments", "name", "step", "size"),
    [
        ((10,), "round-0010", "", None),
        ((10, 4, 1), "round-0010-step-b4-1", "b4-1", (4, 1)),
        ((10, 4, 1, 1), "round-0010-step-b4-1", "b4-1", (4, 1)),
        ((12345, 16, 10, 5), "round-12345-step-b16-k5-10", "b16-k5-10", (16, 5)),
    ],
)
def test_names_of_transcripts(arguments: tuple[int, ...], name: str, step: str, size: tuple[int, int] | None) -> None:
    assert transcript_name(*arguments) == name
    assert (round_of(name), step_of(name), size_of(name)) == (arguments[0], step, size)


# -- secrets


def test_what_holds_faces_or_secrets_is_owner_only(run, federation) -> None:
    os.umask(0)  # the most permissive process must not matter
    try:
        fed = federation("fedgc")
        transcript, truth = fed.play_step(fed.initial_state(), 0, *victims(fed.parties, 1, 3, seed=0)[0])
        run.save_truth("x", truth)
        run.save_transcript("x", transcript)
        faces = torch.zeros(2, 1, 3, 8, 8, dtype=torch.uint8)
        run.save_knowledge((faces[0], torch.zeros(1)), (faces[1], torch.zeros(1, dtype=torch.long)))
        run.save_identities({})
        saved(run, 1)
    finally:
        os.umask(0o022)
    for folder in ("private", "attacker", "state"):
        assert mode(run.path / folder) == 0o700
        files = list((run.path / folder).iterdir())
        assert files
        assert {mode(f) for f in files} == {0o600}
    assert mode(run.path / "transcript" / "x.safetensors") == 0o644


def test_the_noise_key_is_drawn_once_and_kept(run, tmp_path: Path) -> None:
    key = run.noise_key(None)
    assert RunDirectory(run.path).noise_key(None) == key
    assert mode(run.path / "state" / "noise-key.json") == 0o600
    other = RunDirectory(tmp_path / "other")
    other.create("")
    assert other.noise_key(None) != key


@pytest.mark.parametrize("fixed", [0, 7])
def test_a_given_seed_fixes_the_noise_and_leaves_no_file(run, fixed: int) -> None:
    other = RunDirectory(run.path.parent / "other")
    other.create("")
    assert other.noise_key(fixed) == fixed
    assert not (other.path / "state" / "noise-key.json").exists()


# -- the ledger


def test_a_replayed_charge_is_one_release(run) -> None:
    first, second = (Charge(0, 1, 1.0, 0.1, 5), Charge(1, 1, 1.0, 0.1, 5)), (Charge(0, 2, 1.0, 0.1, 5),)
    for ledger in (first, first, (*first, *second), first, ()):
        run.charge(ledger)
    assert run.charge(()) == (*first, *second)


def test_a_charge_that_differs_is_added(run) -> None:
    for sigma in (1.0, 2.0):
        run.charge((Charge(0, 1, sigma, 0.1, 5),))
    assert len(run.charge(())) == 2


def test_without_a_promise_there_is_no_ledger(run) -> None:
    assert run.charge(()) == ()
    assert not (run.path / "privacy.json").exists()


@pytest.mark.parametrize("harm", ["lost", "flipped digit", "truncated", "empty", "of another shape"])
def test_a_harmed_ledger_is_made_again_from_the_state(run, harm: str) -> None:
    ledger = state(3).ledger
    run.charge(ledger)
    path = run.path / "privacy.json"
    whole = path.read_bytes()
    match harm:
        case "lost":
            path.unlink()
        case "flipped digit":
            path.write_bytes(whole.replace(b"1.1", b"9.1"))  # more noise, so less epsilon
        case "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        case "empty":
            path.write_bytes(b"")
        case _:
            path.write_text("[]")
    assert run.charge(ledger) == ledger
    assert path.read_bytes() == whole


# -- atomic writes


@pytest.mark.parametrize("call", ["replace", "fsync", "chmod"])
def test_a_failed_write_leaves_the_old_file_and_no_trace(tmp_path: Path, monkeypatch, call: str) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def fail(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(WorkFailedError, match=r"file could not be written .*half-written") as error:
        write_bytes(path, b"new")
    assert error.value.exit_code == 1
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_an_interrupted_write_leaves_the_old_file_and_no_trace(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "file"
    write_bytes(path, b"old")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_the_temporary_file_stands_beside_its_target(tmp_path: Path, monkeypatch) -> None:
    """A rename from another file system would not be atomic."""
    monkeypatch.setenv("TMPDIR", "/nowhere")
    seen = []
    real = os.replace
    monkeypatch.setattr(os, "replace", lambda a, b: (seen.append(Path(a).parent), real(a, b)))
    write_bytes(tmp_path / "file", b"x")
    assert seen == [tmp_path]


def test_writing_to_a_folder_that_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(WorkFailedError, match="could not be written"):
        write_bytes(tmp_path / "none" / "file", b"x")


def test_json_of_a_number_that_is_not_one_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"):
        write_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


# -- damage and crashes


@pytest.mark.parametrize("at", [0, 9, 40, -1, -20])
def test_a_damaged_state_falls_back_to_the_round_before(run, at: int) -> None:
    saved(run, 1, 2, 3)
    damage(run.path / "state" / "round-0003.safetensors", at)
    read = run.load_state()
    assert (read.round, read.ledger) == (2, state(2).ledger)
    assert same(read.backbone, state(2).backbone)


@pytest.mark.parametrize("kept", [0, 8, 100])
def test_a_truncated_state_falls_back_to_the_round_before(run, kept: int) -> None:
    saved(run, 1, 2)
    path = run.path / "state" / "round-0002.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    assert run.load_state().round == 1


def test_nothing_intact_means_starting_again(run) -> None:
    assert run.load_state() is None
    saved(run, 1)
    damage(run.path / "state" / "round-0001.safetensors")
    assert run.load_state() is None


def test_a_round_without_its_commit_never_happened(run) -> None:
    """A crash between the tensors and the JSON that commits them."""
    saved(run, 1, 2)
    (run.path / "state" / "round-0002.json").unlink()
    assert run.last_round() == 1
    assert run.load_state().round == 1
    saved(run, 2)
    assert run.load_state().round == 2


def test_rounds_after_the_one_to_resume_from_are_forgotten(run) -> None:
    saved(run, 1, 2, 3)
    damage(run.path / "state" / "round-0003.safetensors")
    run.forget_after(run.load_state().round)
    assert run.rounds() == [1, 2]
    saved(run, 3)
    assert run.load_state().round == 3
    assert [m["round"] for m in run.metrics()] == [1, 2, 3]


def test_the_first_and_the_last_two_states_are_kept(run) -> None:
    saved(run, *range(1, 7))
    whole = [t for t in range(1, 7) if (run.path / "state" / f"round-{t:04d}.safetensors").exists()]
    assert whole == [1, 5, 6]
    assert run.load_state(1).round == 1
    assert run.load_state(3) is None
    assert len(run.metrics()) == 6
    assert all(run.checkpoint_path(t).exists() for t in range(1, 7))


def test_a_crash_before_old_states_are_removed_leaves_none(run, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "_thin_out", lambda self: None)
        saved(run, *range(1, 5))
    run.forget_after(run.load_state().round)
    assert sorted(p.stem for p in (run.path / "state").glob("*.safetensors")) == [
        "round-0001",
        "round-0003",
        "round-0004",
    ]


# -- refusals


def test_a_missing_run_says_how_to_train_one(tmp_path: Path) -> None:
    refusal(RunDirectory(tmp_path / "none").about, "none is not a run directory", "fedgc-priv train --out")


@pytest.mark.parametrize("content", ["{", "", "\xff"])
def test_a_damaged_header_is_named(run, content: str) -> None:
    (run.path / "run.json").write_text(content, encoding="latin-1")
    refusal(run.about, "run.json is damaged", "train again")


@pytest.mark.parametrize("content", ['{"schema": 0}', '{"schema": 2}', "{}", "[]", "3"])
def test_another_schema_is_refused(run, content: str) -> None:
    (run.path / "run.json").write_text(content)
    refusal(run.about, "this version reads schema 1", "train again")


def test_an_unfinished_run_says_how_to_go_on(run) -> None:
    saved(run, 1, 2)
    refusal(run.finished, "after round 2 of 9", "--resume")
    run.update(status="finished")
    assert run.finished()["config_digest"] == "abc"


def test_missing_files_are_named(run) -> None:
    refusal(lambda: run.load_transcript("round-0001"), "round-0001.safetensors is missing")
    refusal(lambda: run.load_truth("x"), "x.safetensors is missing")
    refusal(run.load_knowledge, "knowledge.safetensors is missing")
    refusal(run.load_identities, "identities.json is missing")


def test_a_second_holder_is_refused_and_the_lock_is_given_back(run) -> None:
    with run.locked():
        refusal(lambda: RunDirectory(run.path).locked().__enter__(), "in use by another process", "--out")
    with RunDirectory(run.path).locked():
        pass


def test_a_lock_is_given_back_after_an_error(run) -> None:
    with pytest.raises(ZeroDivisionError), run.locked():
        raise ZeroDivisionError
    with run.locked():
        pass


def test_a_new_run_takes_an_empty_or_missing_folder(tmp_path: Path) -> None:
    require_new(RunDirectory(tmp_path / "none"), "seed = 0\n", "abc")
    require_new(RunDirectory(tmp_path), "seed = 0\n", "abc")
    (tmp_path / ".lock").touch()
    (tmp_path / ".config.toml.abcd1234.tmp").touch()
    require_new(RunDirectory(tmp_path), "seed = 0\n", "abc")


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match="not empty and not a run directory: choose another --out") as error:
        require_new(RunDirectory(tmp_path), "seed = 0\n", "abc")
    assert error.value.exit_code == 2


def test_a_run_of_another_configuration_is_left_alone(run) -> None:
    with pytest.raises(UsageError, match="another configuration: choose another --out"):
        require_new(run, "seed = 0\n", "xyz")


def test_an_unfinished_run_of_this_configuration_asks_for_resume(run) -> None:
    saved(run, 1)
    refusal(lambda: require_new(run, "seed = 0\n", "abc"), "after round 1 of 9", "--resume")


# -- hostile files


class Canary:
    """Runs when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["pickle", "torch", "legacy torch", "numpy", "empty", "text", "header"])
def test_only_safetensors_is_read(run, tmp_path: Path, form: str) -> None:
    path, canary = run.path / "transcript" / "x.safetensors", tmp_path / "canary"
    match form:
        case "pickle":
            path.write_bytes(pickle.dumps(Canary(canary)))
        case "torch":
            torch.save(Canary(canary), path)
        case "legacy torch":
            torch.save(Canary(canary), path, _use_new_zipfile_serialization=False)
        case "numpy":
            import numpy as np

            with path.open("wb") as file:
                np.save(file, np.array([Canary(canary)], dtype=object), allow_pickle=True)
        case "empty":
            path.touch()
        case "text":
            path.write_text("{}")
        case "header":
            path.write_bytes((1 << 40).to_bytes(8, "little") + b"{}")
    refusal(lambda: run.load_transcript("x"), "x.safetensors", "no other format is loaded")
    assert not canary.exists()


@pytest.mark.parametrize("loader", ["load_transcript", "load_truth"])
def test_a_safetensors_file_of_something_else_is_a_run_error(run, loader: str) -> None:
    for folder in ("transcript", "private"):
        write_tensors(run.path / folder / "x.safetensors", {"weight": torch.zeros(2)})
    refusal(lambda: getattr(run, loader)("x"))


@pytest.mark.parametrize("change", [(b"1.1", b"9.1"), (b"ledger", b"ledges"), (b"sha256", b"sha257"), (b"{", b"")])
def test_a_damaged_commit_falls_back_to_the_round_before(run, change: tuple[bytes, bytes]) -> None:
    saved(run, 1, 2)
    path = run.path / "state" / "round-0002.json"
    assert change[0] in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(*change))
    assert run.load_state().round == 1


def test_metrics_are_mended_from_the_commits_and_commits_need_no_mending(run) -> None:
    """A crash between commit and metrics, damage in either; a commit before the last is only needed for its metrics."""
    saved(run, 1, 2, 3)
    path, whole = run.path / "metrics.jsonl", (run.path / "metrics.jsonl").read_bytes()
    for harmed in (
        whole[:-20],
        whole.splitlines(keepends=True)[0],
        b"",
        b"\xff" + whole,
        whole + whole,
        b"{}\n[]\n3\n",
    ):
        path.write_bytes(harmed)
        run.forget_after(run.load_state().round)
        assert path.read_bytes() == whole
    (run.path / "state" / "round-0002.json").write_text("{")
    run.forget_after(run.load_state().round)
    assert path.read_bytes() == whole
    assert [m["round"] for m in run.metrics()] == [1, 2, 3]


def test_damaged_metrics_of_a_finished_run_are_named(run) -> None:
    saved(run, 1)
    (run.path / "metrics.jsonl").write_text('{"round": 1')
    refusal(run.metrics, "metrics.jsonl is damaged")


@pytest.mark.parametrize("content", [None, "", "3", '{"sha256": "0", "content": 3}'])
def test_a_lost_noise_key_is_never_replaced(run, content: str | None) -> None:
    """A replay with other noise is a second release of the same photos."""
    path = run.path / "state" / "noise-key.json"
    path.unlink() if content is None else path.write_text(content)
    refusal(lambda: run.noise_key(None), "noise-key.json is lost or damaged", "train again")


def test_a_flipped_bit_of_the_noise_key_is_noticed(run) -> None:
    path = run.path / "state" / "noise-key.json"
    key = str(run.noise_key(None))
    path.write_text(path.read_text().replace(key, key[:-1] + str((int(key[-1]) + 1) % 10)))
    refusal(lambda: run.noise_key(None), "lost or damaged")


def test_what_a_killed_process_left_half_written_is_cleared_away_and_nothing_else(run) -> None:
    saved(run, 1)
    kept = {p for p in run.path.rglob("*") if p.is_file()}
    folders = [run.path, *(p for p in run.path.iterdir() if p.is_dir())]
    for folder in folders:
        (folder / ".round-0002.json.abcd1234.tmp").write_text("half")
        (folder / "thesis.tmp").touch()
        (folder / ".hidden").touch()
    with pytest.raises(RunError), run.locked(), RunDirectory(run.path).locked():
        pass
    with run.locked():
        pass
    found = {p for p in run.path.rglob("*") if p.is_file()} - {run.path / ".lock"}
    assert found == kept | {folder / name for folder in folders for name in ("thesis.tmp", ".hidden")}


def test_packing_names_every_message_once(federation) -> None:
    fed = federation("fedgc")
    t = fed.play(fed.initial_state()).transcript
    tensors, about = pack_transcript(t)
    count = len(t.broadcast) + len(t.released) + 3 + 3 + sum(len(u.tensors) for u in t.updates.values())
    assert len(tensors) == count
    json.dumps(about, allow_nan=False)
