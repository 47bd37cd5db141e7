"""model.init: what training may start from, what it refuses, and what a run says about it."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import TINY, Outcome
from torch import Tensor, nn

from fedgc import models
from fedgc.config import Config, load_config
from fedgc.errors import FedgcError, RunError, UsageError, WorkFailedError
from fedgc.files import read_json, read_tensors, sha256, write_tensors
from fedgc.models import BACKBONES, build_backbone, embed, state_tensors
from fedgc.pipeline.evaluation import document, evaluate
from fedgc.pipeline.initial import read_initial
from fedgc.pipeline.training import train
from fedgc.runs import RunDirectory
from fedgc.types import BACKBONE

OTHERS = (*TINY, "seed=7")  # synthetic people of another seed are other people
LAST = "checkpoints/round-0002.safetensors"


def config(*settings: str, init: object = None) -> Config:
    return load_config(settings=(*TINY, *settings, *([f"model.init={init}"] if init is not None else [])))


@pytest.fixture(scope="module")
def public(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run on other people for each norm that a network can be trained with from the start."""
    root = tmp_path_factory.mktemp("public")
    for norm in ("group", "batch"):
        train(load_config(settings=(*OTHERS, f"model.norm={norm}")), root / norm)
    return {norm: root / norm for norm in ("group", "batch")}


def refused(asked: Config, *says: str, kind: type[FedgcError] = UsageError) -> None:
    with pytest.raises(kind) as caught:
        read_initial(asked)
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in says), text


# -- from a run, and from a checkpoint


@pytest.mark.parametrize(("of", "norm"), [("group", "group"), ("batch", "batch"), ("batch", "frozen")])
@pytest.mark.parametrize("form", ["run", "checkpoint"])
def test_the_weights_are_those_of_the_last_round(public: dict[str, Path], of: str, norm: str, form: str) -> None:
    path = public[of] if form == "run" else public[of] / LAST
    initial = read_initial(config(f"model.norm={norm}", init=path))
    assert initial is not None
    saved, _ = read_tensors(public[of] / LAST)
    assert set(initial.tensors) == set(saved)
    assert all(torch.equal(initial.tensors[name], tensor) for name, tensor in saved.items())
    about = read_json(public[of] / "run.json")
    assert initial.about == {
        "path": str(path), "sha256": sha256(public[of] / LAST), "source": about["source"], "datasets": [about["dataset"]],
    }  # fmt: skip


