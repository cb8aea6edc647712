"""Commands that compare ways to compress: arms of a study, by seeds."""

from pathlib import Path
from typing import Annotated

import typer

from experiments.commands.output import Json, emit, table


def register(app: typer.Typer) -> None:
    """Adds this file's commands."""
    app.command(
        epilog="Example: antgmm study experiments/studies/study.toml --run runs/study"
        " --out experiments/results/study.json --arm full --arm scratch"
    )(study)


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
    from experiments.study.arms import load_study

    chosen = load_study(path)
    from experiments.study.run import run_study
    from experiments.study.summary import HEAD, rows

    results = run_study(chosen, run, out, only=arms or ())
    emit({"results": results}, as_json, table(HEAD, rows(results)), f"results: {out}")
