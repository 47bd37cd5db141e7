"""Configurations that must be refused before any work (S4)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from tests.trust.cases import Case, Outcome, command, refused, shown, unwritten

FILE, OUT = "hostile.toml", "out"
GOOD = '[data]\nsource = "synthetic:24x6"\nimage_size = 32\n'


def _text(text: str | bytes, *names: str) -> Callable[[Path], str | None]:
    """A file of this text is refused with a line that contains the names."""
    return partial(_file, text.encode() if isinstance(text, str) else text, names)


def _file(text: bytes, names: tuple[str, ...], folder: Path) -> str | None:
    (folder / FILE).write_bytes(text)
    return _refused(folder, _train(folder), FILE, *names)


def _train(folder: Path, *more: object, environment: dict[str, str] | None = None) -> Outcome:
    return command("train", folder / FILE, "--out", folder / OUT, *more, inside=folder, environment=environment)


def _refused(folder: Path, outcome: Outcome, *names: str) -> str | None:
    """Exit code 2, and nothing written: neither where the run was to go nor elsewhere."""
    strange = sorted(path.name for path in folder.iterdir() if path.name not in (FILE, OUT))
    return (
        refused(outcome, (2,), names)
        or unwritten(folder / OUT)
        or (f"wrote {', '.join(strange)} beside the configuration" if strange else None)
    )


def _folder(folder: Path) -> str | None:
    (folder / FILE).mkdir()
    return _refused(folder, _train(folder), FILE)


def _environment(folder: Path) -> str | None:
    (folder / FILE).write_text(GOOD)
    outcome = _train(folder, environment={"FEDGC_PRIV_FEDERATION_ROUND": "3"})
    return _refused(folder, outcome, "FEDGC_PRIV_FEDERATION_ROUND", "FEDGC_PRIV_FEDERATION_ROUNDS")


def _clients(folder: Path) -> str | None:
    """Known once the people are counted: before training, and before the folder is a run."""
    (folder / FILE).write_text(f"{GOOD}[federation]\nclients = 1000\n")
    return _refused(folder, _train(folder), "federation.clients=1000", "people")


def _numbers(folder: Path) -> str | None:
    """Of more than the 64 bits that TOML knows, under keys that state no limit of their own too."""
    keys = ("seed", "federation.rounds", "federation.batch_size", "record.victims", "audit.canaries", "data.image_size")
    (folder / FILE).write_text(GOOD)
    for key in keys:
        complaint = _refused(folder, _train(folder, "--set", f"{key}={10**30}"), key)
        if complaint:
            return f"{key}: {complaint}"
    return _text(f"seed = {'9' * 5000}\n")(folder)


def _syntax(folder: Path) -> str | None:
    return _text("[federation\nrounds = 3\n")(folder) or _text(f"x = {'[' * 100_000}\n")(folder)


def _escape(folder: Path) -> str | None:
    """The folder of a run without --out is named after keys, none of which can lead out of ``runs``; a path with a NUL, which a
    file can hold and a command line cannot, is one clear error. --out ``../x`` is the user's own word, and harmless: that path is
    meant, and a file there is not written over."""
    names = ("federation.algorithm", "defense.name")
    for key in names:
        outcome = command("train", "--set", f"{key}='../../{OUT}'", inside=folder)
        if complaint := _refused(folder, outcome, key.partition(".")[0]):
            return f"{key}: {complaint}"
    for key in ("data.source", "model.init"):
        outcome = command("train", "--set", f'{key}="a\\u0000b"', "--out", folder / OUT, inside=folder)
        if complaint := _refused(folder, outcome):
            return f"{key} with a NUL: {complaint}"
    return _told_so(folder)


def _told_so(folder: Path) -> str | None:
    (folder / OUT).mkdir(exist_ok=True)  # perhaps with a lock in it
    (folder / FILE).write_text(GOOD)
    outcome = command("train", folder / FILE, "--out", f"../{FILE}", inside=folder / OUT)
    if complaint := refused(outcome, (2,), (f"../{FILE}", "is a file")):
        return f"--out ../{FILE}: {complaint}"
    kept = (folder / FILE).read_text() == GOOD and unwritten(folder / OUT) is None
    return None if kept else f"--out ../{FILE} changed something: {shown(str(sorted(folder.iterdir())))}"


CONFIGS = (
    Case("unknown section", _text("[federations]\nrounds = 3\n", "unknown key 'federations'", "did you mean")),
    Case("unknown key", _text("[data]\nzebra = 3\n", "unknown key 'data.zebra'")),
    Case("misspelt key", _text("[federation]\nround = 3\n", "did you mean 'federation.rounds'?")),
    Case("NaN", _text("[federation]\nlr = nan\n", "federation.lr", "finite")),
    Case("infinity", _text("[federation]\nlr = inf\n", "federation.lr", "finite")),
    Case("negative number", _text("[federation]\nbatch_size = -4\n", "federation.batch_size", "-4")),
    Case("no rounds", _text("[federation]\nrounds = 0\n", "federation.rounds")),
    Case("huge integer", _numbers),
    Case("wrong type", _text('[federation]\nrounds = "many"\n', "federation.rounds", "many", "integer")),
    Case("text in place of a table", _text('federation = "fedavg"\n', "federation")),
    Case("duplicate key", _text("[federation]\nrounds = 3\nrounds = 4\n", "line 3")),
    Case("no TOML", _syntax),
    Case("not UTF-8", _text(b'[data]\nsource = "\xff\xfe"\n', "utf-8")),
    Case("a folder in place of the file", _folder),
    Case("unknown defense", _text('[defense]\nname = "prayer"\n', "defense", "prayer")),
    Case(
        "epsilon and noise at once",
        _text('[defense]\nname = "dp-sgd"\nepsilon = 3.0\nnoise_multiplier = 1.0\n', "epsilon", "noise_multiplier"),
    ),
    Case("paths that lead out, and with a NUL", _escape),
    Case("a key of another defense", _text("[defense]\nname = 'pruning'\nepsilon = 3.0\n", "'pruning'", "epsilon")),
    Case("unknown key in the environment", _environment),
    Case("more clients than people", _clients),
)