@pytest.fixture(scope="module")
def tuned(public: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fine-tuned under DP-SGD from public weights with frozen norms."""
    path = tmp_path_factory.mktemp("tuned") / "run"
    private = ("defense.name=dp-sgd", "defense.noise_multiplier=0.5", "defense.noise_seed=1")
    train(config("model.norm=frozen", *private, init=public["batch"]), path)
    return path


def test_training_starts_from_the_public_weights_and_leaves_the_norms_alone(
    tuned: Path, public: dict[str, Path]
) -> None:
    saved, _ = read_tensors(public["batch"] / LAST)
    first = RunDirectory(tuned).load_transcript("round-0001").broadcast
    assert all(torch.equal(first[name], tensor) for name, tensor in saved.items())
    after, _ = read_tensors(tuned / LAST)
    constants = {name for name in saved if any(part in name for part in (".norm", "running_"))}
    assert len(constants) == 4 * 7
    assert all(torch.equal(after[name], saved[name]) is (name in constants) for name in saved)


def test_a_run_says_what_it_started_from(tuned: Path, public: dict[str, Path]) -> None:
    about = read_json(tuned / "run.json")["init"]
    assert about["path"] == str(public["batch"])
    assert about["sha256"] == sha256(public["batch"] / LAST)
    assert about["datasets"] == [read_json(public["batch"] / "run.json")["dataset"]]
    assert about["checkpoint"] == sha256(tuned / "checkpoints/round-0000.safetensors")


def test_public_only_is_the_utility_before_training(tuned: Path) -> None:
    baselines = document(RunDirectory(tuned))["baselines"]
    assert baselines["public-only"]["auc"]["value"] is not None
    assert baselines["public-only"] != baselines["untrained"]
    assert evaluate(tuned)["baselines"] == baselines
    elsewhere = evaluate(tuned, "synthetic:32x4")
    strangers = 32 - elsewhere["excluded_trained"]
    assert elsewhere["baselines"]["public-only"]["identities"] == elsewhere["utility"]["identities"] == strangers // 2


def test_public_only_needs_public_weights(public: dict[str, Path]) -> None:
    baseline = document(RunDirectory(public["group"]))["baselines"]["public-only"]
    assert (baseline["auc"]["value"], baseline["auc"]["why"]) == (None, "no public pre-training")


def test_a_resumed_run_needs_the_file_no_more(
    public: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is cut off before its first round or after it, and whatever became of the file."""
    file = tmp_path / "public.safetensors"
    file.write_bytes((public["group"] / LAST).read_bytes())
    asked = config(init=file)
    whole = train(asked, tmp_path / "whole")

    def cut(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(asked, tmp_path / "late", after_round=cut)
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "save_round", cut)
        with pytest.raises(KeyboardInterrupt):
            train(asked, tmp_path / "early")
    write_tensors(file, {"other": torch.zeros(1)})
    for name in ("early", "late"):
        resumed = train(None, tmp_path / name, resume=True)
        assert resumed["baselines"] == whole["baselines"]
        assert (tmp_path / name / LAST).read_bytes() == (tmp_path / "whole" / LAST).read_bytes()


def test_a_damaged_copy_is_not_gone_on_with(public: dict[str, Path], tmp_path: Path) -> None:
    def cut() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(config(init=public["group"]), tmp_path / "run", after_round=cut)
    (tmp_path / "run/checkpoints/round-0000.safetensors").write_bytes((public["batch"] / LAST).read_bytes())
    with pytest.raises(RunError, match="holds the weights this run began with"):
        train(None, tmp_path / "run", resume=True)


def test_weights_that_know_the_people_are_refused(public: dict[str, Path], tmp_path: Path) -> None:
    for path in (public["group"], public["group"] / LAST):
        with pytest.raises(UsageError, match="pre-train on other people"):
            train(load_config(settings=(*OTHERS, f"model.init={path}")), tmp_path / "run")
    assert not (tmp_path / "run/run.json").exists()


def test_weights_that_once_knew_the_people_are_refused(public: dict[str, Path], tmp_path: Path) -> None:
    train(config(init=public["group"]), tmp_path / "between")
    with pytest.raises(UsageError, match="pre-train on other people"):
        train(load_config(settings=(*OTHERS, f"model.init={tmp_path / 'between'}")), tmp_path / "run")


# -- what does not fit


@pytest.mark.parametrize(
    ("of", "settings", "says"),
    [
        ("group", ("model.norm=batch",), ("trained with norm = group", "running statistics", "model.norm = group")),
        ("group", ("model.norm=frozen",), ("cannot become frozen",)),
        ("batch", ("model.norm=group",), ("trained with norm = batch", "model.norm = frozen (or batch)")),
        ("group", ("model.embedding_size=64",), ("--set model.embedding_size=32",)),
        ("group", ("data.image_size=48",), ("--set data.image_size=32",)),
        (
            "group",
            ("model.backbone=mobilefacenet", "data.image_size=40"),
            ("--set model.backbone=small", "image_size=32"),
        ),
    ],
)
def test_another_network_is_refused_with_the_settings_that_fit(
    public: dict[str, Path], of: str, settings: tuple[str, ...], says: tuple[str, ...]
) -> None:
    refused(config(*settings, init=public[of]), *says)


def test_frozen_norms_need_weights() -> None:
    with pytest.raises(UsageError, match=r"set model\.init, or norm = group") as caught:
        config("model.norm=frozen")
    assert "\n" not in str(caught.value)


def changed(public: Path, path: Path, change: Callable[[dict[str, Tensor]], Any], **spec: Any) -> Path:
    tensors, about = read_tensors(public / LAST)
    change(tensors)
    write_tensors(path, tensors, {**about, "spec": {**about["spec"], **spec}})
    return path


STEM = "backbone.stem.weight"
VARIANCE = "backbone.norm.running_var"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: t.pop(STEM), f"lacks {STEM} (1 names differ)"),
        (lambda t: t.update({"backbone.more": torch.zeros(1)}), "also holds backbone.more"),
        (lambda t: t.update({STEM: t[STEM][:8]}), f"{STEM} is torch.float32 (8, 3, 3, 3) there"),
        (lambda t: t.update({STEM: t[STEM].half()}), f"{STEM} is torch.float16"),
        (lambda t: t.update({STEM: t[STEM] / 0}), f"{STEM} holds numbers that no training leaves"),
        (lambda t: t[VARIANCE].neg_(), f"{VARIANCE} holds numbers"),
    ],
)
def test_tensors_are_checked_one_by_one(
    public: dict[str, Path], tmp_path: Path, change: Callable[[dict[str, Tensor]], Any], says: str
) -> None:
    file = changed(public["batch"], tmp_path / "x.safetensors", change)
    refused(config("model.norm=frozen", init=file), says)


