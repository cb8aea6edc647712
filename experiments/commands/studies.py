"""Commands that compare: arms of a study by seeds, and this toolkit with others by speed."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.commands.output import Json, emit
from experiments.run.host.console import table


def register(app: typer.Typer) -> None:
    """Adds this file's commands."""
    app.command(
        epilog="Example: antgmm study experiments/lab/studies/study.toml --run runs/study"
        " --out experiments/lab/results/study.json --arm full --arm scratch"
    )(study)
    app.command(epilog="Example: antgmm peers --out experiments/lab/results/peers.json, after `make peers-env`")(peers)


def study(
    path: Annotated[Path, typer.Argument(metavar="STUDY", help="A TOML file: a recipe and arms that change it.")],
    run: Annotated[
        Path, typer.Option("--run", metavar="DIR", help="Folder of all its runs; a study found there goes on.")
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; beside it .md and .svg.")],
    arms: Annotated[
        list[str] | None, typer.Option("--arm", metavar="NAME", help="Only these. Can be repeated.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Run a study arm by arm and tell the scores with their spread; a second process takes other runs of it."""
    from experiments.lab.study.arms import load_study

    chosen = load_study(path)
    from experiments.lab.study.run import run_study
    from experiments.lab.study.summary import HEAD, rows

    results = run_study(chosen, run, out, only=arms or ())
    emit({"results": results}, as_json, table(HEAD, rows(results)), f"results: {out}")


def peers(
    out: Annotated[Path, typer.Option(metavar="FILE", help="Results as JSON; beside it .md and .svg.")],
    work: Annotated[
        Path, typer.Option(metavar="DIR", help="Weights, text and single results; a comparison found there goes on.")
    ] = Path("runs/peers"),
    python: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Python of the peers' environment; that of `make peers-env` unless given."),
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Rounds; medians and ranges are told.")] = 5,
    samples: Annotated[int, typer.Option(min=8, help="Samples of the data set, each seen once by each peer.")] = 192,
    as_json: Json = False,
) -> None:
    """Hold distillation against TRL's GKD and google-tunix: one task, one core, each a process of its own, in turn."""
    from experiments.lab.peers.results import compare
    from experiments.lab.peers.run import PYTHON
    from experiments.lab.peers.summary import sentences, tables
    from experiments.lab.peers.task import Task

    figures = compare(Task(rows=samples), work, out, python=python or PYTHON, repeats=repeats)
    shown = [table(each.head, each.rows) for each in tables(figures)]
    emit(figures, as_json, *shown, *sentences(figures), f"results: {out}")
