"""What every command shares: its options for output and settings, progress, the choice between tables and JSON, and errors."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any

import click

from fedgc.limits import ADVICE, LAST_WORDS, explained, ran_out

json_option = click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout, nothing else.")
set_option = click.option(
    "--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one setting; repeatable."
)


def watching() -> Any:
    """Progress on stderr: bars on a terminal, a line now and then elsewhere."""
    from fedgc.terminal import progress

    return progress()


def show(as_json: bool, document: Any, draw: Callable[[Any], None]) -> None:
    if as_json:
        click.echo(json.dumps(document, indent=1, allow_nan=False))
        return
    from fedgc import terminal

    draw(terminal)


def say_unforeseen(error: Exception) -> None:
    """One line of an error that nobody turned into one."""
    try:
        what = f"{type(error).__name__}: {in_one_line(error)} (run `fedgc-priv -v ...` for the traceback)"
        if ran_out(error):
            named = [word for word in sys.argv[1:] if word in ADVICE]
            what = in_one_line(explained(error, named[0] if named else "the command"))
        click.echo(f"fedgc-priv: {what}", err=True)
    except MemoryError:
        os.write(2, LAST_WORDS)


def in_one_line(error: Exception | str) -> str:
    """What an error says, as a terminal may show it: names out of a stranger's file can hold line ends and control codes."""
    text = " ".join(str(error).splitlines())
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