def test_a_file_must_say_what_it_is_for(public: dict[str, Path], tmp_path: Path) -> None:
    tensors, _ = read_tensors(public["group"] / LAST)
    for about in (None, [], {"spec": None}):
        write_tensors(tmp_path / "x.safetensors", tensors, about)
        refused(config(init=tmp_path / "x.safetensors"), "does not say which network")
    write_tensors(tmp_path / "x.safetensors", tensors, {"spec": {"backbone": "small"}})
    refused(config(init=tmp_path / "x.safetensors"), "wrong spec: norm: Field required")
    file = changed(public["group"], tmp_path / "y.safetensors", lambda t: None, backbone="of-tomorrow")
    refused(config(init=file), "wrong spec: backbone is one of small,")


def test_what_is_not_there_or_not_finished_is_refused(public: dict[str, Path], tmp_path: Path) -> None:
    refused(config(init=tmp_path / "none"), "does not exist", "a finished run")
    refused(config(init=tmp_path), "is not a run directory", kind=RunError)
    (tmp_path / "x.safetensors").write_bytes(b"pickle")
    refused(config(init=tmp_path / "x.safetensors"), "no other format is loaded", kind=RunError)

    def cut() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(load_config(settings=OTHERS), tmp_path / "half", after_round=cut)
    refused(config(init=tmp_path / "half"), "stopped after round 1 of 2", kind=RunError)


def test_a_hash_that_is_given_must_hold(public: dict[str, Path]) -> None:
    digest = sha256(public["group"] / LAST)
    assert read_initial(config(f"model.init_sha256={digest}", init=public["group"])) is not None
    refused(config(f"model.init_sha256={'0' * 64}", init=public["group"]), digest, "not that of model.init_sha256")


def test_sizes_that_a_backbone_does_not_take_are_refused_before_faces_are_read(
    cli: Callable[..., Outcome], tmp_path: Path
) -> None:
    wrong = ("--set", "model.backbone=inception-resnet-v1", "--data", tmp_path / "absent", "--out", tmp_path / "run")
    outcome = cli("train", *wrong)
    assert outcome.code == 2
    assert "--set model.embedding_size=512 --set data.image_size=112" in outcome.err
    assert not (tmp_path / "run/run.json").exists()


# -- published weights, with a tiny network in the place of the large one


