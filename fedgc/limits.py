"""What memory there is for this process, and what its end looks like: libraries say so in many ways."""

from __future__ import annotations

import errno
import os
import re
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path

from fedgc.errors import FedgcError, UsageError

try:
    import resource
except ImportError:  # not on every system
    resource = None  # type: ignore[assignment]

SIGNS = (  # in what a library says that has no exception of its own for it; lower case
    "allocate memory", "not enough memory", "out of memory", "bad_alloc", "bad allocation", "unable to mmap",
    "can't start new thread", "failed to map segment", "alloc_failed",
    "could not create a primitive",  # oneDNN, of a convolution
    "without exception set", "without setting an exception",  # SystemError: C code that found no memory for the exception itself
)  # fmt: skip
ASKED = re.compile(r"(?:allocate|allocating) (\d+) bytes")  # PyTorch's way to say how much it wanted
SLACK = 2**20
LEAST_ADDRESS_SPACE = 384 * 2**20  # twice what a small run was seen to need when it came too near a limit
OURS = ("fedgc", "attacks", "defenses", "eval")
LAST_WORDS = b"fedgc-priv: out of memory; nothing unfinished is marked complete: repeat the command with more memory\n"
ADVICE = {
    "train": "take a smaller federation.batch_size or data.image_size, fewer photos, or under dp-sgd defense.mode = bookkeeping "
    "(and another --out), or free memory and repeat the command, with --resume where a run had begun",
    "sweep": "take smaller cells, or free memory and repeat the command with --resume",
    "attack": "attack fewer photos (--targets) or one attack and seat at a time, or free memory and repeat the command",
    "report": "report fewer runs at a time, or free memory and repeat the command",
    "data": "take a smaller size or fewer --jobs, or free memory and repeat the command, which goes on where it stopped",
}
USUAL_ADVICE = "take fewer or smaller photos, or free memory and repeat the command"


def available(device: str = "cpu") -> int | None:
    """Bytes that this process can still take on a device, None where no limit is known.

    cpu: the least of what Linux says can be had without swapping, and swapped, what the control groups leave, and what is
    left of the address space (RLIMIT_AS). cuda: what is free on the card or cached by PyTorch.
    """
    if device.startswith("cuda"):
        import torch

        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    limits = [limit for limit in (_machine(), *_groups(), _address_space()) if limit is not None]
    return max(0, min(limits)) if limits else None


def require_address_space() -> None:
    """Raises UsageError where a limit on the address space leaves next to nothing. Near such a limit compiled code is refused
    memory at places where it does not look, and ends the process without a word."""
    left = _address_space()
    if left is not None and left < LEAST_ADDRESS_SPACE:
        raise UsageError(
            f"a limit on address space leaves this process {shown(max(0, left))} of memory, and at least "
            f"{shown(LEAST_ADDRESS_SPACE)} are needed: raise it (`ulimit -v unlimited`) or repeat the command elsewhere"
        )


def ran_out(error: BaseException | None) -> bool:
    """Whether memory was short, in this error or in what it was raised from."""
    while error is not None:
        number = error.errno if isinstance(error, OSError) else None
        if isinstance(error, MemoryError) or number == errno.ENOMEM:
            return True
        says = number is None and not isinstance(error, FedgcError)  # ours may quote anything
        if says and any(sign in str(error).lower() for sign in SIGNS):
            return True
        error = error.__cause__
    return False


def raise_if_short(error: Exception) -> None:
    """Raise MemoryError where memory was short: what follows would speak of a damaged file, or go on without a good one."""
    if ran_out(error):
        raise MemoryError(str(error)) from error


def require_room(*sizes: int) -> None:
    """Raise MemoryError unless blocks of so many bytes could be had at once: for compiled code that ends the process, or paints a
    panic, where it is refused one."""
    blocks = [bytearray(size) for size in (*sizes, SLACK)]
    del blocks


def explained(error: BaseException, command: str) -> str:
    """What, where and what next, of an error that memory was short. Lets go of what the interrupted work still holds."""
    traceback.clear_frames(error.__traceback__)
    asked = ASKED.search(str(error))
    much = f"; {shown(int(asked[1]))} more were asked for" if asked else ""
    return (
        f"{command} ran out of memory (in {_place(error)}{much}), and nothing unfinished is marked complete: "
        f"{ADVICE.get(command, USUAL_ADVICE)}"
    )


def shown(size: int) -> str:
    """Bytes as people read them."""
    for unit, power in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if size >= 2**power:
            return f"{size / 2**power:.1f} {unit}"
    return f"{size} bytes"


def _place(error: BaseException) -> str:
    """The innermost function of this project that an error passed through."""
    found, trace = "its start", error.__traceback__
    while trace is not None:
        module = trace.tb_frame.f_globals.get("__name__", "")
        if module.partition(".")[0] in OURS:
            found = f"{module}.{trace.tb_frame.f_code.co_name}"
        trace = trace.tb_next
    return found


def _machine(file: Path = Path("/proc/meminfo")) -> int | None:
    """Swap counts: what needs it is slow, and yet fits."""
    found = dict(re.findall(r"^(MemAvailable|SwapFree): +(\d+) kB$", _text(file), re.MULTILINE))
    return sum(map(int, found.values())) * 2**10 if "MemAvailable" in found else None


def _groups(root: Path = Path("/sys/fs/cgroup"), mine: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What each control group with a limit leaves, of either version, from this process's upwards. Inside a container the
    path of the group may be that of the host, and the group itself is what is mounted as the root."""
    for line in _text(mine).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top = root / controllers
        names = ("memory.max", "memory.current", "inactive_file")
        if controllers:
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = (_text(folder / name).strip() for name in names[:2])
            if limit.isdigit() and used.isdigit():
                cache = re.search(rf"^{names[2]} (\d+)$", _text(folder / "memory.stat"), re.MULTILINE)
                yield int(limit) - int(used) + (int(cache[1]) if cache else 0)  # the system drops that first
            if folder == top:
                break


def _address_space() -> int | None:
    if resource is None or not sys.platform.startswith("linux"):
        return None
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    if limit == resource.RLIM_INFINITY:
        return None
    pages = _text(Path("/proc/self/statm")).split()
    return limit - int(pages[0]) * os.sysconf("SC_PAGE_SIZE") if pages else None


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except (OSError, ValueError):
        return ""
