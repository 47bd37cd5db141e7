"""The correction's gradient: tiles in float32 and bfloat16 against autograd through the dense regulariser.

A call's extra memory is the peak of a fresh process (VmHWM, so Linux) less what it held before the call with W, libraries and
threads loaded; the gradient that is returned counts. Up to DENSE_UP_TO classes all three ways take turns in one process.
GFLOP/s count 4C²d operations whatever was done; the machine's rate is that of a float32 torch.mm of 4096³, beside each call.
"""

from __future__ import annotations

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from fedgc.correction import gradient, regulariser

D, CLIENTS, SCALE = 512, 36, 8.0
DENSE_UP_TO = 20_000


class Call(NamedTuple):
    seconds: float
    extra: float  # MB
    mm: float  # GFLOP/s
    result: Tensor | None


def head(classes: int) -> tuple[Tensor, Tensor]:
    return torch.randn(classes, D, generator=torch.Generator().manual_seed(0)), torch.arange(
        classes
    ) * CLIENTS // classes


def way(name: str, W: Tensor, owner: Tensor) -> Tensor:
    if name == "dense":
        live = W.clone().requires_grad_()
        return torch.autograd.grad(regulariser(live, owner, SCALE), live)[0]
    return gradient(W, owner, SCALE, precision=name)  # type: ignore[arg-type]


def memory(field: str) -> float:
    """MB of this process: VmRSS, or its peak VmHWM. nan where there is no /proc."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(field)), float("nan"))


def clocked_mm(size: int = 4096, repeats: int = 2) -> float:
    a = torch.ones(size, size)
    out, best = torch.empty_like(a), float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, a, out=out)
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best / 1e9


def call(name: str, classes: int, keep_result: bool = False) -> Call:
    way(name, *head(1000))  # warms up libraries and threads
    W, owner = head(classes)
    before, start = memory("VmRSS"), time.perf_counter()
    result = way(name, W, owner)
    seconds = time.perf_counter() - start
    extra = memory("VmHWM") - before
    return Call(seconds, extra, clocked_mm(), result if keep_result else None)


def in_a_fresh_process(name: str, classes: int) -> Call:
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(call, name, classes).result()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, nargs="+", default=[10_575, 85_742])
    parser.add_argument("--repeats", type=int, default=5, help=f"turns of each way, up to {DENSE_UP_TO:,} classes")
    options = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; d = {D}, {CLIENTS} clients, s = {SCALE:g}")
    print(f"{'classes':>8} {'way':>9} {'min s':>8} {'median s':>9} {'x dense':>8} {'x float32':>10} {'GFLOP/s':>8}"
          f" {'of mm':>6} {'extra MB':>9} {'difference':>11}")  # fmt: skip
    for classes in options.classes:
        small = classes <= DENSE_UP_TO
        names = ["dense", "float32", "bfloat16"] if small else ["float32", "bfloat16"]
        calls = {name: [in_a_fresh_process(name, classes)] for name in names}
        extra = {name: calls[name][0].extra for name in names}
        if small:
            turns = [{name: call(name, classes, keep_result=True) for name in names} for _ in range(options.repeats)]
            calls = {name: [turn[name] for turn in turns] for name in names}
        best = {name: min(c.seconds for c in calls[name]) for name in names}
        exact = calls[names[0]][0].result
        mm = max(c.mm for name in names for c in calls[name])
        for name in names:
            rate, result = 4 * classes**2 * D / best[name] / 1e9, calls[name][0].result
            against = f"{best['dense'] / best[name]:8.2f}" if small else " " * 8
            difference = (
                "" if exact is None or result is None else f"{float((result - exact).norm() / exact.norm()):11.1e}"
            )
            print(f"{classes:>8} {name:>9} {best[name]:>8.3f} {median(c.seconds for c in calls[name]):>9.3f} {against}"
                  f" {best['float32'] / best[name]:>10.2f} {rate:>8.0f} {rate / mm:>6.0%} {extra[name]:>9.0f} {difference}",
                  flush=True)  # fmt: skip
        print(f"{classes:>8} {'torch.mm':>9} {'':>8} {'':>9} {'':>8} {'':>10} {mm:>8.0f}", flush=True)


if __name__ == "__main__":
    main()
