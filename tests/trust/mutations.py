"""How a good input becomes a hostile one, by choices that a generator of random numbers makes.

The generator may be seeded, or hypothesis's, which shrinks what it finds, or one that reads its numbers from the bytes of a
coverage-guided fuzzer, which then decides what is changed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from random import Random
from typing import Any

import torch
from torch import Tensor

STRANGE: tuple[Any, ...] = (
    None, True, False, -1, 0, 1, 7, 2**31, 2**63, -(2**63), 10**40, 0.5, -0.0, 1e308, float("nan"), float("inf"), "", "0", "x",
    "..", "../../elsewhere", "/dev/zero", "a\0b", "\x1b[2J", "<script>alert(1)</script>", "\ud800", "\u202e", "x" * 3000, [], {},
    [[]], [None], {"": None}, {"value": "x"}, {"value": float("nan"), "low": None, "high": [], "n": -1},
)  # fmt: skip
DEEP = 3000  # more than any reader's recursion may follow
TYPES = (torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool)


def strange(draw: Random) -> Any:
    return nested(draw) if draw.randrange(40) == 0 else draw.choice(STRANGE)


def nested(draw: Random) -> Any:
    found: Any = draw.choice(STRANGE)
    for _ in range(draw.choice((3, 90))):
        found = [found] if draw.randrange(2) else {"x": found}
    return found


def changed(document: Any, draw: Random, times: int | None = None) -> Any:
    """A copy of a document of JSON's kinds in which so many values are replaced, taken out, doubled, renamed or exchanged; most
    often one, so that what lies behind the first check is reached."""
    for _ in range(times or draw.choice((1, 1, 1, 2, 5))):
        document = _changed_once(document, draw)
    return document


def _changed_once(value: Any, draw: Random) -> Any:
    inner = isinstance(value, dict | list) and len(value) > 0
    if not inner or draw.randrange(12) == 0:
        return strange(draw)
    if isinstance(value, list):
        at = draw.randrange(len(value))
        if draw.randrange(4):
            return [_changed_once(x, draw) if i == at else x for i, x in enumerate(value)]
        return draw.choice((value[:at] + value[at + 1 :], value + value[at:], [value]))
    name = draw.choice(list(value))
    rest = {k: v for k, v in value.items() if k != name}
    match draw.randrange(8):
        case 0:
            return rest
        case 1:
            return {**rest, str(strange(draw))[:50]: value[name]}
        case 2:
            return {**value, name: value[draw.choice(list(value))]}
        case _:
            return {**value, name: _changed_once(value[name], draw)}


def damaged(data: bytes, draw: Random) -> bytes:
    """Bytes of which some are flipped, taken out, doubled, or put in."""
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data) + 1)
        size = draw.choice((1, 2, 4, 8, 64))
        put = draw.choice(
            (b"", b"\0" * size, b"\xff" * size, data[at : at + size] * 2, draw.randbytes(size), b"[" * DEEP)
        )
        data = data[:at] + put + data[at + draw.choice((0, size)) :]
    return data


def twisted(tensors: Mapping[str, Tensor], draw: Random) -> dict[str, Tensor]:
    """Named tensors of which one, most often, lies about its name, kind, shape or numbers."""
    found = dict(tensors)
    for _ in range(draw.choice((0, 1, 1, 1, 3))):
        if not found:
            break
        name = draw.choice(sorted(found))
        tensor = found[name]
        match draw.randrange(7):
            case 0:
                del found[name]
            case 1:
                found[_renamed(name, draw)] = found.pop(name)
            case 2:
                found[name] = tensor.nan_to_num(0).to(draw.choice(TYPES))
            case 3:
                part = tensor[..., :1] if tensor.ndim else tensor[None]
                found[name] = draw.choice((tensor.flatten(), tensor[None], tensor.flatten()[:0], part, tensor.sum()))
            case 4:
                found[name] = torch.zeros(draw.choice(((), (0,), (1,), (3, 0), (2, 2, 2, 2, 2))), dtype=tensor.dtype)
            case 5:
                number = draw.choice((float("nan"), float("inf"), -1.0, 255.0, 1e30))
                found[name] = torch.full_like(tensor, number if tensor.is_floating_point() else draw.randrange(256))
            case _:
                found[draw.choice(sorted(found))] = tensor
    return {name: tensor.clone() for name, tensor in found.items()}


def _renamed(name: str, draw: Random) -> str:
    """Mostly near the truth: without a part, with a part too many, or with another number."""
    parts = name.split("/")
    at = draw.randrange(len(parts))
    other = draw.choice(("", "x", "-1", "99", "head.weight", "..", "\x1b[2J", "é"))
    kinds = (parts[:at] + parts[at + 1 :], [*parts[:at], other, *parts[at + 1 :]], [*parts, other], [other])
    return "/".join(draw.choice(kinds)) or "x"


def text_of(document: Any, draw: Random) -> bytes:
    """JSON text; now and then not quite."""
    text = json.dumps(document).encode()
    return damaged(text, draw) if draw.randrange(8) == 0 else text
