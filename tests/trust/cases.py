"""A hostile input and its verdict; a command in a child process, with what it cost.

A case that needs what the machine lacks raises `unittest.SkipTest`.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, NoReturn

import torch

import fedgc.cli

# imported here, so that a child has them from the start and its seconds and memory are those of the input alone
import fedgc.data.inspection
import fedgc.pipeline.attacking
import fedgc.pipeline.evaluation
import fedgc.pipeline.training

PROMISED_SECONDS = 5.0  # for a refusal, on a machine with nothing else to do
MOST_SECONDS = 20.0  # of the processor, for anything: others may keep a machine busy
ABANDONED_SECONDS = 120.0  # a child that takes longer hangs
MOST_MEMORY_MIB = 1024.0
LOCK = ".lock"  # holds nothing, and is in nobody's way (`fedgc.runs.require_new`)


@dataclass(frozen=True)
class Case:
    """run: gets an empty folder; returns None where the input was handled as documented, else what went wrong, in one line."""

    name: str
    run: Callable[[Path], str | None]


class Outcome(NamedTuple):
    """more_memory_mib: the child's peak over what its parent held when it began; cpu_seconds: those in which it worked, out of
    the seconds that passed."""

    code: int
    out: str
    err: str
    seconds: float
    more_memory_mib: float
    cpu_seconds: float = 0.0


slowest: dict[str, Outcome] = {}  # of each command, since this module was loaded: for a report


class Child:
    """``fedgc-priv`` with some arguments in a forked child, used as `subprocess.Popen` is.

    inside: its current folder; powerless: without the power of root to read what permissions deny (Linux); hook: called in the
    child before the command.
    """

    def __init__(
        self,
        *arguments: object,
        inside: Path | None = None,
        environment: Mapping[str, str] | None = None,
        powerless: bool = False,
        hook: Callable[[], object] | None = None,
    ) -> None:
        self.words = ["fedgc-priv", *map(str, arguments)]
        self.out, self.err = tempfile.TemporaryFile(), tempfile.TemporaryFile()  # noqa: SIM115
        self.held, self.began = _resident_mib(), time.monotonic()
        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            _run(self.words, self.out, self.err, inside, environment or {}, powerless, hook)

    def poll(self, how: int = os.WNOHANG) -> int | None:
        """The exit code, negative for a signal, once the child has ended."""
        if self.returncode is None:
            pid, status, self.usage = os.wait4(self.pid, how)
            if pid and not os.WIFSTOPPED(status):
                self.returncode, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.began
        return self.returncode

    def halted(self) -> bool:
        """Wait until the child has stopped itself (SIGSTOP); False where it ended instead."""
        return self.poll(os.WUNTRACED) is None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def communicate(self, timeout: float = ABANDONED_SECONDS) -> tuple[str, str]:
        """What it printed until its end; it is killed where it goes on after the timeout."""
        latest = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > latest:
                os.kill(self.pid, signal.SIGKILL)
                latest = float("inf")
            time.sleep(0.002)
        out, err = ((file.seek(0), file.read().decode(errors="replace"))[1] for file in (self.out, self.err))
        self.out.close()
        self.err.close()
        return out, err

    def outcome(self) -> Outcome:
        out, err = self.communicate()
        assert self.returncode is not None
        unit = 2**20 if sys.platform == "darwin" else 2**10
        more, worked = self.usage.ru_maxrss / unit - self.held, self.usage.ru_utime + self.usage.ru_stime
        return Outcome(self.returncode, out, err, self.seconds, max(0.0, more), worked)


def command(*arguments: object, **how: Any) -> Outcome:
    """Run ``fedgc-priv`` with these arguments in a forked child, to its end; how: as of `Child`."""
    child = Child(*arguments, **how)
    outcome, name = child.outcome(), child.words[1]
    if name not in slowest or slowest[name].seconds < outcome.seconds:
        slowest[name] = outcome
    return outcome


def limit_room(mib: int) -> None:
    """Let the address space of this process grow by so much and no more; PyTorch has filled it with gigabytes before (Linux)."""
    most = _pages(0) + mib * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def refused(outcome: Outcome, codes: Iterable[int] = (2, 3), names: Iterable[str] = ()) -> str | None:
    """A complaint unless the command ended with one of the codes and one line that contains each of the names, at little cost."""
    if outcome.code not in codes:
        return f"exit code {outcome.code}: {shown(outcome.err or outcome.out)}"
    if outcome.out:
        return f"refused, and yet printed {shown(outcome.out)}"
    if "Traceback" in outcome.err or outcome.err.count("\n") != 1 or not outcome.err.endswith("\n"):
        return f"not one line: {shown(outcome.err)}"
    if not outcome.err[:-1].isprintable():
        return f"control characters in {shown(outcome.err)}"
    if absent := [name for name in names if name not in outcome.err]:
        return f"does not say {absent[0]!r}: {shown(outcome.err)}"
    return costly(outcome)


def costly(outcome: Outcome) -> str | None:
    if outcome.cpu_seconds > MOST_SECONDS:
        return f"{outcome.cpu_seconds:.1f} s of work, and {MOST_SECONDS:.0f} s are the limit"
    if outcome.more_memory_mib > MOST_MEMORY_MIB:
        return f"{outcome.more_memory_mib:.0f} MiB of memory, and {MOST_MEMORY_MIB:.0f} MiB are the limit"
    return None


def unwritten(out: Path) -> str | None:
    """A complaint where the folder of a refused command holds more than an empty lock."""
    found = [path.name for path in out.iterdir() if path.name != LOCK] if out.exists() else []
    return f"wrote {', '.join(sorted(found))} into {out.name}" if found else None


def shown(text: str, most: int = 200) -> str:
    """Text in one line."""
    return ascii(text if len(text) <= most else text[:most] + "...")


def _run(
    words: list[str], out: IO[bytes], err: IO[bytes], inside: Path | None, environment: Mapping[str, str], powerless: bool,
    hook: Callable[[], object] | None,
) -> NoReturn:  # fmt: skip
    """The child's life. Nothing of the parent's ends with it: no buffers, no handlers, no threads."""
    code = 70
    try:
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
        if inside is not None:
            os.chdir(inside)
        os.environ.update(environment)
        sys.argv = words
        torch.set_num_threads(1)
        if powerless:
            _give_up_power()
        if hook is not None:
            hook()
        fedgc.cli.main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _give_up_power() -> None:
    """Drop every capability of this process: root then reads what its permissions say, as others do."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, this process
    if ctypes.CDLL(None, use_errno=True).capset(header, (ctypes.c_uint32 * 6)()) != 0:
        raise OSError(ctypes.get_errno(), "capset")


def _resident_mib() -> float:
    """What this process holds now."""
    try:
        return _pages(1) / 2**20
    except OSError:
        return 0.0  # not Linux: then the limit is on all that the child holds


def _pages(which: int) -> int:
    """Bytes of this process's address space (0), or of what of it is in memory (1)."""
    return int(Path("/proc/self/statm").read_text().split()[which]) * os.sysconf("SC_PAGE_SIZE")
