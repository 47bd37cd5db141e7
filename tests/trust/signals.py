"""SIGINT, SIGTERM and SIGINT twice to a training run, in every stage and at random instants.

Handled means: it ends within LATEST seconds, with 130 or 143 and a message that says how to go on; the last round is intact; and
going on ends with the bytes of the run that nobody disturbed. The process is a fork: a signal before the tool listens (in the
seconds of imports of a process of its own) is Python's to handle, and is held back here until then.
"""

from __future__ import annotations

import random
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from benchmarks.resume import after, stopped
from defenses.accounting import _losses
from fedgc import cli
from tests.trust.cases import Case, Child
from tests.trust.undisturbed import CONFIGS, in_folder, trial

LATEST = 5.0  # seconds from the signal to the end
SENT = ((signal.SIGINT, 1), (signal.SIGTERM, 1), (signal.SIGINT, 2))
STOPS = set(number for number, _ in SENT)
RANDOM = 14
EARLY, LATE = 0.02, 0.8  # seconds, and share of the undisturbed run's: where random instants lie


def stages(defense: str) -> tuple[str, str, str]:
    return "reading faces", "a round", "evaluation" if defense == "none" else "accounting and evaluation"


@contextmanager
def held_back() -> Iterator[None]:
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)


def listening(slow_accounting: bool) -> None:
    """In the child: signals arrive as soon as the tool listens. Accounting takes as long as in a process of its own, or a signal
    would rarely fall into it."""
    let_in = partial(signal.pthread_sigmask, signal.SIG_UNBLOCK, STOPS)
    cli.stop_on_signals = after(cli.stop_on_signals, let_in)
    if slow_accounting:
        _losses.cache_clear()


def begun(slow_accounting: bool, arguments: list[str]) -> Child:
    with held_back():
        return Child(*arguments, hook=partial(listening, slow_accounting))


def disturbed(
    case: tuple[str, str], stage: str | float, number: signal.Signals, times: int, folder: Path
) -> str | None:
    """stage: its name, or a share of the undisturbed run's seconds. A run that is over by then is signalled earlier."""
    ours, slow = in_folder(case, folder), isinstance(stage, str) and "accounting" in stage
    when = stage if isinstance(stage, str) else EARLY + stage * LATE * trial(case).seconds
    while True:
        spent, wrong = stopped(ours, when, number, times, partial(begun, slow))
        if not wrong.startswith("exit code 0") or isinstance(when, str):
            break
        when /= 2
        for path in folder.iterdir():
            shutil.rmtree(path)
    if wrong:
        return wrong
    return f"ended after {spent:.1f} s" if spent > LATEST else None


def _cases(seed: int = 0) -> Iterator[Case]:
    drawn = random.Random(seed)
    for case in CONFIGS:
        for stage in stages(case[1]):
            for number, times in SENT:
                name = f"{number.name}{' twice' if times == 2 else ''} during {stage}: {', '.join(case)}"
                yield Case(name, partial(disturbed, case, stage, number, times))
    for place in range(RANDOM):
        case, (number, times), share = drawn.choice(CONFIGS), drawn.choice(SENT), drawn.random()
        name = f"{number.name}{' twice' if times == 2 else ''} at {share:.0%}, {place}: {', '.join(case)}"
        yield Case(name, partial(disturbed, case, share, number, times))


SIGNALS = tuple(_cases())
