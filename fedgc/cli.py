"""The command line: parse, call the pipeline, print. Data goes to stdout, everything else to stderr.

Heavy libraries are imported inside the commands, so that --help answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from fedgc import __version__
from fedgc.cli_data import data
from fedgc.errors import FedgcError, UsageError
from fedgc.showing import in_one_line, json_option, say_unforeseen, set_option, show, watching
from fedgc.stopping import StopSignalError, end, stop_on_signals


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fedgc-priv")
@click.option("-v", "--verbose", is_flag=True, help="Show the traceback of an error.")
def cli(verbose: bool) -> None:
    """Train face recognisers across parties that keep their photos, and measure what leaks, to whom, and what
    protection costs."""


cli.add_command(data)


@cli.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/demo"), show_default=True)
@json_option
def demo(out: Path, as_json: bool) -> None:
    """The whole story on built-in synthetic faces: train, attack, defend, report."""
    from fedgc.pipeline.demo import run_demo

    with watching() as watch:
        summary = run_demo(out, watch)
    show(as_json, summary, lambda ui: ui.report_table(summary))
    if not as_json:
        click.echo(summary["report"])


@cli.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@click.option("--data", "source", help="synthetic, synthetic:PEOPLExPHOTOS, or a folder with one sub-folder a person.")
@click.option("--algorithm", help="centralized, local, fedavg, fedpe, fedgc, fedcos or fedaws.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Run directory. [default: runs/<algorithm>-<defense>-<hash>]"
)
@click.option("--seed", type=int)
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]))
@set_option
@click.option("--resume", is_flag=True, help="Go on with an unfinished run.")
@click.option("--dry-run", is_flag=True, help="Check and print the resolved configuration, train nothing.")
@json_option
def train(
    config: Path | None, source: str | None, algorithm: str | None, out: Path | None, seed: int | None,
    device: str | None, settings: Sequence[str], resume: bool, dry_run: bool, as_json: bool,
) -> None:  # fmt: skip
    """Train a federation and record what crossed the wire.

    Settings come from CONFIG (TOML), the environment (FEDGC_PRIV_SECTION_KEY), --set and flags, in rising order.
    A finished run of the same configuration is found, not repeated.
    """
    from fedgc.config import load_config
    from fedgc.pipeline.parallel import crew
    from fedgc.pipeline.training import train as run_training

    flags = {"data.source": source, "federation.algorithm": algorithm, "seed": seed, "device": device}
    given = config or settings or any(value is not None for value in flags.values())
    if resume and out is not None and not given:
        chosen = None
    else:
        chosen = load_config(config, environment=os.environ, settings=settings, flags=flags)
    if dry_run:
        if chosen is None:
            raise UsageError("--dry-run has nothing to resolve beside --resume --out: leave one of them out")
        show(as_json, chosen.model_dump(mode="json"), lambda ui: ui.text(chosen.to_toml()))
        return
    if out is None:
        if chosen is None or (resume and not given):
            raise UsageError("--resume needs --out RUN: the run to go on with")
        out = Path("runs") / f"{chosen.federation.algorithm}-{chosen.defense.name}-{chosen.digest()}"
    try:
        with watching() as watch, crew(chosen, out) as first:
            if not first:
                return
            result = run_training(chosen, out, resume=resume, watch=watch)
    except StopSignalError as stop:
        begun = (out / "run.json").exists()
        how = f"go on with: fedgc-priv train --out {out} --resume" if begun else "nothing was begun: repeat the command"
        end(stop, f"stopped; {how}")
    name_skipped(result)
    for note in result["notes"]:
        click.echo(f"note: {note}", err=True)
    show(as_json, result, lambda ui: ui.training(result))


def name_skipped(result: Mapping[str, Any], most: int = 5) -> None:
    """Files that could not be used, on stderr: they are no reason to stop, and none to be silent."""
    if result["skipped"]:
        named = "; ".join(f"{s['path']} ({s['reason']})" for s in result["skipped_files"][:most])
        more = f", and {result['skipped'] - most} more" if result["skipped"] > most else ""
        click.echo(
            f"skipped {result['skipped']} files: {named}{more}. `fedgc-priv data inspect` shows them all", err=True
        )


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--data", "source", help="Measure on the people of another source, none of whom were trained on.")
@click.option(
    "--pairs", type=click.Path(path_type=Path), help="A list of photo pairs: LFW's pairs.txt or a View-1 list."
)
@json_option
def evaluate(run: Path, source: str | None, pairs: Path | None, as_json: bool) -> None:
    """Measure the utility of a finished run on people it was not trained on."""
    from fedgc.pipeline.evaluation import evaluate as run_evaluation

    with watching() as watch:
        result = run_evaluation(run, source, watch, pairs=pairs)
    show(as_json, result, lambda ui: ui.evaluation(result))


@cli.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option("-a", "--attack", "attacks", multiple=True, help="An attack; repeatable. [default: all]")
@click.option("-t", "--threat", "threats", multiple=True, help="A seat; repeatable. [default: all]")
@click.option(
    "--targets",
    type=click.IntRange(min=1),
    help="Photos to attack. [default: 8 where an attack is costly, else all recorded]",
)
@click.option(
    "--judge", metavar="NAME", help="Who says whether pictures show the person: see `list judges`. [default: nobody]"
)
@click.option("--round", "which", default="last", show_default=True, help="A recorded round: last, all, or its number.")
@click.option("--faces", metavar="SPEC", help="With an update file: the attacker's own faces, as --data of train.")
@click.option(
    "--truth",
    type=click.Path(path_type=Path),
    help="With an update file: the photos behind it, to measure what was found.",
)
@set_option
@click.option("--force", is_flag=True, help="Attack again where a result exists.")
@json_option
def attack(
    run: Path, attacks: Sequence[str], threats: Sequence[str], targets: int | None, which: str,
    judge: str | None, faces: str | None, truth: Path | None, settings: Sequence[str], force: bool, as_json: bool,
) -> None:  # fmt: skip
    """Attack what each seat saw of a finished RUN (or of a bare file: of a checkpoint as an outsider, of an update of one client
    as its server).

    --set takes an attack's own settings, for example gradient-inversion.iterations=100.
    """
    from fedgc.pipeline.attacking import attack as run_attacks

    with watching() as watch:
        entries = run_attacks(
            run, attacks, threats, targets=targets, round=which, settings=settings, force=force, judge=judge,
            faces=faces, truth=truth, watch=watch,
        )  # fmt: skip
    show(as_json, entries, lambda ui: ui.attacks(entries))


@cli.command()
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--over", multiple=True, metavar="KEY=V1,V2,...", help="One axis of the grid; repeatable.")
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    help="Repeat each cell with so many seeds; default: as the file says, else 1.",
)
@click.option("--out", type=click.Path(path_type=Path), default=Path("runs/sweep"), show_default=True)
@click.option("--resume", is_flag=True, help="Go on with an unfinished sweep.")
@json_option
def sweep(config: Path, over: Sequence[str], seeds: int | None, out: Path, resume: bool, as_json: bool) -> None:
    """Train and attack every cell of a grid, several at a time, and report them together.

    The grid is in the [sweep] table of CONFIG, in --over, or in both.
    """
    from fedgc.pipeline.grids import cells
    from fedgc.pipeline.sweeping import run_sweep

    with watching() as watch:
        summary = run_sweep(cells(config, over, seeds, os.environ), out, resume=resume, watch=watch)
    show(as_json, summary, lambda ui: ui.report_table(summary))


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("-o", "--out", type=click.Path(path_type=Path), default=Path("report"), show_default=True)
@click.option("--no-originals", is_flag=True, help="Leave every private photo and its reconstruction out.")
@click.option(
    "--fail-if",
    "gates",
    multiple=True,
    metavar="EXPR",
    help="Exit 4 if true, e.g. 'identity-linkage@client.rank1 > 0.05'.",
)
@json_option
def report(runs: Sequence[Path], out: Path, no_originals: bool, gates: Sequence[str], as_json: bool) -> None:
    """One page, and its numbers as CSV, JSON and figures, from runs or folders of runs."""
    from fedgc.pipeline.reporting import check_gates
    from fedgc.pipeline.reporting import report as write_report

    with watching() as watch:
        summary = write_report(runs, out, originals=not no_originals, watch=watch)
    show(as_json, summary, lambda ui: ui.report_table(summary))
    if not as_json:
        click.echo(summary["report"])
    for line in check_gates(runs, gates):
        click.echo(line, err=True)


@cli.command()
@click.argument("config", required=False, type=click.Path(path_type=Path))
@set_option
@click.option(
    "--runs", type=click.IntRange(min=20), default=1000, show_default=True, help="In each world; half are counted."
)
@json_option
def audit(config: Path | None, settings: Sequence[str], runs: int, as_json: bool) -> None:
    """Attack the mechanism of a defense that promises an epsilon, with and without a canary, and compare.

    Needs no faces: it looks for mistakes in the code, on a tiny network. Exits with 1 where epsilon is higher than claimed.
    """
    from fedgc.config import load_config
    from fedgc.pipeline.auditing import audit_config

    with watching() as watch:
        found = audit_config(load_config(config, environment=os.environ, settings=settings), runs, watch)
    show(as_json, found, lambda ui: ui.audited(found))
    if found["exceeded"]:
        sys.exit(1)


KINDS = ("attacks", "defenses", "threats", "algorithms", "models", "judges", "datasets")


@cli.command("list")
@click.argument("kind", type=click.Choice(KINDS))
@json_option
def list_command(kind: str, as_json: bool) -> None:
    """What can be chosen from."""
    from fedgc.pipeline.listing import listing

    show(as_json, listing(kind), lambda ui: ui.listing_table(kind, listing(kind)))


def main() -> None:
    """Entry point: every error that a user can act on is one line and an exit code."""
    verbose = "-v" in sys.argv[1:2] or "--verbose" in sys.argv[1:2]
    try:
        stop_on_signals()
        cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except StopSignalError as stop:
        end(stop, "stopped")
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except FedgcError as error:
        if verbose:
            raise
        click.echo(f"fedgc-priv: {in_one_line(error)}", err=True)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        if verbose:
            raise
        say_unforeseen(error)
        sys.exit(1)


if __name__ == "__main__":
    main()
