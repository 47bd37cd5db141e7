"""A sweep that is killed again and again, with every process of it, and goes on: its results.csv against that of one left alone.

The command line after `--` is that of `fedgc-priv sweep`, without --out and --resume.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path


def begun(arguments: list[str], folder: Path) -> subprocess.Popen[bytes]:
    resume = ["--resume"] if (folder / "runs/epsilon/sweep.json").exists() else []
    command = [sys.executable, "-m", "fedgc.cli", "sweep", *arguments, "--out", "runs/epsilon", *resume]
    log = open(folder / "log", "ab")  # noqa: SIM115
    return subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("undisturbed", type=Path, help="results.csv of the same sweep, made with --out runs/epsilon")
    parser.add_argument("--folder", type=Path, required=True, help="where the killed one lives")
    parser.add_argument("--kills", type=int, default=10)
    parser.add_argument("--seconds", type=float, nargs=2, default=(60.0, 240.0), help="least and most before each kill")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("sweep", nargs="+", help="arguments of `fedgc-priv sweep`")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    draw = random.Random(options.seed)
    killed = 0
    for _ in range(options.kills):
        process = begun(options.sweep, options.folder)
        try:
            process.wait(draw.uniform(*options.seconds))
            break  # it finished first
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            killed += 1
            cells = sum('"finished"' in p.read_text() for p in options.folder.glob("runs/epsilon/*/run.json"))
            print(f"{time.strftime('%H:%M:%S')} killed for the {killed}. time, {cells} cells trained", flush=True)
    code = begun(options.sweep, options.folder).wait()
    same = (options.folder / "runs/epsilon/report/results.csv").read_bytes() == options.undisturbed.read_bytes()
    print(f"killed {killed} times, then exit {code}: results.csv {'is the same' if same else 'DIFFERS'}")
    sys.exit(0 if same and code == 0 else 1)


if __name__ == "__main__":
    main()