class Tiny(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        self.net.append(nn.Linear(4, 512))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Canary:
    """Runs when somebody unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """A state dict as publishers write it: with counters and the classifier of their own people."""
    chosen = replace(BACKBONES["inception-resnet-v1"], make=lambda side, features: Tiny())
    monkeypatch.setitem(models.BACKBONES, "inception-resnet-v1", chosen)
    torch.manual_seed(0)
    net = Tiny().net
    with torch.no_grad():
        net(torch.rand(8, 3, 6, 6))  # moves the statistics
    return {**net.state_dict(), "logits.weight": torch.zeros(9, 512), "logits.bias": torch.zeros(9)}


LARGE = ("model.backbone=inception-resnet-v1", "model.embedding_size=512", "data.image_size=80", "model.norm=frozen")


def published(init: object, *more: str) -> Config:
    return config(*LARGE, *more, init=init)


def saved(state: Any, path: Path) -> Path:
    torch.save(state, path)
    return path


def same_weights(found: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    expected = {
        f"{BACKBONE}net.{n}": t for n, t in state.items() if t.is_floating_point() and not n.startswith("logits.")
    }
    return found.keys() == expected.keys() and all(torch.equal(found[n], t) for n, t in expected.items())


def test_a_file_is_read_once_its_hash_is_confirmed(tiny: dict[str, Tensor], tmp_path: Path) -> None:
    file = saved(tiny, tmp_path / "weights.pt")
    digest = sha256(file)
    refused(published(file), digest, "publisher", f"--set model.init_sha256={digest}")
    refused(published(file, f"model.init_sha256={'ab' * 32}"), digest, "another file, or a damaged one")
    initial = read_initial(published(file, f"model.init_sha256={digest}"))
    assert initial is not None
    assert same_weights(initial.tensors, tiny)
    assert initial.about == {"path": str(file), "sha256": digest, "source": None, "datasets": []}


def test_the_hash_is_judged_before_the_file_is_opened(
    tiny: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = saved(tiny, tmp_path / "weights.pt")
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read before it was judged"))
    for more in ((), (f"model.init_sha256={'ab' * 32}",)):
        refused(published(file, *more), "SHA-256")


@pytest.mark.parametrize("form", ["torch", "legacy torch", "pickle", "inside", "module", "list", "text", "empty"])
@pytest.mark.parametrize("forced", [False, True])
def test_a_pickle_that_is_no_state_dict_is_refused_and_runs_nothing(
    tiny: dict[str, Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, forced: bool
) -> None:
    """Even with a hash that the user confirmed, and where the environment asks PyTorch for its unsafe reader."""
    file, canary = tmp_path / "weights.pt", tmp_path / "canary"
    match form:
        case "torch":
            torch.save(Canary(canary), file)
        case "legacy torch":
            torch.save(Canary(canary), file, _use_new_zipfile_serialization=False)
        case "pickle":
            file.write_bytes(pickle.dumps(Canary(canary)))
        case "inside":
            torch.save({**tiny, "0.weight": Canary(canary)}, file)
        case "module":
            torch.save(Tiny(), file)
        case "list":
            torch.save(list(tiny.values()), file)
        case "text":
            file.write_text("weights")
        case "empty":
            file.touch()
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    refused(published(file, f"model.init_sha256={sha256(file)}"), "not a plain file of named tensors")
    assert not canary.exists()


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (("model.norm=group",), ("cannot become group", "frozen (or batch)")),
        (("model.backbone=small",), ("--set model.backbone=inception-resnet-v1",)),
        (("model.backbone=small", "data.image_size=32", "model.embedding_size=32"), ("--set data.image_size=160",)),
    ],
)
def test_published_weights_fit_one_network(
    tiny: dict[str, Tensor], settings: tuple[str, ...], says: tuple[str, ...]
) -> None:
    """Known before anything is fetched: the download would fail the test."""
    refused(published("vggface2", *settings), *says)


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """facenet-pytorch with an empty cache."""
    from facenet_pytorch.models import inception_resnet_v1

    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    return inception_resnet_v1


@pytest.mark.parametrize("name", ["vggface2", "casia-webface"])
def test_a_name_is_fetched_by_its_publisher_once(
    tiny: dict[str, Tensor], publisher: Any, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    fetched: list[str] = []

    def download(url: str, file: str) -> None:
        fetched.append(url)
        torch.save(tiny, file)

    monkeypatch.setattr(publisher, "download_url_to_file", download)
    for _ in range(2):
        initial = read_initial(published(name))
        assert initial is not None
        assert same_weights(initial.tensors, tiny)
        assert initial.about["source"] == f"published by facenet-pytorch, trained on {name}"
        assert len(initial.about["sha256"]) == 64
    assert len(fetched) == 1
    assert name in fetched[0]
    refused(published(name, f"model.init_sha256={'ab' * 32}"), "not that of model.init_sha256")


def test_without_a_network_the_error_says_what_to_do(
    tiny: dict[str, Tensor], publisher: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def download(url: str, file: str) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(publisher, "download_url_to_file", download)
    says = ("no route to host", str(tmp_path / "cache/checkpoints"), "--set model.init=FILE.pt")
    refused(published("vggface2"), *says, kind=WorkFailedError)


@pytest.mark.parametrize("forced", [False, True])
def test_a_download_that_is_hostile_runs_nothing(
    tiny: dict[str, Tensor], publisher: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, forced: bool
) -> None:
    canary = tmp_path / "canary"
    monkeypatch.setattr(publisher, "download_url_to_file", lambda url, file: torch.save(Canary(canary), file))
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    says = "unset it before a download" if forced else "not a plain file of named tensors"
    refused(published("vggface2"), says)
    assert not canary.exists()


@pytest.mark.slow
@pytest.mark.parametrize("norm", ["batch", "frozen"])
def test_the_large_network_makes_its_publishers_features(tmp_path: Path, norm: str) -> None:
    from facenet_pytorch import InceptionResnetV1

    torch.manual_seed(0)
    theirs = InceptionResnetV1(classify=True, num_classes=3).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_buffers():
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
    theirs.classify = False
    file = saved(theirs.state_dict(), tmp_path / "weights.pt")
    asked = published(file, f"model.norm={norm}", f"model.init_sha256={sha256(file)}")
    initial = read_initial(asked)
    assert initial is not None
    ours = build_backbone(asked.spec(), 0)
    with torch.no_grad():
        for name, tensor in state_tensors(ours).items():
            tensor.copy_(initial.tensors[BACKBONE + name])
        photos = torch.randint(0, 256, (2, 3, 80, 80), dtype=torch.uint8)
        x = (photos.float() - 127.5) / 128
        both = theirs(x) + theirs(x.flip(3))
        torch.testing.assert_close(embed(ours, photos), nn.functional.normalize(both), rtol=1e-4, atol=1e-5)


def test_the_header_of_a_kept_start_is_that_of_a_checkpoint(tuned: Path) -> None:
    _, about = read_tensors(tuned / "checkpoints/round-0000.safetensors")
    assert about["spec"] == asdict(load_config(tuned / "config.toml").spec())
