"""Folders of faces that reach outside themselves or hold what is no photo, and archives in their place (S2)."""

from __future__ import annotations

import os
import shutil
import socket
import tarfile
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from unittest import SkipTest

from fedgc.data.folder import EMPTY, LOOSE, OUTSIDE, SPECIAL, UNNAMEABLE
from tests.pictures import picture
from tests.trust.cases import Case, command, refused, shown
from tests.trust.folders import GOOD, PHOTOS, inspected, people, report

MANY = 100_000


def _secret(folder: Path) -> Path:
    """A person outside the folder of faces, whose photos are pipes: whoever opens one waits for ever, and is noticed."""
    outside = folder / "outside"
    outside.mkdir()
    for number in range(PHOTOS):
        os.mkfifo(outside / f"{number}.png")
    return outside


def _link(folder: Path) -> str | None:
    root, outside = people(folder / "faces"), _secret(folder)
    (root / "ada" / "x.png").symlink_to(outside / "0.png")
    shutil.copy(root / "bob" / "0.png", outside / "real.png")
    (root / "ada" / "y.png").symlink_to("../../outside/real.png")
    return inspected(root, GOOD, {"ada/x.png": OUTSIDE, "ada/y.png": OUTSIDE})


def _linked_person(folder: Path) -> str | None:
    root, outside = people(folder / "faces"), _secret(folder)
    (root / "eve").symlink_to(outside, target_is_directory=True)
    return inspected(root, GOOD, {"eve": OUTSIDE})


def _dangling(folder: Path) -> str | None:
    root = people(folder / "faces")
    (root / "ada" / "x.png").symlink_to(folder / "nowhere.png")
    (root / "eve").symlink_to("nowhere")
    return inspected(root, GOOD, {"ada/x.png": OUTSIDE, "eve": OUTSIDE})


def _hard_link(folder: Path) -> str | None:
    """A second name of a photo elsewhere is a photo of this folder as well: who made it could read the photo. It counts as good,
    and nothing else of where it came from is looked at."""
    root = people(folder / "faces")
    outside = folder / "elsewhere.png"
    picture(99).save(outside)
    os.link(outside, root / "ada" / "x.png")
    return inspected(root, GOOD + 1, {})


def _pipe(folder: Path) -> str | None:
    root = people(folder / "faces")
    os.mkfifo(root / "ada" / "x.jpg")
    os.mkfifo(root / "eve")
    return inspected(root, GOOD, {"ada/x.jpg": SPECIAL, "eve": SPECIAL})


def _socket(folder: Path) -> str | None:
    root = people(folder / "faces")
    here = os.open(".", os.O_RDONLY)
    try:
        os.chdir(root / "ada")  # the path of a socket has about a hundred characters at most
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("x.jpg")
    except OSError as error:
        raise SkipTest(f"no socket can be made here: {error}") from None
    finally:
        os.fchdir(here)
        os.close(here)
    return inspected(root, GOOD, {"ada/x.jpg": SPECIAL})


def _crowd(folder: Path) -> str | None:
    """Empty files by the hundred thousand: each is counted, the good ones load, and it ends in time."""
    root = people(folder / "faces")
    for number in range(MANY):
        os.close(os.open(root / "ada" / f"x{number}.jpg", os.O_CREAT | os.O_WRONLY))
    complaint, found = report(command("data", "inspect", root, "--json"))
    shutil.rmtree(root)
    if found is None:
        return complaint
    counts = {reason: some["count"] for reason, some in found["skipped"].items()}
    return None if (found["images"], counts) == (GOOD, {EMPTY: MANY}) else f"counted {found['images']} images, {counts}"


