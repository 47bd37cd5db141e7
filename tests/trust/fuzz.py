"""A coverage-guided fuzzer (atheris: libFuzzer for Python) on every reader of `tests.trust.readers`.

python -m tests.trust.fuzz --runs 5000 --seed 0

The fuzzer's bytes are the choices of how a good input is harmed, so that it learns which of them lead to new places in the code.
Prints how many inputs were read or refused as they should be, and every other end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections import Counter
from pathlib import Path
from random import Random
from typing import NoReturn

import atheris

PACKAGES = ["fedgc", "eval"]


class Choices(Random):
    """A generator of random numbers that reads them from bytes; zeros follow the last one."""

    def __init__(self, data: bytes) -> None:
        self._provider = atheris.FuzzedDataProvider(data)
        super().__init__()

    def seed(self, *_: object) -> None:  # type: ignore[override]
        pass

    def getrandbits(self, k: int) -> int:
        size = (k + 7) // 8
        return int.from_bytes(self._provider.ConsumeBytes(size).ljust(size, b"\0"), "little") >> (8 * size - k)

    def random(self) -> float:
        return self.getrandbits(53) / 2**53


def fuzz(runs: int, seed: int) -> None:
    with atheris.instrument_imports(include=PACKAGES, enable_loader_override=False):
        from tests.trust.readers import READERS
    import torch

    torch.set_num_threads(1)
    every, said, played = READERS, Counter[str](), Counter[str]()

    def one(data: bytes) -> None:
        draw = Choices(data)
        reader = every[draw.randrange(len(every))]
        with tempfile.TemporaryDirectory() as folder:
            complaint = reader.complaint(Path(folder), draw)
        played[reader.name] += 1
        if complaint is not None:
            said[complaint] += 1
        if played.total() == runs:
            tell()

    def tell() -> NoReturn:
        """Here, and not after the last run: libFuzzer ends the process without a word to Python."""
        for complaint, times in said.most_common():
            print(f"FAILED {complaint} ({times} times)")
        print(f"{runs - said.total()} of {runs} fuzzed inputs, to {len(played)} of {len(every)} readers", flush=True)
        os._exit(bool(said))

    quiet = [
        "-print_final_stats=0",
        "-verbosity=0",
        "-rss_limit_mb=6000",
        "-timeout=120",
        "-max_len=400",
        "-len_control=0",
    ]
    with tempfile.TemporaryDirectory() as corpus:
        draw = Random(seed)
        for number in range(8 * len(every)):  # a few inputs for each reader to begin with
            start = number % len(every)
            (Path(corpus) / str(number)).write_bytes(bytes([start * 256 // 32 % 256]) + draw.randbytes(60))
        atheris.Setup(
            [sys.argv[0], f"-runs={2 * runs}", f"-seed={seed + 1}", f"-artifact_prefix={corpus}/", *quiet, corpus], one
        )
        atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    fuzz(options.runs, options.seed)


if __name__ == "__main__":
    main()
