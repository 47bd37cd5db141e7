"""A prepared folder on disk: PNGs by person, a manifest that says where each came from, and, until it is complete,
a journal of what is done.

The journal exists before the first PNG and goes after the manifest has come, so that a folder with a journal is
unfinished, whatever moment the writer was killed at. All three are owner-only: these are private faces.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

from fedgc.data.folder import JOURNAL, Skipped
from fedgc.errors import DataError, WorkFailedError
from fedgc.files import MALFORMED, PRIVATE, make_folder, write_json, write_text, writing

MANIFEST = ".prepared.json"
SCHEMA = 1
LONGEST_NAME = 180  # bytes of a file's name without its suffix: temporary names are longer, file systems end at 255


@dataclass(frozen=True)
class Entry:
    """What became of one file of the source: ``output`` (relative to the prepared folder), or the ``reason`` it has none.

    sha256 (hex) is of the source's bytes; None where they could not be read.
    """

    file: str
    sha256: str | None
    output: str | None
    reason: str | None

    def to_json(self) -> dict[str, str | None]:
        place = {"output": self.output} if self.reason is None else {"reason": self.reason}
        return {"file": self.file, "sha256": self.sha256, **place}

    @classmethod
    def from_json(cls, stored: Mapping[str, Any]) -> Entry:
        """Raises ValueError for anything that this program would not have written."""
        entry = cls(stored["file"], stored["sha256"], stored.get("output"), stored.get("reason"))
        texts = (entry.file, entry.sha256, entry.output, entry.reason)
        if any(not isinstance(text, str) for text in texts if text is not None) or not isinstance(entry.file, str):
            raise ValueError("a value is not text")
        if (entry.output is None) == (entry.reason is None):
            raise ValueError("neither an output nor a reason")
        if entry.output is not None and not _plain(entry.output):
            raise ValueError(f"the output {entry.output!r} is not PERSON/FILE")
        return entry


class PreparedFolder:
    """The folder that ``data prepare`` writes. ``about``: settings and source, which never change afterwards."""

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path = path
        self.about = {"schema": SCHEMA, **about}
        self.manifest = path / MANIFEST
        self.journal = path / JOURNAL

    @property
    def complete(self) -> bool:
        return self.manifest.exists() and not self.journal.exists()

    def entries(self) -> dict[str, Entry]:
        """What is recorded as done, by the source's file.

        Raises:
            DataError: the folder holds something else, or was prepared from another source or with other settings.
        """
        found: dict[str, Entry] = {}
        if not (self.manifest.exists() or self.journal.exists()):
            return found
        try:
            if self.manifest.exists():
                stored = json.loads(self.manifest.read_text(encoding="utf-8"))
                self._compare(stored)
                found |= {e["file"]: Entry.from_json(e) for e in (*stored["kept"], *stored["dropped"]) if "sha256" in e}
            if self.journal.exists():
                header, *lines = self.journal.read_text(encoding="utf-8").split("\n")
                self._compare(json.loads(header))
                for line in lines[:-1]:  # what follows the last newline was cut off
                    entry = Entry.from_json(json.loads(line))
                    found[entry.file] = entry
        except (OSError, *MALFORMED) as error:
            raise DataError(
                f"the record in {self.path} is damaged ({error}): delete that folder, and prepare it again"
            ) from None
        return found

    def _compare(self, stored: Mapping[str, Any]) -> None:
        for key, value in self.about.items():
            if stored.get(key) != value:
                raise DataError(
                    f"{self.path} was prepared with {key} = {stored.get(key)}, not {value}: choose another folder, "
                    "or delete this one first"
                )

    def refuse_strangers(self, known: Iterable[str]) -> None:
        """Raises DataError where the folder holds what neither this run nor an earlier one would write."""
        expected = set(known)
        for file in self.files():
            if file not in expected and not _ours(file):
                raise DataError(
                    f"{self.path} holds something else ({file}): choose a folder that is empty or does not exist yet"
                )

    def files(self) -> list[str]:
        """Every file relative to the folder, hidden ones and links to folders too."""
        found = []
        for folder, folders, files in os.walk(self.path):
            inside = Path(folder).relative_to(self.path)
            found += [(inside / name).as_posix() for name in files]
            found += [(inside / name).as_posix() for name in folders if (Path(folder) / name).is_symlink()]
        return sorted(found)

    def reopen(self, valid: Sequence[Entry]) -> None:
        """Make the folder hold what ``valid`` names, and nothing else, and mark it unfinished."""
        header = json.dumps(self.about) + "\n"
        if not self.journal.exists():
            write_text(self.journal, header, PRIVATE)
        keep = {entry.output for entry in valid} | {MANIFEST, JOURNAL}
        for file in self.files():  # the old record still names them, should this be cut short
            if file not in keep:
                (self.path / file).unlink()
        write_text(self.journal, header + "".join(_line(entry) for entry in valid), PRIVATE)
        self.manifest.unlink(missing_ok=True)

    @contextmanager
    def recording(self) -> Iterator[Any]:
        """A function that adds an entry to the journal."""
        with writing(self.journal):
            file = open(self.journal, "a", encoding="utf-8")  # noqa: SIM115

        def record(entry: Entry) -> None:
            with writing(self.journal):
                file.write(_line(entry))
                file.flush()

        try:
            yield record
        finally:
            with suppress(OSError):  # what could not be written has been said
                file.close()

    def close(self, document: Mapping[str, Any]) -> None:
        """Write the manifest; the folder is complete once the journal is gone."""
        write_json(self.manifest, {**self.about, **document}, PRIVATE)
        self.journal.unlink(missing_ok=True)
        for folder in self.path.iterdir():
            if folder.is_dir() and not any(folder.iterdir()):
                folder.rmdir()

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder, made where it does not exist, for this process; a second one is refused."""
        if self.path.exists() and not self.path.is_dir():
            raise DataError(f"{self.path} is a file: choose a folder that is empty or does not exist yet")
        strange = self.path.exists() and any(self.path.iterdir())
        if strange and not (self.manifest.exists() or self.journal.exists()):
            self.refuse_strangers(())
        try:
            make_folder(self.path, private=True)
            handle = os.open(self.path, os.O_RDONLY)
        except OSError as error:
            raise WorkFailedError(f"{self.path} cannot be made ({error.strerror}); choose another folder") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError:
            raise DataError(f"{self.path} is being prepared by another process: wait for it") from None
        finally:
            os.close(handle)


