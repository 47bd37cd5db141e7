"""Flower's own processes: a simulation with Ray, and a deployment of a SuperLink and two SuperNodes on the loopback."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

pytest.importorskip("flwr", reason="engine = flower needs pip install 'fedgc-priv[flower]'")
pytest.importorskip("ray", reason="Flower's simulation needs Ray")

from fedgc.config import load_config
from fedgc.files import read_tensors
from fedgc.pipeline.training import train

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(sys.executable).parent
CONFIG = """
[data]
source = "synthetic:24x6"
image_size = 32
[federation]
algorithm = "fedgc"
clients = 2
rounds = 2
local_epochs = 1
[model]
embedding_size = 32
[record]
victims = 2
batch_sizes = [1]
[defense]
name = "dp-sgd"
noise_multiplier = 1.0
noise_seed = 1
"""
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05",
    "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1",
}  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same training in this process."""
    root = tmp_path_factory.mktemp("flower")
    (root / "config.toml").write_text(CONFIG)
    train(load_config(root / "config.toml"), root / "here")
    return root


def same(one: Path, other: Path) -> None:
    for folder in ("checkpoints", "transcript"):
        names = sorted(p.name for p in (one / folder).glob("*.safetensors"))
        assert names == sorted(p.name for p in (other / folder).glob("*.safetensors")) != []
        for name in names:
            ours, theirs = (read_tensors(run / folder / name)[0] for run in (one, other))
            assert ours.keys() == theirs.keys()
            for key, x in ours.items():
                torch.testing.assert_close(x, theirs[key], rtol=1e-5, atol=1e-6)
    assert (one / "privacy.json").read_bytes() == (other / "privacy.json").read_bytes()


def left_behind(*names: str) -> list[str]:
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line for line in found if any(name in line for name in names)]


def test_a_simulation_is_the_same_training_and_leaves_no_process(here: Path) -> None:
    before = left_behind("raylet", "ray::", "gcs_server")
    train(load_config(here / "config.toml", settings=("engine=flower",)), here / "simulated")
    same(here / "simulated", here / "here")
    deadline = time.monotonic() + 30  # they are told to go, and take a moment
    while (left := left_behind("raylet", "ray::", "gcs_server")) != before and time.monotonic() < deadline:
        time.sleep(0.2)
    assert left == before


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def started(command: list[str], log: Path, environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A program and all that it starts, ended with the block."""
    with open(log, "wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, number)
            except ProcessLookupError:
                break
            time.sleep(0.5)
        process.wait()


def wait_for(address: str, seconds: float = 120) -> None:
    host, _, port = address.partition(":")
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))) == 0:
                return
        time.sleep(0.2)


def test_a_deployment_is_the_same_training(here: Path, tmp_path: Path) -> None:
    link, home = f"127.0.0.1:{free_port()}", tmp_path / "home"
    home.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "{link}"\ninsecure = true\n'
    )
    paths = {"PATH": f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "FLWR_HOME": str(home)}
    environment = {**os.environ, **QUIET, **paths}
    superlink = [str(PROGRAMS / "flower-superlink"), "--insecure", "--host", "127.0.0.1", "--port", link.partition(":")[2],
                 "--disable-runtime-dependency-installation"]  # fmt: skip

    def node(k: int) -> list[str]:
        own = f'partition-id={k} source="synthetic:24x6" home="{tmp_path / f"node{k}"}"'
        return [str(PROGRAMS / "flower-supernode"), "--insecure", "--superlink", link, "--port", str(free_port()),
                "--node-config", own]  # fmt: skip

    with (
        started(superlink, tmp_path / "link.log", environment),
        started(node(0), tmp_path / "0.log", environment),
        started(node(1), tmp_path / "1.log", environment),
    ):
        wait_for(link)
        asked = f'config="{here / "config.toml"}" out="{tmp_path / "run"}"'
        done = subprocess.run(
            [str(PROGRAMS / "flwr"), "run", str(ROOT / "examples/flower"), "here", "--stream", "--run-config", asked],
            env=environment, capture_output=True, text=True, timeout=300, check=False,
        )  # fmt: skip
        logs = "\n".join((tmp_path / f"{name}.log").read_text()[-2000:] for name in ("link", "0", "1"))
    assert (tmp_path / "run/run.json").exists(), done.stdout[-3000:] + done.stderr[-1000:] + logs
    same(tmp_path / "run", here / "here")
    assert (tmp_path / "node1").is_dir()
