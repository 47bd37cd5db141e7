"""The command `data`: get, prepare and look at folders of faces."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from fedgc.showing import json_option, show, watching
from fedgc.stopping import StopSignalError


@click.group()
def data() -> None:
    """Get, prepare and look at folders of faces."""


@data.command("list")
@json_option
def data_list(as_json: bool) -> None:
    """The kinds of face data that --data understands."""
    from fedgc.pipeline.listing import listing

    show(as_json, listing("datasets"), lambda ui: ui.listing_table("datasets", listing("datasets")))


@data.command("fetch")
@click.argument("name", metavar="lfw|olivetti")
@click.argument("destination", metavar="[DST]", required=False, type=click.Path(path_type=Path))
@json_option
def data_fetch(name: str, destination: Path | None, as_json: bool) -> None:
    """Download a public set with scikit-learn and write it to DST (default: faces/NAME), one sub-folder a person."""
    from fedgc.data.fetch import fetch

    filled(as_json, lambda watch: fetch(name, destination or Path("faces") / name, progress=watch))


@data.command("prepare")
@click.argument("source", metavar="SRC")
@click.argument("destination", metavar="DST", type=click.Path(path_type=Path))
@click.option("--align", type=click.Choice(["mtcnn", "center", "none"]), default="mtcnn", show_default=True)
@click.option("--size", type=int, default=112, show_default=True, help="Side of the face images in pixels.")
@click.option(
    "--center-fraction", type=float, default=0.52, show_default=True, help="Of the shorter side, with --align center."
)
@click.option("--jobs", type=click.IntRange(min=1), help="Processes. [default: one a core]")
@json_option
def data_prepare(
    source: str, destination: Path, align: Any, size: int, center_fraction: float, jobs: int | None, as_json: bool
) -> None:
    """Find and align the face of every photo in SRC once, and write the faces to DST, one sub-folder a person.

    Interrupted, the same command goes on where it stopped; run again later, it does what changed in SRC.
    """
    from fedgc.data.preparation import prepare

    filled(
        as_json,
        lambda watch: prepare(
            source, destination, align=align, size=size, center_fraction=center_fraction, jobs=jobs, progress=watch
        ),
    )


def filled(as_json: bool, fill: Callable[[Any], dict[str, Any]]) -> None:
    """Fill a folder of faces; a signal leaves it so that the same command goes on."""
    try:
        with watching() as watch:
            made = fill(watch)
    except StopSignalError as stop:
        click.echo("stopped; the same command goes on", err=True)
        sys.exit(stop.code)
    show(as_json, made, lambda ui: ui.preparation(made))


@data.command("inspect")
@click.argument("path")
@json_option
def data_inspect(path: str, as_json: bool) -> None:
    """What is in a folder of faces, and what is wrong with it."""
    from fedgc.data.inspection import inspect

    with watching() as watch:
        found = inspect(path, progress=lambda done, total: watch("looking", done, total))
    show(as_json, found, lambda ui: ui.inspection(found))
