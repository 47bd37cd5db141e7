"""What every command shares: its options for output and settings, progress, and the choice between tables and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import click

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