def _names(folder: Path) -> str | None:
    """Long names, other scripts, control characters: photos like others. What is no text is left out. A terminal sees no control
    character of theirs."""
    root = people(folder / "faces")
    odd = ("n" * 251, "Жанна-李-א", "e\u0301", "\u202egnp", "a\nb", "\x1b[31mred", "-rf *", "$(id)")
    for number, name in enumerate(odd):
        picture(100 + number // 2).save(root / "bob" / f"{name}.png")  # each photo twice: copies are named, too
    (root / "\x1b[2J").mkdir()
    with open(os.fsencode(root / "bob") + b"/\xff\xfe.png", "wb") as file:
        file.write((root / "bob" / "0.png").read_bytes())
    (root / "bob" / "\x1b[32m.png").write_bytes(b"")
    skipped = {
        "bob/\\udcff\\udcfe.png": UNNAMEABLE,
        "bob/\\x1b[32m.png": EMPTY,
        "\\x1b[2J": "no usable image of this person",
    }
    if complaint := inspected(root, GOOD + len(odd), skipped):
        return complaint
    outcome = command("data", "inspect", root)
    painted = [c for c in outcome.out + outcome.err if not c.isprintable() and c != "\n"]
    return f"exit code {outcome.code}, shows {shown(''.join(painted))}" if outcome.code or painted else None


def _archive(make: Callable[[Path, Path], Path], folder: Path) -> str | None:
    """Not unpacked, and not taken for a folder."""
    archive = make(people(folder / "faces"), folder)
    before = sorted(folder.rglob("*"))
    outcome = command("data", "inspect", archive, "--json", inside=folder)
    if complaint := refused(outcome, (2,), (archive.name, "not a folder", "unpack")):
        return complaint
    return None if sorted(folder.rglob("*")) == before else "something was unpacked"


def _zip(faces: Path, folder: Path) -> Path:
    with zipfile.ZipFile(folder / "faces.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(faces / "ada" / "0.png", "../escaped/0.png")
        archive.writestr("ada/bomb.png", bytes(50_000_000))
    return folder / "faces.zip"


def _tar(faces: Path, folder: Path) -> Path:
    with tarfile.open(folder / "faces.tar.gz", "w:gz") as archive:
        archive.add(faces / "ada" / "0.png", "../escaped/0.png")
        archive.add(faces / "ada" / "1.png", str(folder / "absolute.png"))
    return folder / "faces.tar.gz"


def _pairs(folder: Path) -> str | None:
    """Names that lead out are refused as they are read, with their line, whatever the run."""
    outside = _secret(folder)
    names = ("../outside", "..", str(outside), "..\\outside", "ada\0")
    for name in names:
        (folder / "pairs.txt").write_text(f"1\n{name}\t1\t2\nada\t1\tbob\t1\n")
        outcome = command("evaluate", folder / "run", "--pairs", folder / "pairs.txt", inside=folder)
        if complaint := refused(outcome, (2,), ("pairs.txt, line 2",)):
            return f"{name!r}: {complaint}"
    return None


def _circle(folder: Path) -> str | None:
    """A folder that is a link to itself, and people that are links to themselves and to the folder around them."""
    loop = folder / "loop"
    loop.symlink_to(loop)
    if complaint := refused(command("data", "inspect", loop, "--json"), (2,), ("loop",)):
        return complaint
    root = people(folder / "faces")
    (root / "eve").symlink_to(root / "eve")
    (root / "fay").symlink_to(root)
    (root / "note.txt").write_text("not a person")
    repeated = "a link to what is already in the data folder"
    return inspected(root, GOOD, {"eve": OUTSIDE, "fay": repeated, "note.txt": LOOSE})


PATHS = (
    Case("a link to a photo outside", _link),
    Case("a link to a person outside", _linked_person),
    Case("links that lead nowhere", _dangling),
    Case("a hard link to a photo outside", _hard_link),
    Case("a pipe", _pipe),
    Case("a socket", _socket),
    Case("a hundred thousand empty files", _crowd),
    Case("odd names", _names),
    Case("a zip archive", partial(_archive, _zip)),
    Case("a tar archive", partial(_archive, _tar)),
    Case("pairs that lead out", _pairs),
    Case("links in a circle", _circle),
)