def document(entries: Iterable[Entry], skipped: Sequence[Skipped]) -> dict[str, Any]:
    """The manifest's list of files, in an order that does not depend on how the work went."""
    listed = sorted(entries, key=lambda entry: entry.file)
    kept = [entry.to_json() for entry in listed if entry.reason is None]
    dropped = [entry.to_json() for entry in listed if entry.reason is not None]
    dropped += [{"file": entry.path, "reason": entry.reason} for entry in sorted(skipped, key=lambda e: e.path)]
    people = {str(entry["output"]).partition("/")[0] for entry in kept}
    digest = hashlib.sha256(repr([(entry.file, entry.sha256) for entry in listed]).encode())
    return {
        "fingerprint": digest.hexdigest(),
        "counts": {"people": len(people), "kept": len(kept), "dropped": len(dropped)},
        "kept": kept,
        "dropped": dropped,
    }


def distinct(names: Iterable[str], suffix: str = "") -> dict[str, str]:
    """An output name for each name, distinct even where a file system ignores case or the form of accents.

    With a suffix, it replaces the name's own (``a.jpg`` and ``a.png`` become ``a.png`` and ``a.png.png``).
    """
    taken: set[str] = set()
    chosen = {}
    for name in sorted(names):
        stem = _short(Path(name).stem if suffix else name)
        candidates = chain([stem, _short(name)], (f"{_short(name)}-{n}" for n in count(2)))
        free = next(c for c in candidates if _folded(c + suffix) not in taken)
        taken.add(_folded(free + suffix))
        chosen[name] = free + suffix
    return chosen


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()


def _short(name: str) -> str:
    encoded = name.encode()
    if len(encoded) <= LONGEST_NAME:
        return name
    return encoded[: LONGEST_NAME - 9].decode(errors="ignore") + "-" + hashlib.sha256(encoded).hexdigest()[:8]


def _line(entry: Entry) -> str:
    return json.dumps(entry.to_json()) + "\n"


def _plain(output: str) -> bool:
    parts = output.split("/")
    return len(parts) == 2 and all(part and not part.startswith(".") and "\0" not in part for part in parts)


def _ours(file: str) -> bool:
    """The record itself, or a temporary file that a killed process left (see fedgc.files.write_bytes)."""
    folder, _, name = file.rpartition("/")
    if not folder:
        return name in (MANIFEST, JOURNAL) or name.startswith((f".{MANIFEST}.", f".{JOURNAL}."))
    return name.startswith(".") and ".png." in name and "/" not in folder
